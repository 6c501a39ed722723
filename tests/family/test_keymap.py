from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

from merge.family.model import Recognised
from merge.family.registry import family_named, recognise

Shapes = dict[str, tuple[int, ...]]

# The published configs, as far as they shape the weights.
CONFIGS: dict[str, dict[str, Any]] = {
    "sd15": {"cross_attention_dim": 768, "attention_head_dim": 8},
    "sd21": {
        "cross_attention_dim": 1024,
        "attention_head_dim": (5, 10, 20, 20),
        "use_linear_projection": True,
    },
    "sdxl": {
        "cross_attention_dim": 2048,
        "attention_head_dim": (5, 10, 20),
        "use_linear_projection": True,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
KEY_COUNTS = {"sd15": 686, "sd21": 686, "sdxl": 1680}
CONTEXTS = {"sd15": 768, "sd21": 1024, "sdxl": 2048}
TITLES = {
    "sd15": "Stable Diffusion 1.x",
    "sd21": "Stable Diffusion 2.x",
    "sdxl": "Stable Diffusion XL",
}


def shapes_of(config: dict[str, Any]) -> Shapes:
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config)
    return {key: tuple(tensor.shape) for key, tensor in unet.state_dict().items()}


@functools.cache
def full_unet(family: str) -> Shapes:
    """Keys and shapes of the real model."""
    return shapes_of(CONFIGS[family])


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("channels", [4, 8])
def test_the_published_unets_are_recognised(family: str, channels: int) -> None:
    shapes = {**full_unet(family), "conv_in.weight": (320, channels, 3, 3)}
    assert len(shapes) == KEY_COUNTS[family]
    found = recognise(shapes)
    assert found == Recognised(family_named(family), channels, CONTEXTS[family], False)
    assert found.family.title == TITLES[family]


def test_the_guidance_embedding_of_a_full_lcm_is_seen() -> None:
    shapes = shapes_of({**CONFIGS["sd15"], "time_cond_proj_dim": 256})
    assert shapes.keys() - full_unet("sd15").keys() == {"time_embedding.cond_proj.weight"}
    assert recognise(shapes) == Recognised(family_named("sd15"), 4, 768, True)


@pytest.mark.parametrize(
    ("family", "module"), [("sd15", "SD15_UNET"), ("sdxl", "SDXL_UNET")], ids=["sd15", "sdxl"]
)
def test_small_models_of_a_family_are_recognised(family: str, module: str) -> None:
    from scripts import make_tiny

    shapes = shapes_of({**getattr(make_tiny, module), "in_channels": 8})
    assert recognise(shapes) == Recognised(family_named(family), 8, 32, False)


@pytest.mark.parametrize(
    "shapes",
    [
        {},
        {"conv_in.bias": (320,)},
        {"conv_in.weight": (320, 4)},
        {"conv_in.weight": ()},
        {"model.diffusion_model.input_blocks.0.0.weight": (320, 4, 3, 3)},
        {"encoder.conv_in.weight": (128, 3, 3, 3)},
    ],
    ids=["nothing", "only a bias", "a linear layer", "a scalar", "LDM keys", "a VAE"],
)
def test_other_keys_are_no_unet(shapes: Shapes) -> None:
    assert recognise(shapes) is None


def test_attention_keys_of_odd_shapes_do_not_matter() -> None:
    conv_in = {"conv_in.weight": (8, 4, 3, 3)}
    assert recognise(conv_in) == Recognised(family_named("sd15"), 4, 0, False)
    odd = {**conv_in, "a.attn2.to_k.weight": (8,), "b.attn2.to_k.weight": (8, 12)}
    assert recognise(odd) == Recognised(family_named("sd15"), 4, 12, False)
    assert recognise({**conv_in, "attn2.to_k.weight": ()}) == recognise(conv_in)
