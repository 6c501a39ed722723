"""Weights by block: the names that people know, and globs beside them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel

from merge import load_recipe, run_recipe
from merge.errors import PlanError
from merge.family.blocks import UNET_BLOCKS, block_order, unet_blocks
from merge.plan.patterns import block_weight
from merge.plan.render import plan_to_json, render_plan
from tests.mini import (
    bits,
    numpy_float32,
    numpy_round,
    plan_of,
    read_output,
    write_recipe,
    write_unet,
)

SD15 = {"block_out_channels": (8, 8, 8, 8), "cross_attention_dim": 8}
SDXL = {
    "block_out_channels": (8, 8, 8),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "cross_attention_dim": 8,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 32,
    "use_linear_projection": True,
}
COMMON = {"norm_num_groups": 4, "attention_head_dim": 4}
NUMBERS = {"sd15": 12, "sdxl": 9}


def unet_keys(family: str) -> list[str]:
    with torch.device("meta"):
        config = {"sd15": SD15, "sdxl": SDXL}[family]
        return sorted(UNet2DConditionModel(in_channels=8, **config, **COMMON).state_dict())


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_every_key_of_a_unet_lies_in_one_named_block(family: str) -> None:
    blocks = unet_blocks(unet_keys(family))
    count = NUMBERS[family]
    expected = ["BASE", *(f"IN{n:02d}" for n in range(count)), "M00"]
    assert block_order(blocks.values()) == [*expected, *(f"OUT{n:02d}" for n in range(count))]


@pytest.mark.parametrize(
    ("family", "key", "block"),
    [
        # By hand, from the layout of the published single files.
        ("sd15", "conv_in.weight", "IN00"),
        ("sd15", "down_blocks.0.attentions.1.proj_in.weight", "IN02"),
        ("sd15", "down_blocks.0.downsamplers.0.conv.weight", "IN03"),
        ("sd15", "down_blocks.3.resnets.1.conv1.weight", "IN11"),
        ("sd15", "mid_block.attentions.0.norm.weight", "M00"),
        ("sd15", "mid_block.resnets.1.conv2.bias", "M00"),
        ("sd15", "up_blocks.0.upsamplers.0.conv.weight", "OUT02"),
        ("sd15", "up_blocks.3.attentions.2.proj_out.weight", "OUT11"),
        ("sd15", "conv_out.weight", "BASE"),
        ("sd15", "time_embedding.linear_2.bias", "BASE"),
        ("sdxl", "down_blocks.2.attentions.1.proj_in.weight", "IN08"),
        ("sdxl", "up_blocks.2.resnets.2.conv1.weight", "OUT08"),
        ("sdxl", "add_embedding.linear_1.weight", "BASE"),
    ],
)
def test_blocks_by_hand(family: str, key: str, block: str) -> None:
    assert unet_blocks(unet_keys(family))[key] == block


def test_the_most_specific_pattern_wins() -> None:
    key = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.weight"
    weights = {"IN04": 0.25, "*": 1.0}
    assert block_weight(key, weights, 2.0, UNET_BLOCKS, "IN04") == 0.25
    assert block_weight(key, {**weights, "*attn2*": 3.0}, 2.0, UNET_BLOCKS, "IN04") == 0.25
    longer = {**weights, "down_blocks.1.attentions.0.transformer_blocks.*": 0.75}
    assert block_weight(key, longer, 2.0, UNET_BLOCKS, "IN04") == 0.75
    assert block_weight(key, {"IN05": 0.5}, 2.0, UNET_BLOCKS, "IN04") == 2.0
    with pytest.raises(ValueError, match=r"IN04 and down_blocks\.1\.attentions\.0\.\* are equally"):
        block_weight(
            key, {"IN04": 0.5, "down_blocks.1.attentions.0.*": 0.6}, 1.0, UNET_BLOCKS, "IN04"
        )
    assert block_weight("text_encoder.a.b", {"BASE": 0.5}, 1.0, UNET_BLOCKS, "BASE") == 0.5


# Through a recipe --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny UNets with all the blocks of Stable Diffusion 1.5."""
    root = tmp_path_factory.mktemp("blocks")
    for seed, (role, channels) in enumerate({"base": 4, "distilled": 4, "target": 8}.items()):
        torch.manual_seed(seed)
        model = UNet2DConditionModel(in_channels=channels, **SD15, **COMMON)
        write_unet(root / role, {key: t.half() for key, t in model.state_dict().items()})
    return root


def test_every_block_gets_its_own_weight(folder: Path, tmp_path: Path) -> None:
    names = ["BASE", *(f"IN{n:02d}" for n in range(12)), "M00", *(f"OUT{n:02d}" for n in range(12))]
    weights = {name: (index + 1) / 32 for index, name in enumerate(names)}
    write_recipe(folder, block_weights=weights, channel_rule="first", out_dtype="float32")
    plan = plan_of(folder)
    assert {block.name: block.weights for block in plan.blocks} == {
        name: (weight,) for name, weight in weights.items()
    }
    run_recipe(load_recipe(folder / "mini.yaml"), tmp_path / "out", verify=False)
    merged = read_output(tmp_path / "out")
    models = {role: read_models(folder / role) for role in ("target", "distilled", "base")}
    blocks = unet_blocks(merged)
    for key, tensor in merged.items():
        target, distilled, base = (numpy_float32(models[role][key]) for role in models)
        delta = (distilled - base) * np.float32(weights[blocks[key]])
        if key == "conv_in.weight":
            target[:, :4] += delta
        else:
            target = target + delta
        np.testing.assert_array_equal(bits(tensor), numpy_round(target, torch.float32), key)


def read_models(path: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(path / "diffusion_pytorch_model.safetensors")


def test_the_plan_shows_the_weight_of_every_block(folder: Path) -> None:
    write_recipe(folder, weight=0.5, block_weights={"IN04": 0.25, "M00": 0})
    plan = plan_of(folder)
    text = render_plan(plan, 0)
    assert "blocks        BASE to IN03: 0.5, IN04: 0.25, IN05 to IN11: 0.5, M00: nothing," in text
    blocks = {block["name"]: block for block in plan_to_json(plan, 0)["blocks"]}
    assert blocks["IN04"]["weights"] == [0.25]
    assert blocks["M00"]["weights"] == []
    assert sum(block["tensors"] for block in blocks.values()) == len(plan.tensors)


@pytest.mark.parametrize("name", ["IN12", "OUT12", "M01", "IN4", "IN99"])
def test_a_block_that_is_not_there_is_an_error(folder: Path, name: str) -> None:
    write_recipe(folder, block_weights={name: 0.5})
    known = "only BASE, IN00 to IN11, M00, OUT00 to OUT11"
    with pytest.raises(PlanError, match=f"this UNet has no block {name}, {known}"):
        plan_of(folder)


def test_an_override_names_a_block(folder: Path) -> None:
    write_recipe(folder)
    plan = plan_of(folder, "block_weights[OUT03]=0.125")
    assert {b.name: b.weights for b in plan.blocks}["OUT03"] == (0.125,)
