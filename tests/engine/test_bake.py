"""The guidance embedding of a full LCM, folded into a bias."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from merge import load_recipe, run_recipe
from merge.engine.bake import bake_bias, guidance_embedding
from merge.errors import PlanError
from merge.plan.render import plan_to_json, render_plan
from tests.mini import (
    bits,
    numpy_float32,
    numpy_round,
    plan_of,
    read_output,
    write_models,
    write_recipe,
    write_unet,
)

LINEAR = "time_embedding.linear_1.weight"
BIAS = "time_embedding.linear_1.bias"
COND = "time_embedding.cond_proj.weight"


def live_embedding(guidance_scale: float, size: int) -> torch.Tensor:
    """The published formula, in float64 throughout."""
    half = size // 2
    frequencies = torch.exp(
        torch.arange(half, dtype=torch.float64) * -(math.log(10000.0) / (half - 1))
    )
    angles = torch.tensor((guidance_scale - 1) * 1000.0, dtype=torch.float64) * frequencies
    parts = [torch.sin(angles), torch.cos(angles), *([torch.zeros(1)] * (size % 2))]
    return torch.cat(parts)


@settings(max_examples=50, deadline=None)
@given(guidance=st.floats(1, 15), size=st.integers(4, 257), seed=st.integers(0, 2**16))
def test_the_bias_equals_the_live_path_in_float64(guidance: float, size: int, seed: int) -> None:
    from diffusers.models.embeddings import TimestepEmbedding

    torch.manual_seed(seed)
    live = TimestepEmbedding(32, 64, cond_proj_dim=size).double()
    baked = TimestepEmbedding(32, 64).double()
    baked.load_state_dict({k: v for k, v in live.state_dict().items() if k != "cond_proj.weight"})
    embedding = torch.tensor(guidance_embedding(guidance, size), dtype=torch.float64)
    with torch.no_grad():
        baked.linear_1.bias += bake_bias(
            live.linear_1.weight, live.cond_proj.weight, embedding, 1.0
        )
        sample = torch.randn(5, 32, dtype=torch.float64)
        with_condition = live(sample, live_embedding(guidance, size).expand(5, -1))
        assert float((baked(sample) - with_condition).abs().max()) < 1e-12


def test_the_embedding_is_the_pipelines() -> None:
    from diffusers import LatentConsistencyModelPipeline

    stock = LatentConsistencyModelPipeline.get_guidance_scale_embedding
    for guidance in (1.0, 2.5, 8.0):
        theirs = stock(None, torch.tensor([guidance - 1.0]), embedding_dim=256)
        ours = torch.tensor(guidance_embedding(guidance, 256))
        # Theirs has angles of thousands in float32.
        torch.testing.assert_close(ours, theirs[0], atol=2e-3, rtol=0)


def test_numpy_and_torch_agree_and_the_weight_scales() -> None:
    rng = np.random.default_rng(0)
    linear, cond = rng.normal(size=(6, 4)), rng.normal(size=(4, 10))
    embedding = np.array(guidance_embedding(3.0, 10))
    whole = bake_bias(linear, cond, embedding, 1.0)
    np.testing.assert_allclose(whole, linear @ cond @ embedding, rtol=1e-12)
    np.testing.assert_allclose(bake_bias(linear, cond, embedding, 0.5), whole / 2, rtol=1e-12)
    parts = [torch.from_numpy(array) for array in (linear, cond, embedding)]
    np.testing.assert_allclose(bake_bias(*parts, 1.0).numpy(), whole, rtol=1e-12)


# Through a recipe --------------------------------------------------------------------------------


@pytest.fixture
def models(tmp_path: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Mini models with the layer's bias; the distilled one is a full LCM."""
    found = write_models(tmp_path)
    generator = torch.Generator().manual_seed(9)
    for role, tensors in found.items():
        tensors[BIAS] = (torch.randn(16, generator=generator) * 0.1).half()
        if role == "distilled":
            tensors[COND] = (torch.randn(8, 12, generator=generator) * 0.1).half()
        write_unet(tmp_path / role, tensors)
    return found


def merged_layer(models: dict[str, dict[str, torch.Tensor]], key: str, weight: float) -> np.ndarray:
    target, distilled, base = (
        numpy_float32(models[role][key]) for role in ("target", "distilled", "base")
    )
    delta = (distilled - base) * np.float32(weight)
    return target + delta


@pytest.mark.parametrize("out", ["float16", "float32"])
def test_a_recipe_bakes_with_the_merged_weight(
    tmp_path: Path, models: dict[str, dict[str, torch.Tensor]], out: str
) -> None:
    write_recipe(tmp_path, weight=0.5, guidance_embedding="bake", bake_guidance=3.5, out_dtype=out)
    run_recipe(load_recipe(tmp_path / "mini.yaml"), tmp_path / "out", verify=False)
    merged = read_output(tmp_path / "out")
    assert COND not in merged
    dtype = getattr(torch, out)
    linear = numpy_round(merged_layer(models, LINEAR, 0.5), dtype)
    np.testing.assert_array_equal(bits(merged[LINEAR]), linear)
    # The network runs with the rounded weight, so that is the one that the bias is made for.
    rounded = merged[LINEAR].double().numpy()
    cond = models["distilled"][COND].double().numpy()
    gain = rounded @ (0.5 * (cond @ np.array(guidance_embedding(3.5, 12))))
    expected = merged_layer(models, BIAS, 0.5) + gain.astype(np.float32)
    np.testing.assert_array_equal(bits(merged[BIAS]), numpy_round(expected, dtype))
    dropped = tmp_path / "dropped"
    write_recipe(tmp_path, weight=0.5, out_dtype=out)
    run_recipe(load_recipe(tmp_path / "mini.yaml"), dropped, verify=False)
    others = read_output(dropped)
    assert not torch.equal(others.pop(BIAS), merged[BIAS])
    assert all(torch.equal(tensor, merged[key]) for key, tensor in others.items())


@pytest.mark.usefixtures("models")
def test_the_plan_shows_it_as_an_action_with_several_inputs(tmp_path: Path) -> None:
    write_recipe(tmp_path, guidance_embedding="bake", bake_guidance=8)
    plan = plan_of(tmp_path)
    assert plan.counts["bake"] == 1
    tree = plan_to_json(plan, 0)
    (row,) = [row for row in tree["tensors"] if row["action"] == "bake"]
    assert row["key"] == BIAS
    assert row["sources"] == ["target", "base", "distilled", "distilled"]
    assert row["reason"] == "guidance scale 8 baked in"
    assert not tree["left_out"] or all(item["key"] != COND for item in tree["left_out"])
    assert f"bake   {BIAS}: guidance scale 8 baked in" in render_plan(plan, 0)


@pytest.mark.usefixtures("models")
def test_every_way_not_to_bake_is_said(tmp_path: Path) -> None:
    bake = {"guidance_embedding": "bake", "bake_guidance": 8}
    write_recipe(tmp_path, **bake, exclude=[COND])
    (left,) = [item for item in plan_of(tmp_path).left_out if item.key == COND]
    assert left.reason == f"excluded by {COND!r}"
    write_recipe(tmp_path, **bake, block_weights={COND: 0})
    (left,) = [item for item in plan_of(tmp_path).left_out if item.key == COND]
    assert left.reason == "its weight is 0"
    write_recipe(tmp_path, guidance_embedding="drop")
    (left,) = [item for item in plan_of(tmp_path).left_out if item.key == COND]
    assert "never feeds it" in left.reason
    write_recipe(tmp_path, guidance_embedding="error")
    with pytest.raises(PlanError, match=f"{COND}: distilled has this guidance embedding"):
        plan_of(tmp_path)


def test_what_cannot_be_baked_is_refused(
    tmp_path: Path, models: dict[str, dict[str, torch.Tensor]]
) -> None:
    write_recipe(tmp_path, guidance_embedding="bake", bake_guidance=8)
    models["distilled"][COND] = torch.zeros(7, 12).half()
    write_unet(tmp_path / "distilled", models["distilled"])
    with pytest.raises(PlanError, match=rf"{COND}: float16 of shape \[7, 12\] in distilled"):
        plan_of(tmp_path)
    del models["distilled"][COND]
    write_unet(tmp_path / "distilled", models["distilled"])
    with pytest.raises(PlanError, match=f"bake: no distilled model has {COND}"):
        plan_of(tmp_path)


def test_nan_in_an_embedding_is_found(
    tmp_path: Path, models: dict[str, dict[str, torch.Tensor]]
) -> None:
    from merge.errors import NonFiniteError

    models["distilled"][COND][3, 4] = torch.nan
    write_unet(tmp_path / "distilled", models["distilled"])
    write_recipe(tmp_path, guidance_embedding="bake", bake_guidance=8)
    with pytest.raises(NonFiniteError, match="1 of 96 values are NaN or infinite in distilled"):
        run_recipe(load_recipe(tmp_path / "mini.yaml"), tmp_path / "out", verify=False)
    assert not (tmp_path / "out").exists()
