"""A recipe's delta as a LoRA: the factors, the file, and what reads it."""

from __future__ import annotations

import errno
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from merge import build_plan, extract_lora, load_recipe, resolve_sources, run_recipe
from merge.errors import (
    EngineError,
    NonFiniteError,
    NoSpaceError,
    OutputError,
    OutputExistsError,
    PlanError,
    RecipeError,
)
from merge.extract.factor import Factors, factor_delta, residual, squared_norm
from merge.extract.model import ExtractResult
from merge.extract.report import extraction_to_json, render_extraction
from tests.mini import random_tensors, read_output, write_models, write_recipe, write_unet

RANK = 3
TIE = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"


def optimal_error(matrix: np.ndarray, rank: int) -> float:
    squares = np.linalg.svd(matrix.astype(np.float64), compute_uv=False) ** 2
    return float(np.sqrt(squares[rank:].sum() / squares.sum()))


def relative_error(matrix: torch.Tensor, found: Factors) -> float:
    return math.sqrt(residual(matrix, found.up, found.down) / squared_norm(matrix))


def spectrum(rows: int, columns: int, decay: float, seed: int) -> torch.Tensor:
    """Return a matrix whose singular values fall as a power of their number."""
    generator = torch.Generator().manual_seed(seed)
    size = min(rows, columns)
    left = torch.linalg.qr(torch.randn(rows, size, generator=generator).double()).Q
    right = torch.linalg.qr(torch.randn(columns, size, generator=generator).double()).Q
    values = torch.arange(1, size + 1, dtype=torch.float64) ** -decay
    return (left * values @ right.T).float()


# ------------------------------------------------------------------------------------ factors


@given(
    st.integers(1, 40), st.integers(1, 40), st.integers(1, 12), st.floats(0, 3), st.integers(0, 9)
)
@settings(max_examples=40)
def test_small_matrices_are_factored_optimally(
    rows: int, columns: int, rank: int, decay: float, seed: int
) -> None:
    matrix = spectrum(rows, columns, decay, seed)
    found = factor_delta(matrix, rank=rank)
    assert found.rank == min(rank, rows, columns)
    best = optimal_error(matrix.numpy(), rank)
    assert relative_error(matrix, found) <= best * 1.0001 + 1e-6
    error = np.linalg.norm(matrix.numpy() - found.up.numpy() @ found.down.numpy())
    assert relative_error(matrix, found) == pytest.approx(
        error / np.linalg.norm(matrix.numpy()), rel=1e-3, abs=1e-6
    )
    assert found.energy == pytest.approx(1 - best**2, abs=1e-6)


@pytest.mark.parametrize("decay", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("shape", [(400, 700), (700, 400)])
def test_the_sketch_is_within_one_percent_of_the_optimum(
    shape: tuple[int, int], decay: float
) -> None:
    matrix = spectrum(*shape, decay, 5)
    found = factor_delta(matrix, rank=24)
    best = optimal_error(matrix.numpy(), 24)
    assert best * (1 - 1e-5) <= relative_error(matrix, found) <= best * 1.01


@pytest.mark.parametrize("shape", [(40, 30), (500, 450)])
def test_a_low_rank_delta_comes_back(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(1)
    up, down = (torch.randn(*size, generator=generator) for size in ((shape[0], 5), (5, shape[1])))
    for target in ({"rank": 16}, {"energy": 1.0}):
        found = factor_delta(up @ down, **target)  # type: ignore[arg-type]
        assert found.rank == 5
        assert relative_error(up @ down, found) < 1e-5
        assert found.energy == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("energy", [0.1, 0.5, 0.9, 0.99, 1.0])
def test_an_energy_takes_the_smallest_rank(energy: float) -> None:
    matrix = spectrum(60, 90, 0.7, 2)
    found = factor_delta(matrix, energy=energy)
    squares = np.linalg.svd(matrix.double().numpy(), compute_uv=False) ** 2
    kept = np.cumsum(squares) / squares.sum()
    assert kept[found.rank - 1] >= energy - 1e-9
    assert found.rank == 1 or kept[found.rank - 2] < energy
    assert found.energy == pytest.approx(kept[found.rank - 1], abs=1e-9)


def test_the_limit_of_an_energy_is_told() -> None:
    matrix = spectrum(60, 90, 0.1, 2)
    found = factor_delta(matrix, energy=0.99, max_rank=4)
    assert (found.rank, found.is_capped) == (4, True)
    assert not factor_delta(matrix, energy=0.01, max_rank=4).is_capped


def test_both_factors_share_the_singular_values() -> None:
    found = factor_delta(spectrum(30, 50, 1.0, 3), rank=6)
    ups, downs = found.up.norm(dim=0), found.down.norm(dim=1)
    assert torch.allclose(ups, downs, rtol=1e-5)
    assert torch.allclose(ups**2, torch.arange(1, 7) ** -1.0, rtol=1e-5)


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ({}, "either a rank or an energy"),
        ({"rank": 4, "energy": 0.5}, "either a rank or an energy"),
        ({"rank": 0}, "rank 0 must be at least 1"),
        ({"rank": -2}, "rank -2"),
        ({"energy": 0.0}, "energy 0.0 must be above 0"),
        ({"energy": 1.5}, "energy 1.5"),
        ({"energy": float("nan")}, "energy nan"),
        ({"energy": 0.5, "max_rank": 0}, "max_rank 0"),
    ],
)
def test_targets_that_cannot_be(target: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        factor_delta(torch.ones(4, 4), **target)


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_a_delta_without_a_direction_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match="zero or not finite"):
        factor_delta(torch.full((4, 4), value), rank=1)


# ------------------------------------------------------------------------------------ the file


def write_low_rank(folder: Path) -> dict[str, torch.Tensor]:
    """Write float32 models whose deltas have rank 3; return the deltas of the weights."""
    models = {"base": random_tensors(1, dtype=torch.float32)}
    models["target"] = random_tensors(3, dtype=torch.float32, channels=8, like=models["base"])
    generator = torch.Generator().manual_seed(7)
    distilled, deltas = dict(models["base"]), {}
    for key, base in models["base"].items():
        if base.ndim < 2 or key == "conv_in.weight":
            continue
        rows, columns = len(base), base[0].numel()
        up = torch.randn(rows, RANK, generator=generator) * 0.1
        delta = (up @ torch.randn(RANK, columns, generator=generator)).view(base.shape)
        distilled[key] = base + delta
        deltas[key] = distilled[key].double() - base.double()
    models["distilled"] = distilled
    for name, tensors in models.items():
        write_unet(folder / name, tensors)
    write_recipe(folder)
    return deltas


def extract(folder: Path, *overrides: str, **options: Any) -> ExtractResult:
    options.setdefault("device", "cpu")
    recipe = load_recipe(folder / "mini.yaml", overrides)
    return extract_lora(recipe, folder / "out.safetensors", **options)


@pytest.mark.parametrize("form", ["kohya", "peft"])
def test_merging_the_lora_gives_what_the_recipe_gives(tmp_path: Path, form: str) -> None:
    deltas = write_low_rank(tmp_path)
    result = extract(tmp_path, "weight=0.5", rank=8, form=form, dtype="float32")
    assert {layer.key for layer in result.layers} == set(deltas)
    # Rounding of base + delta leaves noise of every rank, below 1e-6 of the delta.
    assert all(layer.relative_error < 1e-5 for layer in result.layers)
    recipe = {
        "name": "again",
        "models": {"target": "./target", "distilled": {"path": "./out.safetensors"}},
    }
    recipe["out_dtype"] = "float32"
    path = tmp_path / "again.yaml"
    path.write_text(yaml.safe_dump(recipe))
    plan = build_plan(load_recipe(path), resolve_sources(load_recipe(path)))
    assert plan.counts["lora"] == len(deltas)
    run_recipe(load_recipe(path), tmp_path / "merged", device="cpu", verify=False)
    merged = read_output(tmp_path / "merged")
    target = load_file(tmp_path / "target" / "diffusion_pytorch_model.safetensors")
    for key, values in merged.items():
        wanted = target[key].double() + 0.5 * deltas.get(key, torch.zeros(()))
        assert torch.allclose(values.double(), wanted, rtol=0, atol=3e-6), key


def test_the_file_holds_what_the_report_says(tmp_path: Path) -> None:
    models = write_models(tmp_path)
    write_recipe(tmp_path)
    result = extract(tmp_path, "weight=0.75", rank=6)
    tensors = load_file(result.path)
    assert result.size_bytes == result.path.stat().st_size
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    assert len(tensors) == 3 * len(result.layers)
    squared_lost = squared_all = 0.0
    for layer in result.layers:
        stem = "lora_unet_" + layer.key.removesuffix(".weight").replace(".", "_")
        up = tensors[f"{stem}.lora_up.weight"].double()
        down = tensors[f"{stem}.lora_down.weight"].double()
        shape = models["base"][layer.key].shape
        assert down.shape == (layer.rank, *shape[1:])
        assert up.shape == (shape[0], layer.rank, *(1 for _ in shape[2:]))
        alpha = float(tensors[f"{stem}.alpha"])
        assert alpha == 6
        delta = 0.75 * (models["distilled"][layer.key].double() - models["base"][layer.key])
        lost = delta.flatten(1) - alpha / layer.rank * (up.flatten(1) @ down.flatten(1))
        assert layer.relative_error == pytest.approx(float(lost.norm() / delta.norm()), rel=1e-3)
        assert layer.squared_norm == pytest.approx(float(delta.norm()) ** 2, rel=1e-5)
        squared_lost += float(lost.norm()) ** 2
        squared_all += float(delta.norm()) ** 2
    assert result.total.relative_error == pytest.approx((squared_lost / squared_all) ** 0.5, 1e-3)
    left = {item.key: item.reason for item in result.left_out}
    assert "no biases" in left["conv_in.bias"]
    assert "vector" in left["mid_block.resnets.0.norm1.weight"]
    tree = json.loads(json.dumps(extraction_to_json(result)))
    assert sum(item["share"] for item in tree["layers"] + tree["left_out"]) == pytest.approx(1)
    text = render_extraction(result, with_layers=True)
    assert "IN01" in text
    assert all(layer.key in text for layer in result.layers)


def test_a_narrow_conv_in_is_padded_with_zeros(tmp_path: Path) -> None:
    models = write_models(tmp_path)
    write_recipe(tmp_path)
    result = extract(tmp_path, "channel_rule=first", rank=8, dtype="float32")
    assert "conv_in.weight" in {layer.key for layer in result.layers}
    tensors = load_file(result.path)
    down = tensors["lora_unet_conv_in.lora_down.weight"]
    assert down.shape == (8, 8, 3, 3)
    product = (tensors["lora_unet_conv_in.lora_up.weight"].flatten(1) @ down.flatten(1)).view(
        8, 8, 3, 3
    )
    delta = models["distilled"]["conv_in.weight"].float() - models["base"]["conv_in.weight"].float()
    assert torch.allclose(product[:, :4], delta, atol=1e-6)
    assert not product[:, 4:].any()


def test_the_bytes_are_the_same_on_repeat(tmp_path: Path) -> None:
    write_models(tmp_path)
    write_recipe(tmp_path)
    first = extract(tmp_path, rank=4).path.read_bytes()
    threads = torch.get_num_threads()
    assert extract(tmp_path, rank=4, overwrite=True).path.read_bytes() == first
    assert torch.get_num_threads() == threads
    assert extract(tmp_path, rank=3, overwrite=True).path.read_bytes() != first


@pytest.mark.parametrize("form", ["kohya", "peft"])
def test_diffusers_loads_it(tiny_sd15: Path, tmp_path: Path, form: str) -> None:
    from diffusers import LCMScheduler, StableDiffusionInstructPix2PixPipeline

    tree = {
        "name": "tiny",
        "models": {role: str(tiny_sd15 / role) for role in ("base", "distilled", "target")},
        # A full LCM's; a bias is left out of a LoRA, and this is about the weights.
        "guidance_embedding": "drop",
        "weight": 0.5,
    }
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(tree))
    result = extract_lora(
        load_recipe(path),
        tmp_path / "out.safetensors",
        energy=1.0,
        form=form,
        dtype="float32",
        device="cpu",
    )
    # The target's own scheduler warns under numpy 2.
    scheduler = LCMScheduler.from_config(
        LCMScheduler.load_config(tiny_sd15 / "target", subfolder="scheduler")
    )
    pipeline = StableDiffusionInstructPix2PixPipeline.from_pretrained(
        tiny_sd15 / "target", dtype=torch.float32, safety_checker=None, scheduler=scheduler
    )
    before = {key: value.clone() for key, value in pipeline.unet.state_dict().items()}
    pipeline.load_lora_weights(str(result.path))
    pipeline.fuse_lora(components=["unet"])
    pipeline.unload_lora_weights()
    after = pipeline.unet.state_dict()
    base, distilled = (
        load_file(tiny_sd15 / role / "diffusion_pytorch_model.safetensors")
        for role in ("base", "distilled")
    )
    keys = {layer.key for layer in result.layers}
    for key in keys:
        delta = 0.5 * (distilled[key].float() - base[key].float())
        if delta.shape == before[key].shape:
            assert delta.abs().max() > 1e-4
            assert torch.allclose(after[key] - before[key], delta, atol=2e-6), key
    for key in before.keys() - keys:
        assert torch.equal(after[key], before[key]), key


# ------------------------------------------------------------------------------------ failures


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"rank": 0}, ValueError, "rank 0"),
        ({"energy": 0.0}, ValueError, "energy 0.0"),
        ({"energy": 1.01}, ValueError, "energy 1.01"),
        ({"rank": 4, "energy": 0.9}, ValueError, "either a rank or an energy"),
        ({"form": "lycoris"}, ValueError, "kohya, peft"),
        ({"dtype": "int8"}, ValueError, "float16, bfloat16, float32"),
    ],
)
def test_wrong_options(
    tmp_path: Path, options: dict[str, Any], error: type[Exception], words: str
) -> None:
    write_models(tmp_path)
    write_recipe(tmp_path)
    with pytest.raises(error, match=words):
        extract(tmp_path, **options)
    assert not list(tmp_path.glob("out*"))


def test_other_methods_are_refused(tmp_path: Path) -> None:
    write_models(tmp_path)
    write_recipe(tmp_path)
    with pytest.raises(RecipeError, match="method ties has no delta of its own"):
        extract(tmp_path, "method=ties")


def test_a_weight_of_zero_is_refused(tmp_path: Path) -> None:
    write_models(tmp_path)
    write_recipe(tmp_path)
    with pytest.raises(PlanError, match="every weight is 0"):
        extract(tmp_path, "weight=0")
    with pytest.raises((PlanError, EngineError), match="nothing to extract"):
        extract(tmp_path, "weight=0", "allow_noop=true")
    assert not list(tmp_path.glob("out*"))


def test_equal_models_are_refused(tmp_path: Path) -> None:
    models = write_models(tmp_path)
    write_unet(tmp_path / "distilled", models["base"])
    write_recipe(tmp_path)
    with pytest.raises(EngineError, match="nothing to extract"):
        extract(tmp_path)
    assert not list(tmp_path.glob("out*"))


def test_a_delta_that_is_not_finite_leaves_nothing(tmp_path: Path) -> None:
    models = write_models(tmp_path)
    models["distilled"][TIE][1, 2] = float("nan")
    write_unet(tmp_path / "distilled", models["distilled"])
    write_recipe(tmp_path)
    with pytest.raises(NonFiniteError, match="attn2.to_k"):
        extract(tmp_path)
    assert not list(tmp_path.glob("out*"))


def test_an_output_that_exists_is_kept(tmp_path: Path) -> None:
    write_models(tmp_path)
    write_recipe(tmp_path)
    (tmp_path / "out.safetensors").write_bytes(b"mine")
    with pytest.raises(OutputExistsError, match="exists already"):
        extract(tmp_path)
    assert (tmp_path / "out.safetensors").read_bytes() == b"mine"


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_models(tmp_path)
    write_recipe(tmp_path)

    class Full:
        def __init__(self, **_: object) -> None: ...

        def __enter__(self) -> Full:
            return self

        def __exit__(self, *_: object) -> None: ...

        def seek(self, *_: object) -> int:
            return 0

        def write(self, data: object) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("merge.extract.extraction.tempfile.TemporaryFile", Full)
    with pytest.raises(NoSpaceError, match="No space left"):
        extract(tmp_path)
    assert not list(tmp_path.glob("out*"))


def test_the_name_must_say_what_it_is(tmp_path: Path) -> None:
    write_models(tmp_path)
    recipe = load_recipe(write_recipe(tmp_path))
    with pytest.raises(OutputError, match=r"ends in \.safetensors"):
        extract_lora(recipe, tmp_path / "lora.ckpt")


def test_an_input_is_never_overwritten(tmp_path: Path) -> None:
    write_models(tmp_path)
    recipe = load_recipe(write_recipe(tmp_path))
    source = tmp_path / "base" / "diffusion_pytorch_model.safetensors"
    before = source.read_bytes()
    with pytest.raises(OutputError, match="is, holds or lies in the input"):
        extract_lora(recipe, source, overwrite=True)
    assert source.read_bytes() == before


# -------------------------------------------------------------------------------- command line


def run(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "merge", "extract-lora", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_command(tmp_path: Path) -> None:
    write_models(tmp_path)
    recipe, out = str(write_recipe(tmp_path)), str(tmp_path / "new" / "out.safetensors")
    words = ("--energy", "0.9", "--form", "peft", "--device", "cpu")
    shown = run(recipe, out, "weight=0.5", *words)
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.splitlines()[-1] == out
    assert "IN01" in shown.stdout
    again = run(recipe, out, "weight=0.5", *words, "--overwrite", "--json")
    tree = json.loads(again.stdout)
    assert tree["path"] == out
    assert all(layer["energy"] >= 0.9 for layer in tree["layers"])
    both = run(recipe, out, "--rank", "4", "--energy", "0.9")
    assert both.returncode == 2
    assert "either --rank or --energy" in both.stderr


def test_the_hint_of_a_failed_write_fits_a_command_without_out(tmp_path: Path) -> None:
    write_models(tmp_path)
    (tmp_path / "file").write_text("mine")
    shown = run(str(write_recipe(tmp_path)), str(tmp_path / "file" / "out.safetensors"))
    assert shown.returncode == 8, shown.stderr
    assert shown.stderr.endswith("hint: choose another place for the output\n")
