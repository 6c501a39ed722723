"""Numbers that lie: every value and every odd tensor gives what the rule says, or an error.

The rule, written out in numpy: three float32 operations, each rounded once, then one rounding to
the output's dtype. No broadcasting, nothing dropped, integers as bytes.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from merge import load_recipe, run_recipe
from merge.errors import MergeError, NonFiniteError, PlanError
from tests.mini import (
    Tensors,
    bits,
    numpy_float32,
    numpy_round,
    random_tensors,
    read_output,
    write_recipe,
    write_unet,
)

KEY = "mid_block.values.weight"
ROLES = ("base", "distilled", "target")
WORDS = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32"}


def write(folder: Path, **values: torch.Tensor | None) -> None:
    """Write models that agree but for one tensor, given by role."""
    for role in ROLES:
        tensors = random_tensors(1 + (role == "distilled"), channels=8 if role == "target" else 4)
        if values.get(role) is not None:
            tensors[KEY] = values[role]
        write_unet(folder / role, tensors)
    write_recipe(folder)


def merge(folder: Path, *overrides: str) -> Tensors:
    out = folder / f"out-{len(list(folder.iterdir()))}"
    run_recipe(load_recipe(folder / "mini.yaml", overrides), out, verify=False)
    return read_output(out)


def formula(values: dict[str, torch.Tensor], weight: float) -> np.ndarray:
    wide = {role: numpy_float32(tensor) for role, tensor in values.items()}
    delta = wide["distilled"] - wide["base"]
    return wide["target"] + delta * np.float32(weight)


def all_patterns(dtype: torch.dtype) -> torch.Tensor:
    """Return every finite value of a 16-bit dtype, subnormals and both zeros too."""
    patterns = np.arange(65536, dtype=np.uint16)
    values = torch.from_numpy(patterns.astype(np.int32)).to(torch.uint16).view(dtype)
    return values[torch.isfinite(values.float())].clone()


# Every value -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("role", ROLES)
def test_every_16_bit_value_in_every_role(tmp_path: Path, role: str, dtype: torch.dtype) -> None:
    values = {name: torch.full((len(all_patterns(dtype)),), 0.25, dtype=dtype) for name in ROLES}
    values["distilled"][::3] = 0.251
    values[role] = all_patterns(dtype)
    write(tmp_path, **values)
    expected = formula(values, 0.7)
    for out in (torch.bfloat16, torch.float32):
        if out == torch.bfloat16 and dtype == torch.bfloat16:
            # Its largest values are beyond what the sum can hold.
            expected = np.where(np.abs(expected) > 3.3e38, 0, expected)
        found = merge(tmp_path, "weight=0.7", f"out_dtype={WORDS[out]}", "on_overflow=clamp")[KEY]
        held = np.abs(formula(values, 0.7)) < 3.3e38
        np.testing.assert_array_equal(bits(found)[held], numpy_round(expected, out)[held])


@pytest.mark.parametrize("weight", [1.0, 0.5, -1.0, 1e-30, 1e-45, 3.0000001, 0.1])
def test_zeros_and_subnormals_keep_their_signs_as_the_formula_says(
    tmp_path: Path, weight: float
) -> None:
    tiny = [0.0, -0.0, 1e-45, -1e-45, 1.1754942e-38, -1.1754942e-38, 1.1754944e-38, 1.0, -1.0]
    grid = np.array(np.meshgrid(tiny, tiny, tiny), dtype=np.float32).reshape(3, -1)
    values = {role: torch.from_numpy(row.copy()) for role, row in zip(ROLES, grid, strict=True)}
    write(tmp_path, **values)
    found = merge(tmp_path, f"weight={weight}", "out_dtype=float32")[KEY]
    np.testing.assert_array_equal(bits(found), formula(values, weight).view(np.uint32))


def test_the_borders_of_float16(tmp_path: Path) -> None:
    # 65519.996 is the last float32 that rounds to 65504; halfway cases go to even.
    border = [65503.0, 65504.0, 65519.0, 65519.996, -65519.996, 2049.0, 2051.0, 1.00048828125]
    border += [5.9604645e-08, 2.9802322e-08, 2.9802326e-08, -2.9802322e-08, 6.1035156e-05]
    target = torch.tensor(border)
    zero = torch.zeros_like(target)
    zero_but_one = zero.clone()
    zero_but_one[5] = 1e-30
    values = {"base": zero, "distilled": zero_but_one, "target": target}
    write(tmp_path, **values)
    found = merge(tmp_path)[KEY]
    with np.errstate(over="ignore"):
        expected = numpy_round(formula(values, 1.0), torch.float16)
    np.testing.assert_array_equal(bits(found), expected)
    assert found.tolist()[:5] == [65504.0, 65504.0, 65504.0, 65504.0, -65504.0]


@pytest.mark.parametrize(
    ("out", "largest", "over"),
    [
        ("float16", 65504.0, 65520.0),
        ("bfloat16", 3.3895313892515355e38, 3.3961775292304957e38),
        ("float32", 3.4028234663852886e38, 3.4028234663852886e38),
    ],
)
def test_a_sum_beyond_the_dtype_is_an_error_or_the_largest_value(
    tmp_path: Path, out: str, largest: float, over: float
) -> None:
    full = torch.zeros(300)
    full[[7, 9]] = torch.tensor([over, -over])
    values = {"base": torch.zeros(300), "distilled": full, "target": full}
    write(tmp_path, **values)
    overrides = ["weight=1", f"out_dtype={out}"]
    message = rf"{KEY}: 2 of 300 values are too large for {out}"
    with pytest.raises(NonFiniteError, match=message):
        merge(tmp_path, *overrides)
    assert [path.name for path in tmp_path.glob("out*")] == []
    found = merge(tmp_path, *overrides, "on_overflow=clamp")[KEY]
    assert found[[7, 9]].tolist() == [largest, -largest]
    assert found[8] == 0
    if out == "float32":
        kept = merge(tmp_path, *overrides, "on_overflow=keep_target")[KEY]
        assert torch.equal(kept, full)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("rule", ["error", "clamp", "keep_target"])
def test_what_is_not_finite_is_an_error_under_every_rule(
    tmp_path: Path, value: float, role: str, rule: str
) -> None:
    values = {name: torch.full((40,), 0.1 * index).half() for index, name in enumerate(ROLES)}
    values[role][[3, 39]] = value
    write(tmp_path, **values)
    with pytest.raises(NonFiniteError, match=rf"{KEY}: 2 of 40 .* in {role} \("):
        merge(tmp_path, f"on_overflow={rule}")


def test_a_signalling_nan_in_what_is_only_copied_is_an_error(tmp_path: Path) -> None:
    patterns = np.full(20, 0x3C00, dtype=np.uint16)
    patterns[4] = 0x7C01
    write(tmp_path, target=torch.from_numpy(patterns.view(np.float16).copy()))
    with pytest.raises(NonFiniteError, match=rf"{KEY}: 1 of 20"):
        merge(tmp_path, f"exclude=[{KEY}]")


# Odd tensors -------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (0,), (0, 4), (4, 0, 3), (1, 0)], ids=str)
@pytest.mark.parametrize("dtype", WORDS, ids=str)
def test_scalars_and_empty_tensors_follow_the_formula(
    tmp_path: Path, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    values = {
        role: torch.full(shape, value, dtype=dtype)
        for role, value in zip(ROLES, (0.1, 0.35, -0.0), strict=True)
    }
    write(tmp_path, **values)
    for out in WORDS:
        found = merge(tmp_path, "weight=0.3", f"out_dtype={WORDS[out]}")[KEY]
        assert found.shape == shape
        expected = np.atleast_1d(np.asarray(formula(values, 0.3), dtype=np.float32))
        np.testing.assert_array_equal(bits(found.reshape(-1)), numpy_round(expected.ravel(), out))


@pytest.mark.parametrize(
    ("target", "other"),
    [
        ((8,), (1,)),
        ((1,), (8,)),
        ((8,), ()),
        ((), (1,)),
        ((1,), ()),
        ((1, 8), (8,)),
        ((8, 1), (1, 8)),
        ((8, 4), (4, 8)),
        ((8, 8, 1, 1), (8, 8)),
        ((8, 4), (8, 1)),
        ((0, 4), (0, 5)),
        ((0,), (1,)),
        ((2, 3, 4), (6, 4)),
    ],
)
@pytest.mark.parametrize("role", ["base", "distilled", "both"])
def test_shapes_that_could_be_stretched_never_are(
    tmp_path: Path, target: tuple[int, ...], other: tuple[int, ...], role: str
) -> None:
    shapes = {"base": target, "distilled": target, "target": target}
    shapes |= dict.fromkeys(("base", "distilled") if role == "both" else (role,), other)
    write(tmp_path, **{name: torch.full(shape, 0.5).half() for name, shape in shapes.items()})
    with pytest.raises(PlanError, match=rf"{KEY}: .*\["):
        merge(tmp_path)


@pytest.mark.parametrize(
    "dtype",
    [
        *(torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16),
        *(torch.uint32, torch.uint64, torch.bool),
    ],
    ids=str,
)
def test_integers_are_the_targets_bytes(tmp_path: Path, dtype: torch.dtype) -> None:
    raw = torch.arange(64, dtype=torch.uint8)
    values = (raw % 2).to(torch.bool) if dtype == torch.bool else raw.view(dtype)
    other = torch.zeros(len(values), dtype=torch.uint8).to(dtype)
    write(tmp_path, base=values, distilled=other, target=values)
    found = merge(tmp_path, "out_dtype=float32")[KEY]
    assert found.dtype == dtype
    np.testing.assert_array_equal(found.view(torch.uint8).numpy(), values.view(torch.uint8).numpy())


@pytest.mark.parametrize(
    ("code", "dtype"),
    [
        ("F8_E8M0", torch.float8_e8m0fnu),
        ("F64", torch.float64),
        ("C64", torch.complex64),
    ],
)
@pytest.mark.parametrize("role", ROLES)
def test_dtypes_that_are_not_merged_are_refused(
    tmp_path: Path, role: str, code: str, dtype: torch.dtype
) -> None:
    values = {name: torch.ones(8).half() for name in ROLES}
    values[role] = torch.ones(8).to(dtype)
    write(tmp_path, **values)
    with pytest.raises(PlanError, match=rf"(?s){KEY}.*{code}"):
        merge(tmp_path)


@pytest.mark.parametrize("role", ["base", "distilled"])
def test_integers_against_floats_are_refused(tmp_path: Path, role: str) -> None:
    values = {name: torch.ones(8).half() for name in ROLES}
    values[role] = torch.ones(8, dtype=torch.int64)
    write(tmp_path, **values)
    with pytest.raises(PlanError, match=rf"(?s){KEY}.*I64"):
        merge(tmp_path)


@pytest.mark.parametrize(
    "weight",
    ["nan", ".nan", "inf", "-.inf", "1e39", "1e999", "0,7", "on", "0x10", "12:30", "1_0", "", "[]"],
)
def test_weights_that_are_no_plain_number_are_refused(tmp_path: Path, weight: str) -> None:
    write(tmp_path)
    with pytest.raises(MergeError, match="weight") as caught:
        merge(tmp_path, f"weight={weight}")
    assert caught.value.exit_code == 3


def test_a_weight_that_makes_the_delta_overflow_is_told(tmp_path: Path) -> None:
    write(tmp_path, base=torch.zeros(8), distilled=torch.full((8,), 2.0), target=torch.ones(8))
    with pytest.raises(NonFiniteError, match="too large for float32"):
        merge(tmp_path, "weight=3e38", "out_dtype=float32")
