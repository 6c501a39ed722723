"""Recipes with every method, through the whole run: the bytes of the pure function on numpy."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from merge import load_recipe, run_recipe
from merge.engine import execute
from merge.errors import NonFiniteError, PlanError, RecipeError
from merge.methods.table import METHODS
from merge.plan.render import plan_to_json, render_plan
from tests.methods.test_methods_combine import combine
from tests.mini import (
    bits,
    numpy_float32,
    numpy_round,
    plan_of,
    random_tensors,
    read_output,
    write_models,
    write_recipe,
    write_unet,
)

BIG = "mid_block.attentions.0.proj_out.weight"
TO_K = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"
COMBINED = [name for name, method in METHODS.items() if not method.is_sum]
WHOLE = [name for name, method in METHODS.items() if method.is_whole]
PARAMS: dict[str, dict[str, Any]] = {
    "ties": {"density": 0.3},
    "dare": {"density": 0.6, "seed": 11},
    "dare_ties": {"density": 0.6, "seed": 11, "normalize": True},
    "slerp": {"t": 0.3},
    "train_difference": {},
    "capped_difference": {"cap": 0.02},
}
# As in plans: the recipe's weight times the model's own.
WEIGHT, OWN = 0.8, {"one": 1.0, "two": 0.5}
Models = dict[str, dict[str, torch.Tensor]]


def write_two(folder: Path, *, big: tuple[int, ...] | None = None) -> Models:
    """Write base, two distilled models and a target, perhaps with a tensor of many blocks."""
    models = write_models(folder)
    models["one"] = models.pop("distilled")
    models["two"] = random_tensors(5, like=models["base"])
    for seed, (role, tensors) in enumerate(models.items()):
        if big is not None:
            generator = torch.Generator().manual_seed(seed)
            tensors[BIG] = (torch.randn(big, generator=generator) * 0.1).half()
        write_unet(folder / role, tensors)
    return models


def write_two_recipe(folder: Path, method: str, **changes: Any) -> None:
    distilled = [{"path": f"./{name}", "weight": own} for name, own in OWN.items()]
    tree: dict[str, Any] = {
        "method": method,
        "params": PARAMS.get(method, {}),
        "weight": WEIGHT,
        "out_dtype": "float32",
        "models": {"base": "./base", "distilled": distilled, "target": "./target"},
    }
    write_recipe(folder, **{**tree, **changes})


def merge(folder: Path, *overrides: str, **options: Any) -> dict[str, torch.Tensor]:
    recipe = load_recipe(folder / "mini.yaml", overrides)
    result = run_recipe(recipe, folder / "out", overwrite=True, verify=False, **options)
    return read_output(result.folder)


def expected(models: Models, key: str, method: str, weight: float = WEIGHT) -> np.ndarray:
    """Merge one tensor with the pure function on numpy, in one block."""
    target, base, *distilled = (
        numpy_float32(models[role][key]) for role in ("target", "base", "one", "two")
    )
    shape = target.shape
    columns = slice(None)
    if base.shape != shape:  # channel_rule first: the channels that both have
        columns = slice(base[0].size)
    flat = target.reshape(shape[0], -1).copy()
    rows = [(one.reshape(shape[0], -1), base.reshape(shape[0], -1)) for one in distilled]
    view = np.ascontiguousarray(flat[:, columns])
    weights = [weight * own for own in OWN.values()]
    flat[:, columns] = combine(method, view, rows, weights, PARAMS[method], key=key)
    return flat.reshape(shape)


def assert_is(tensor: torch.Tensor, values: np.ndarray, key: str) -> None:
    np.testing.assert_array_equal(bits(tensor), np.ascontiguousarray(values).view(np.uint32), key)


@pytest.mark.parametrize("method", COMBINED)
def test_a_merge_is_the_pure_function_on_numpy(tmp_path: Path, method: str) -> None:
    models = write_two(tmp_path, big=(701, 1201))
    write_two_recipe(tmp_path, method, channel_rule="first")
    one = merge(tmp_path, threads=1)
    digests = [digest(tmp_path)]
    for key, tensor in one.items():
        values = expected(models, key, method)
        assert_is(tensor, values, key)
        assert not np.array_equal(values, numpy_float32(models["target"][key])), key
    merge(tmp_path, threads=2)
    digests.append(digest(tmp_path))
    assert len(set(digests)) == 1


@pytest.mark.parametrize("method", COMBINED)
def test_the_size_of_blocks_does_not_matter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    write_two(tmp_path)
    write_two_recipe(tmp_path, method, channel_rule="first", out_dtype="float16")
    plain = merge(tmp_path)
    before = digest(tmp_path)
    monkeypatch.setattr(execute, "CPU_BLOCK_ELEMENTS", 48)
    small = merge(tmp_path)
    assert digest(tmp_path) == before
    assert plain.keys() == small.keys()


def digest(folder: Path) -> str:
    [file] = (folder / "out" / "unet").glob("*.safetensors")
    return hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.mark.parametrize("method", COMBINED)
def test_block_weights_reach_the_method(tmp_path: Path, method: str) -> None:
    models = write_two(tmp_path)
    write_two_recipe(
        tmp_path, method, block_weights={"conv_out.*": 0.25, TO_K: 0.0}, exclude=["mid_block.*"]
    )
    for key, tensor in merge(tmp_path).items():
        if key in ("conv_in.weight", TO_K) or key.startswith("mid_block"):
            assert_is(tensor, numpy_float32(models["target"][key]), key)
        else:
            weight = 0.25 if key.startswith("conv_out") else WEIGHT
            assert_is(tensor, expected(models, key, method, weight), key)


@pytest.mark.parametrize("method", COMBINED)
def test_the_result_is_rounded_once(tmp_path: Path, method: str) -> None:
    models = write_two(tmp_path)
    write_two_recipe(tmp_path, method, out_dtype="bfloat16")
    merged = merge(tmp_path)
    rounded = numpy_round(expected(models, TO_K, method), torch.bfloat16)
    np.testing.assert_array_equal(bits(merged[TO_K]), rounded)


# LoRAs ----------------------------------------------------------------------------------------


def write_lora(path: Path, models: Models, keys: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Write a rank-1 LoRA; return its deltas in float32, exact since rank 1 is one product."""
    generator = torch.Generator().manual_seed(7)
    tensors, deltas = {}, {}
    for key in keys:
        shape = models["target"][key].shape
        down = (torch.randn(1, *shape[1:], generator=generator) * 0.3).half()
        up = (torch.randn(shape[0], 1, *(1 for _ in shape[2:]), generator=generator) * 0.3).half()
        stem = "lora_unet_" + key.removesuffix(".weight").replace(".", "_")
        tensors[f"{stem}.lora_down.weight"] = down
        tensors[f"{stem}.lora_up.weight"] = up
        tensors[f"{stem}.alpha"] = torch.tensor(2.0)
        product = numpy_float32(up).astype(np.float64).reshape(-1, 1) @ (
            numpy_float32(down).astype(np.float64).reshape(1, -1)
        )
        deltas[key] = (2.0 * product).astype(np.float32)
    save_file(tensors, path)
    return deltas


@pytest.mark.parametrize("method", [name for name in COMBINED if name != "train_difference"])
def test_loras_are_deltas_like_others(tmp_path: Path, method: str) -> None:
    models = write_two(tmp_path, big=(901, 601))
    lora = write_lora(tmp_path / "lora.safetensors", models, (TO_K, BIG, "conv_out.weight"))
    distilled = [{"path": "./lora.safetensors", "weight": 0.5}, {"path": "./one"}]
    write_two_recipe(
        tmp_path,
        method,
        models={"base": "./base", "distilled": distilled, "target": "./target"},
    )
    merged = merge(tmp_path, threads=2)
    for key, delta in lora.items():
        target = numpy_float32(models["target"][key])
        base, one = (numpy_float32(models[role][key]) for role in ("base", "one"))
        # In the recipe's order, the LoRA first: it decides the place in the random masks.
        pairs = [(delta.reshape(target.shape), np.zeros_like(target)), (one, base)]
        weights = [WEIGHT * 0.5, WEIGHT]
        values = combine(method, target, pairs, weights, PARAMS[method], key=key)
        assert_is(merged[key], values, key)


def test_train_difference_refuses_loras(tmp_path: Path) -> None:
    models = write_two(tmp_path)
    write_lora(tmp_path / "lora.safetensors", models, (TO_K,))
    write_two_recipe(
        tmp_path,
        "train_difference",
        models={"distilled": "./lora.safetensors", "target": "./target"},
    )
    with pytest.raises(PlanError, match="train_difference needs whole models, and distilled is a"):
        plan_of(tmp_path)


# Plans ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", list(METHODS))
def test_a_plan_says_what_needs_whole_tensors(tmp_path: Path, method: str) -> None:
    write_two(tmp_path)
    write_two_recipe(tmp_path, method)
    plan = plan_of(tmp_path)
    text = render_plan(plan, 0)
    assert METHODS[method].formula in text
    assert ("whole tensor" in text) == (method in WHOLE)
    rows = plan_to_json(plan, 0)["tensors"]
    deltas = [row for row in rows if row["action"] == "delta"]
    assert deltas
    for row in deltas:
        assert ("needs the whole tensor at once" in row["reason"]) == (method in WHOLE)
    assert {row.is_whole for row in plan.tensors if row.deltas} == {method in WHOLE}


def test_defaults_are_part_of_the_plan(tmp_path: Path) -> None:
    write_two(tmp_path)
    write_two_recipe(tmp_path, "dare", params={"density": 1})
    assert plan_of(tmp_path).params == {"density": 1.0, "seed": 0}


# Bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "params", "message"),
    [
        ("dare", {"density": 0}, r"params\.density: 0 is not within 1e-06 to 1"),
        ("ties", {"density": 0}, r"params\.density: 0 is not within 0 \(not 0 itself\) to 1"),
        ("dare_ties", {"density": 0.0}, r"params\.density: 0\.0 is not within"),
        ("ties", {"densitty": 0.5}, r"did you mean 'density'\?"),
        ("slerp", {"t": 2}, r"params\.t: 2 is not within 0 to 1"),
        ("dare", {"seed": "x"}, r"params\.seed: 'x' is not a whole number"),
    ],
)
def test_recipes_with_bad_parameters_are_refused(
    tmp_path: Path, method: str, params: dict[str, Any], message: str
) -> None:
    write_two_recipe(tmp_path, method, params=params)
    with pytest.raises(RecipeError, match=message):
        load_recipe(tmp_path / "mini.yaml")


def test_parameters_can_be_overridden(tmp_path: Path) -> None:
    write_two_recipe(tmp_path, "dare")
    recipe = load_recipe(tmp_path / "mini.yaml", ["params.density=0.25", "params.seed=3"])
    assert METHODS["dare"].fill(recipe.params) == {"density": 0.25, "seed": 3}


@pytest.mark.parametrize("method", COMBINED)
@pytest.mark.parametrize("role", ["one", "base", "target"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_found_though_a_method_drops_it(
    tmp_path: Path, method: str, role: str, value: float
) -> None:
    models = write_two(tmp_path)
    models[role][TO_K].view(-1)[:40] = value
    write_unet(tmp_path / role, models[role])
    write_two_recipe(tmp_path, method)
    where = re.escape("distilled[0]" if role == "one" else role)
    message = rf"to_k\.weight: 40 of 96 values are NaN or infinite in {where} "
    with pytest.raises(NonFiniteError, match=message):
        merge(tmp_path)
    assert not (tmp_path / "out").exists()
