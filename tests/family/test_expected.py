"""Tables of what a config asks for: the classes themselves, on the meta device, are the judge."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from merge.errors import CheckpointError
from merge.family.expected.compare import compare_tensors
from merge.family.expected.fit import expected_tensors
from scripts import make_tiny

SD15 = {
    "block_out_channels": [320, 640, 1280, 1280],
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
SD21 = {**SD15, "cross_attention_dim": 1024, "use_linear_projection": True}
SD21["attention_head_dim"] = [5, 10, 20, 20]
SDXL = {
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "cross_attention_dim": 2048,
    "attention_head_dim": [5, 10, 20],
    "transformer_layers_per_block": [1, 2, 10],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
SSD = {
    **SDXL,
    "transformer_layers_per_block": [[1, 1], [2, 2], [4, 4]],
    "reverse_transformer_layers_per_block": [[4, 4, 10], [2, 1, 1], [1, 1, 1]],
    "mid_block_type": None,
}
UNETS = {
    "sd15": SD15,
    "sd15-edit": {**SD15, "in_channels": 8},
    "sd15-inpaint": {**SD15, "in_channels": 9},
    "sd15-lcm": {**SD15, "time_cond_proj_dim": 256},
    "sd21": SD21,
    "sdxl": SDXL,
    "sdxl-edit": {**SDXL, "in_channels": 8},
    "ssd-1b": SSD,
    "tiny-sd": {
        "block_out_channels": [320, 640, 1280],
        "down_block_types": ["CrossAttnDownBlock2D"] * 2 + ["DownBlock2D"],
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 2,
        "layers_per_block": 1,
        "mid_block_type": None,
        "cross_attention_dim": 768,
    },
    "upscaler": {**SD15, "in_channels": 7, "num_class_embeds": 1000},
    "tiny": make_tiny.SD15_UNET,
    "tiny-xl": make_tiny.SDXL_UNET,
}
COUNTS = {"sd15": (686, 859_520_964), "sd21": (686, 865_910_724), "sdxl": (1680, 2_567_463_684)}
VAE = {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
}


def shapes_of(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in model.state_dict().items()}


def diffusers_shapes(name: str, config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    import diffusers

    with torch.device("meta"):
        return shapes_of(getattr(diffusers, name).from_config(config))


@pytest.mark.parametrize("name", UNETS)
def test_a_unet_has_the_keys_and_shapes_of_its_class(name: str) -> None:
    config = {"_class_name": "UNet2DConditionModel", **UNETS[name]}
    found = expected_tensors(config)
    assert found == diffusers_shapes("UNet2DConditionModel", config)
    if name in COUNTS:
        numbers = sum(torch.Size(shape).numel() for shape in found.values())
        assert (len(found), numbers) == COUNTS[name]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False},
        {"mid_block_add_attention": False, "in_channels": 4, "out_channels": 1},
    ],
)
def test_a_vae_has_the_keys_and_shapes_of_its_class(changes: dict[str, Any]) -> None:
    config = {"_class_name": "AutoencoderKL", **VAE, **changes}
    assert expected_tensors(config) == diffusers_shapes("AutoencoderKL", config)


CLIP = {
    "CLIPTextModel": [
        {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12},
        {"hidden_size": 64, "num_hidden_layers": 2, "max_position_embeddings": 248},
        {},
    ],
    "CLIPTextModelWithProjection": [
        {"hidden_size": 1280, "num_hidden_layers": 32, "num_attention_heads": 20}
        | {"intermediate_size": 5120, "projection_dim": 1280}
    ],
    "CLIPVisionModel": [{}, {"image_size": 60, "patch_size": 14, "num_hidden_layers": 1}],
    "CLIPVisionModelWithProjection": [{"hidden_size": 96, "projection_dim": 32}],
}


@pytest.mark.parametrize(("name", "config"), [(n, c) for n, cs in CLIP.items() for c in cs])
def test_a_clip_model_has_the_keys_and_shapes_of_its_class(
    name: str, config: dict[str, Any]
) -> None:
    import transformers

    kind = "Vision" if "Vision" in name else "Text"
    full = getattr(transformers, f"CLIP{kind}Config")(**config)
    with torch.device("meta"):
        theirs = shapes_of(getattr(transformers, name)(full))
    table = expected_tensors({"architectures": [name], **config})
    assert table is not None
    differences = compare_tensors(table, theirs)
    assert not any((differences.missing, differences.misshaped, differences.reshaped))
    assert differences.extra == ()
    assert len(table) == len(theirs)


def test_a_safety_checker_has_the_keys_and_shapes_of_its_class() -> None:
    from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
    from transformers import CLIPConfig

    vision = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    with torch.device("meta"):
        model = StableDiffusionSafetyChecker(CLIPConfig(vision_config=vision, projection_dim=48))
    table = expected_tensors(
        {"architectures": [type(model).__name__], "vision_config": vision, "projection_dim": 48}
    )
    assert table is not None
    differences = compare_tensors(table, shapes_of(model))
    assert not any((differences.missing, differences.extra, differences.misshaped))
    assert len(table) == len(shapes_of(model))


@settings(max_examples=25)
@given(data=st.data())
def test_small_unets_of_any_form(data: st.DataObject) -> None:
    blocks = data.draw(st.integers(1, 3))
    draw = data.draw
    attends = draw(st.lists(st.booleans(), min_size=blocks, max_size=blocks))
    down = ["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attends]
    up = ["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in attends[::-1]]
    widths = draw(st.lists(st.sampled_from([8, 16, 24]), min_size=blocks, max_size=blocks))
    config = {
        "_class_name": "UNet2DConditionModel",
        "block_out_channels": widths,
        "down_block_types": down,
        "up_block_types": up,
        "layers_per_block": draw(
            st.integers(1, 3) | st.lists(st.integers(1, 3), min_size=blocks, max_size=blocks)
        ),
        "transformer_layers_per_block": draw(
            st.integers(1, 2) | st.lists(st.integers(1, 3), min_size=blocks, max_size=blocks)
        ),
        "cross_attention_dim": draw(st.sampled_from([8, 12])),
        "attention_head_dim": draw(st.sampled_from([1, 2, 4, 8])),
        "norm_num_groups": draw(st.sampled_from([1, 2, 8])),
        "use_linear_projection": draw(st.booleans()),
        "in_channels": draw(st.integers(1, 9)),
        "out_channels": draw(st.integers(1, 4)),
        "conv_in_kernel": draw(st.sampled_from([1, 3])),
        "conv_out_kernel": draw(st.sampled_from([1, 3])),
        "time_embedding_dim": draw(st.none() | st.just(20)),
        "time_cond_proj_dim": draw(st.none() | st.just(6)),
        "mid_block_type": draw(st.sampled_from([None, "UNetMidBlock2DCrossAttn"])),
    }
    assert expected_tensors(config) == diffusers_shapes("UNet2DConditionModel", config)


@pytest.mark.parametrize(
    "config",
    [
        {"_class_name": "AutoencoderTiny"},
        {"_class_name": "UNet2DConditionModel", "down_block_types": ["AttnDownBlock2D"] * 4},
        {"_class_name": "UNet2DConditionModel", "dual_cross_attention": True},
        {"_class_name": "UNet2DConditionModel", "class_embed_type": "timestep"},
        {"_class_name": "UNet2DConditionModel", "addition_embed_type": "image"},
        {"_class_name": "UNet2DConditionModel", "encoder_hid_dim": 8},
        {},
    ],
)
def test_what_has_no_table_is_unknown(config: dict[str, Any]) -> None:
    assert expected_tensors(config) is None


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("block_out_channels", 320),
        ("block_out_channels", [320, 640]),
        ("block_out_channels", [320, 640, 1280, "1280"]),
        ("layers_per_block", 0),
        ("layers_per_block", [2, 2]),
        ("in_channels", -8),
        ("in_channels", True),
        ("cross_attention_dim", 768.5),
        ("down_block_types", "DownBlock2D"),
        ("transformer_layers_per_block", [1, 2]),
    ],
)
def test_an_impossible_value_is_named(field: str, value: Any) -> None:
    config = {"_class_name": "UNet2DConditionModel", field: value}
    with pytest.raises(CheckpointError, match=f"config of UNet2DConditionModel has {field}: "):
        expected_tensors(config)


def test_differences_are_told_apart() -> None:
    expected = {"a.weight": (8, 4), "b.weight": (8, 4, 1, 1), "c.bias": (8,), "d.weight": (77, 4)}
    found = {
        "a.weight": (8, 4, 1, 1),
        "b.weight": (8, 4),
        "d.weight": (248, 4),
        "e.weight": (1,),
        "embeddings.position_ids": (1, 77),
    }
    differences = compare_tensors(expected, found)
    assert differences.missing == ("c.bias",)
    assert differences.extra == ("e.weight",)
    assert differences.misshaped == {"d.weight": ((248, 4), (77, 4))}
    assert differences.reshaped == {"a.weight": (8, 4), "b.weight": (8, 4, 1, 1)}


def test_spellings_that_loaders_know_are_the_same() -> None:
    expected = {
        "text_model.final_layer_norm.bias": (4,),
        "decoder.mid_block.attentions.0.to_out.0.weight": (4, 4),
    }
    found = {
        "final_layer_norm.bias": (4,),
        "decoder.mid_block.attentions.0.proj_attn.weight": (4, 4, 1, 1),
    }
    differences = compare_tensors(expected, found)
    assert (differences.missing, differences.extra) == ((), ())
    assert differences.reshaped == {"decoder.mid_block.attentions.0.proj_attn.weight": (4, 4)}
