"""The compiled sums: the bits of numpy, the bytes of torch, and nothing lost where they are not."""

from __future__ import annotations

import importlib.util
import itertools
import logging
import platform
import shutil
import sys
from fractions import Fraction
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from safetensors.torch import save_file

import merge.engine.block_worker as worker
from merge import load_recipe, run_recipe
from merge.engine import fused
from merge.engine.fused import LIBRARY, load_library
from merge.errors import NonFiniteError
from merge.plan.memory import panel_elements
from tests.mini import contents, numpy_float32, numpy_round, random_tensors, write_recipe
from tests.mini import write_unet as write

SOURCE = LIBRARY.with_name("fused.c")
HEADERS = ("vectors_x86.h", "vectors_neon.h")
DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
CODES = {"F16": 0, "BF16": 1, "F32": 2}
WIDTHS = {"F16": np.uint16, "BF16": np.uint16, "F32": np.uint32}
CHANGED, OUTSIDE = 1, 2

needs_library = pytest.mark.skipif(load_library() is None, reason="fused.c is not compiled here")
needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")
is_arm = platform.machine() in ("aarch64", "arm64")
on_arm = pytest.mark.skipif(not is_arm, reason="this is no AArch64")
on_x86 = pytest.mark.skipif(is_arm, reason="this is AArch64")


def add_delta(
    out: str, values: list[tuple[str, torch.Tensor]], weight: float
) -> tuple[np.ndarray, int]:
    """Call the library; return the result's bits and its flags."""
    library = load_library()
    assert library is not None
    count = len(values[0][1])
    # A guard behind the result: nothing may be written there.
    result = np.full(count + 16, 0x5A5A, dtype=WIDTHS[out])
    arguments = [result.ctypes.data, CODES[out]]
    for dtype, tensor in values:
        arguments += [tensor.data_ptr(), CODES[dtype]]
    flags = library.fused_add_delta(*arguments, weight, count)
    assert (result[count:] == 0x5A5A).all()
    return result[:count], flags


def formula(values: list[tuple[str, torch.Tensor]], weight: float) -> tuple[np.ndarray, np.ndarray]:
    """Return sum and delta in numpy: three float32 operations, each rounded once."""
    target, distilled, base = (numpy_float32(tensor) for _, tensor in values)
    delta = (distilled - base) * np.float32(weight)
    return target + delta, delta


def limit(out: str) -> float:
    return {"F16": 65520.0, "BF16": 3.3961775292304957e38, "F32": np.inf}[out]


def mixed_values(dtype: str, count: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(count, generator=generator, dtype=torch.float64)
    values *= 2.0 ** torch.randint(-26, 5, (count,), generator=generator)
    values[::13] = 0.0
    values[1::13] = -0.0
    values[2::13] = torch.finfo(DTYPES[dtype]).smallest_normal / 4
    values[3::13] = 1 + 2.0**-11
    values[4::13] = 1 + 2.0**-8
    return values.to(DTYPES[dtype])


@needs_library
@pytest.mark.parametrize("dtypes", list(itertools.product(DTYPES, repeat=3)), ids="-".join)
@pytest.mark.parametrize("out", DTYPES)
def test_every_dtype_pairing_has_the_bits_of_numpy(dtypes: tuple[str, ...], out: str) -> None:
    for count in (*range(20), 1021):
        values = [(code, mixed_values(code, count, seed)) for seed, code in enumerate(dtypes)]
        found, flags = add_delta(out, values, 0.7)
        exact, delta = formula(values, 0.7)
        np.testing.assert_array_equal(found, numpy_round(exact, DTYPES[out]))
        assert flags == (CHANGED if (delta != 0).any() else 0)


@needs_library
@pytest.mark.parametrize("role", range(3))
@pytest.mark.parametrize("code", ["F16", "BF16"])
@pytest.mark.parametrize("out", DTYPES)
def test_every_16_bit_value_has_the_bits_of_numpy(code: str, role: int, out: str) -> None:
    patterns = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(DTYPES[code])
    patterns = patterns[torch.isfinite(patterns)]
    values = [(code, torch.full((len(patterns),), number)) for number in (0.25, 0.251, -0.25)]
    values = [(code, tensor.to(DTYPES[code])) for code, tensor in values]
    values[role] = (code, patterns)
    exact, _ = formula(values, 0.3)
    found, flags = add_delta(out, values, 0.3)
    inside = np.abs(exact) < limit(out)
    expected = numpy_round(np.where(inside, exact, 0), DTYPES[out])
    np.testing.assert_array_equal(found[inside], expected[inside])
    assert bool(flags & OUTSIDE) == (not inside.all())


@needs_library
@settings(max_examples=200)
@given(
    target=arrays(np.float32, 24, elements=st.floats(-(2.0**100), 2.0**100, width=32)),
    product=arrays(np.float64, 24, elements=st.floats(-(2.0**100), 2.0**100)),
    factor=st.floats(-4, 4),
    out=st.sampled_from(list(DTYPES)),
    code=st.sampled_from(list(DTYPES)),
    count=st.integers(0, 24),
)
def test_a_product_is_rounded_once_and_added_once(
    target: np.ndarray, product: np.ndarray, factor: float, out: str, code: str, count: int
) -> None:
    library = load_library()
    assert library is not None
    stored = torch.from_numpy(target).clamp(-6e4, 6e4).to(DTYPES[code])[:count].clone()
    result = np.full(count + 16, 0x5A5A, dtype=WIDTHS[out])
    flags = library.fused_add_product(
        result.ctypes.data, CODES[out], stored.data_ptr(), CODES[code], product.ctypes.data,
        factor, count,
    )  # fmt: skip
    delta = (product[:count] * factor).astype(np.float32)
    exact = numpy_float32(stored) + delta
    assert (result[count:] == 0x5A5A).all()
    inside = np.abs(exact) < limit(out)
    expected = numpy_round(np.where(inside, exact, 0), DTYPES[out])
    np.testing.assert_array_equal(result[:count][inside], expected[inside])
    assert bool(flags & OUTSIDE) == (not inside.all())
    assert bool(flags & CHANGED) == bool((delta != 0).any())


def add_low_rank(
    out: str, target: tuple[str, torch.Tensor], up: np.ndarray, down: np.ndarray, factor: float
) -> tuple[np.ndarray, int]:
    """Call the library; return the result's bits, `(rows, columns)`, and its flags."""
    library = load_library()
    assert library is not None
    code, values = target
    rows, columns = values.shape
    panels = np.full(panel_elements(len(down), columns) + 16, 7.25)
    library.fused_pack_panels(panels.ctypes.data, down.ctypes.data, *down.shape)
    assert (panels[-16:] == 7.25).all()
    result = np.full(rows * columns + 16, 0x5A5A, dtype=WIDTHS[out])
    flags = library.fused_add_low_rank(
        result.ctypes.data, CODES[out], values.data_ptr(), CODES[code], up.ctypes.data,
        panels.ctypes.data, factor, len(down), rows, columns,
    )  # fmt: skip
    assert (result[-16:] == 0x5A5A).all()
    return result[:-16].reshape(rows, columns), flags


def exact_factors(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Values whose sums of products are exact in float64, whatever their order."""
    return rng.integers(-1000, 1001, shape) * 2.0**-9


@needs_library
@pytest.mark.parametrize(("code", "out"), list(itertools.product(DTYPES, repeat=2)))
def test_a_low_rank_product_has_the_bits_of_numpy(code: str, out: str) -> None:
    rng = np.random.default_rng(3)
    for rows, columns, rank in [
        *itertools.product(range(1, 14), (1, 3, 8, 9, 16, 23), (1, 5)), (40, 129, 64), (7, 8, 300)
    ]:  # fmt: skip
        up, down = exact_factors(rng, rows, rank), exact_factors(rng, rank, columns)
        target = torch.from_numpy(exact_factors(rng, rows, columns)).to(DTYPES[code])
        found, flags = add_low_rank(out, (code, target), up, down, 0.3)
        delta = ((up @ down) * 0.3).astype(np.float32)
        expected = numpy_round(numpy_float32(target) + delta, DTYPES[out])
        np.testing.assert_array_equal(found, expected)
        assert flags == (CHANGED if delta.any() else 0)


@needs_library
def test_a_sum_over_the_rank_is_a_chain_of_fused_multiply_adds() -> None:
    # On every machine, so that every machine has the same bits.
    rng = np.random.default_rng(4)
    up, down = rng.standard_normal((13, 21)), rng.standard_normal((21, 19))
    found, _ = add_low_rank("F32", ("F32", torch.zeros(13, 19)), up, down, 2.0**60)
    for row, column in itertools.product(range(13), range(19)):
        total = 0.0
        for one, other in zip(up[row], down[:, column], strict=True):
            total = float(Fraction(float(one)) * Fraction(float(other)) + Fraction(total))
        assert found[row, column] == np.float32(total * 2.0**60).view(np.uint32)


@needs_library
@pytest.mark.parametrize("out", DTYPES)
@pytest.mark.parametrize("value", [np.nan, np.inf, -1e300])
def test_a_factor_that_is_too_large_is_told_wherever_it_is(out: str, value: float) -> None:
    for row, column in itertools.product((0, 5, 6, 12), (0, 8, 18)):
        for is_up in (True, False):
            up, down = np.ones((13, 3)), np.ones((3, 19))
            (up if is_up else down)[(row, 1) if is_up else (1, column)] = value
            flags = add_low_rank(out, ("F16", torch.zeros(13, 19).half()), up, down, 0.5)[1]
            assert flags & OUTSIDE
    zeros = np.zeros((13, 3))
    found = add_low_rank(out, ("F16", torch.zeros(13, 19).half()), zeros, np.ones((3, 19)), 0.5)
    assert found[1] == 0


@needs_library
@pytest.mark.parametrize("place", [0, 7, 8, 12])
@pytest.mark.parametrize("out", DTYPES)
def test_one_value_out_of_range_is_told_wherever_it_is(out: str, place: int) -> None:
    border = np.float32(min(limit(out), float(np.finfo(np.float32).max)))
    below = np.nextafter(border, np.float32(0))
    for number, is_outside in ((border, out != "F32"), (below, False), (-border, out != "F32")):
        target = torch.zeros(13)
        target[place] = float(number)
        values = [("F32", target), ("F32", torch.zeros(13)), ("F32", torch.zeros(13))]
        assert add_delta(out, values, 1.0)[1] == (OUTSIDE if is_outside else 0)
    for number in (np.nan, np.inf, -np.inf):
        for role in range(3):
            values = [("F32", torch.zeros(13)) for _ in range(3)]
            values[role][1][place] = number
            assert add_delta(out, values, 0.5)[1] & OUTSIDE


@needs_library
def test_a_zero_delta_is_none_whatever_its_sign() -> None:
    same = mixed_values("F16", 50, 1)
    values = [("F16", mixed_values("F16", 50, 0)), ("F16", same), ("F16", same.clone())]
    assert add_delta("F16", values, -1.0)[1] == 0
    values[1][1][49] += 1
    assert add_delta("F16", values, -1.0)[1] == CHANGED


# Whole merges ------------------------------------------------------------------------------------


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """Models of every dtype, with a zero delta, a value too large for float16, a LoRA."""
    for seed, (role, dtype) in enumerate(
        {"target": torch.float16, "distilled": torch.float32, "base": torch.bfloat16}.items()
    ):
        tensors = random_tensors(seed, dtype=dtype, channels=8 if role == "target" else 4)
        tensors["mid_block.same.weight"] = torch.full((9, 11), 0.5 - (role == "target")).to(dtype)
        tensors["mid_block.large.weight"] = torch.full((33, 7), 30_000.0 * (1 + seed)).to(dtype)
        tensors["mid_block.large.weight"][:] = 1 if role == "base" else 40_000.0
        write(tmp_path / role, tensors)
    shape = random_tensors(0)["conv_out.weight"].shape
    generator = torch.Generator().manual_seed(5)
    factors = {
        "unet.conv_out.lora_A.weight": torch.randn(3, *shape[1:], generator=generator),
        "unet.conv_out.lora_B.weight": torch.randn(shape[0], 3, 1, 1, generator=generator),
    }
    save_file(factors, tmp_path / "lora.safetensors")
    return tmp_path


@needs_library
@pytest.mark.parametrize("rule", ["clamp", "keep_target"])
@pytest.mark.parametrize("out", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("distilled", ["./distilled", "./lora.safetensors"])
def test_with_and_without_the_library_the_output_has_the_same_bytes(
    models: Path, monkeypatch: pytest.MonkeyPatch, distilled: str, out: str, rule: str
) -> None:
    named = {"target": "./target", "distilled": distilled}
    if distilled == "./distilled":
        named["base"] = "./base"
    write_recipe(models, models=named, weight=0.3, out_dtype=out, on_overflow=rule)

    def output(name: str) -> dict[str, bytes]:
        recipe = load_recipe(models / "mini.yaml")
        return contents(run_recipe(recipe, models / name, verify=False).folder)

    calls = []
    result = fused.FusedAdder._result

    def counted(self: fused.FusedAdder, *arguments: object) -> object:
        calls.append(arguments)
        return result(self, *arguments)

    monkeypatch.setattr(fused.FusedAdder, "_result", counted)
    one = output("one-pass")
    assert calls
    monkeypatch.setattr(worker, "load_library", lambda: None)
    calls.clear()
    assert output("torch") == one
    assert not calls


def test_the_error_is_the_same_with_and_without_the_library(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_recipe(models, weight=1.0)
    errors = []
    for _ in range(2):
        with pytest.raises(NonFiniteError, match="large.weight: 231 of 231 values are") as caught:
            run_recipe(load_recipe(models / "mini.yaml"), models / "out", verify=False)
        errors.append((str(caught.value), caught.value.hint))
        monkeypatch.setattr(worker, "load_library", lambda: None)
    assert errors[0] == errors[1]


# Compiling and loading ---------------------------------------------------------------------------


@pytest.mark.parametrize("content", [None, b"", b"no library"])
def test_without_a_library_torch_is_used(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "_fused.so"
    if content is not None:
        path.write_bytes(content)
    assert load_library(path) is None


@needs_library
@needs_compiler
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("#define VERSION 2", "#define VERSION 1"),
        ("int fused_add_delta(", "int fused_add_other("),
    ],
)
def test_a_library_of_another_version_is_not_used(tmp_path: Path, old: str, new: str) -> None:
    assert load_library(changed_library(tmp_path, old, new)) is None


@needs_library
@needs_compiler
@pytest.mark.parametrize(
    ("old", "new"),
    [
        pytest.param("_MM_FROUND_TO_NEAREST_INT", "_MM_FROUND_TO_ZERO", marks=on_x86),
        pytest.param("vdupq_n_u32(0x7fff)", "vdupq_n_u32(0)", marks=on_arm),
        ("delta = multiply(delta, scale);", "delta = multiply(delta, limit);"),
        (
            "for (int64_t i = 0; i < count; i += STEP)",
            "for (int64_t i = 0; i < count - 16; i += STEP)",
        ),
        ("scaled(load_doubles(product + i), scale)", "scaled(scale, scale)"),
        ("scaled(sums[i], all->factor)", "scaled(sums[i], all_doubles(1))"),
        ("panels[i] = i < valid ? from[i] : 0.0", "panels[i] = from[0]"),
        ("case 5: low_rank_tile(&all, up, panels, row, column, 5)", "case 5: break"),
    ],
)
def test_a_library_that_rounds_otherwise_is_not_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, old: str, new: str
) -> None:
    path = changed_library(tmp_path, old, new)
    with caplog.at_level(logging.WARNING, "merge"):
        assert load_library(path) is None
    assert "merging with torch alone" in caplog.text


@needs_library
@needs_compiler
def test_a_fused_multiply_add_would_be_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = build_script()
    found = []
    for mode in ("off", "fast"):
        flags = tuple(flag.replace("=off", f"={mode}") for flag in build.FLAGS)
        assert f"-ffp-contract={mode}" in flags
        monkeypatch.setattr(build, "FLAGS", flags)
        (tmp_path / mode).mkdir()
        # Compilers fuse a product that is used once.
        path = changed_library(tmp_path / mode, "deltas = either(deltas, delta);", "")
        found.append(load_library(path) is not None)
        monkeypatch.undo()
    assert found == [True, False]


def build_script() -> ModuleType:
    """Return the hook that compiles; it needs the build backend."""
    pytest.importorskip("hatchling", reason="hatchling is not installed")
    return importlib.import_module("scripts.build_fused")


def test_without_the_build_backend_all_but_what_compiles_is_tested(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "hatchling", None)
    monkeypatch.delitem(sys.modules, "scripts.build_fused", raising=False)
    again = importlib.util.spec_from_file_location("again", __file__)
    assert again is not None
    assert again.loader is not None
    again.loader.exec_module(importlib.util.module_from_spec(again))
    with pytest.raises(pytest.skip.Exception, match="hatchling is not installed"):
        changed_library(tmp_path, "#define VERSION 2", "#define VERSION 1")


def changed_library(folder: Path, old: str, new: str) -> Path:
    """Compile the library with one piece of its source replaced."""
    found = []
    for name in (SOURCE.name, *HEADERS):
        text = SOURCE.with_name(name).read_text()
        found.append(old in text)
        (folder / name).write_text(text.replace(old, new, 1))
    assert any(found)
    library = folder / "changed.so"
    assert build_script().compile_library(folder / SOURCE.name, library)
    return library


def test_without_a_compiler_nothing_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = build_script()
    for compiler in ("/no/such/compiler", "false"):
        monkeypatch.setenv("CC", compiler)
        assert not build.compile_library(SOURCE, tmp_path / "library.so")
    assert list(tmp_path.iterdir()) == []
