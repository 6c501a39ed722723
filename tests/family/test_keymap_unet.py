"""UNet keys of single files: diffusers' own converter is the judge, up to the full models."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from merge.errors import CheckpointError
from merge.family.keys.one_to_one import one_to_one
from merge.family.keys.unet import LDM_UNET_PREFIX, ldm_to_unet, unet_to_ldm
from scripts.make_synthetic import SD15_UNET, SDXL_UNET
from scripts.make_tiny import SD15_UNET as TINY_SD15
from scripts.make_tiny import SDXL_UNET as TINY_SDXL

# Stable Diffusion 2.1's UNet differs from 1.5's only here.
SD21 = {"cross_attention_dim": 1024, "use_linear_projection": True}
CONFIGS: dict[str, dict[str, Any]] = {
    "sd15": SD15_UNET,
    "sd15-edit": SD15_UNET | {"in_channels": 8},
    "sd21": SD15_UNET | SD21 | {"attention_head_dim": (5, 10, 20, 20)},
    "sdxl": SDXL_UNET,
    "sdxl-edit": SDXL_UNET | {"in_channels": 8},
    "tiny-sd15": TINY_SD15 | {"in_channels": 8},
    "tiny-sdxl": TINY_SDXL | {"in_channels": 8},
}
COUNTS = {"sd15": 686, "sd15-edit": 686, "sd21": 686, "sdxl": 1680, "sdxl-edit": 1680}


def meta_unet(config: dict[str, Any]) -> Any:
    import diffusers

    with torch.device("meta"):
        return diffusers.UNet2DConditionModel(**config)


@functools.cache
def full_names(name: str) -> dict[str, str]:
    return unet_to_ldm(meta_unet(CONFIGS[name]).state_dict())


@pytest.fixture(scope="module", params=CONFIGS)
def unet(request: pytest.FixtureRequest) -> tuple[str, Any]:
    return request.param, meta_unet(CONFIGS[request.param])


def test_diffusers_translates_our_names_back(unet: tuple[str, Any]) -> None:
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    name, model = unet
    state = model.state_dict()
    names = unet_to_ldm(state)
    assert len(names) == len(state)
    if name in COUNTS:
        assert len(names) == COUNTS[name]
    single = {LDM_UNET_PREFIX + names[key]: key for key in state}
    # The converter moves values about; here each value is the key that it belongs to.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = convert_ldm_unet_checkpoint(dict(single), dict(model.config))
    assert found == {key: key for key in state}
    assert ldm_to_unet(names.values()) == {ldm: key for key, ldm in names.items()}


@pytest.mark.parametrize(
    ("key", "ldm"),
    [
        # As they stand in published files.
        ("conv_in.weight", "input_blocks.0.0.weight"),
        ("time_embedding.linear_2.bias", "time_embed.2.bias"),
        ("down_blocks.0.resnets.1.time_emb_proj.weight", "input_blocks.2.0.emb_layers.1.weight"),
        ("down_blocks.2.downsamplers.0.conv.weight", "input_blocks.9.0.op.weight"),
        ("mid_block.attentions.0.proj_in.weight", "middle_block.1.proj_in.weight"),
        ("up_blocks.0.upsamplers.0.conv.weight", "output_blocks.2.1.conv.weight"),
        ("up_blocks.1.upsamplers.0.conv.weight", "output_blocks.5.2.conv.weight"),
        ("up_blocks.3.attentions.2.proj_out.bias", "output_blocks.11.1.proj_out.bias"),
        ("conv_out.weight", "out.2.weight"),
    ],
)
def test_names_of_stable_diffusion_1(key: str, ldm: str) -> None:
    assert full_names("sd15")[key] == ldm


@pytest.mark.parametrize(
    ("key", "ldm"),
    [
        ("add_embedding.linear_1.weight", "label_emb.0.0.weight"),
        ("down_blocks.1.downsamplers.0.conv.bias", "input_blocks.6.0.op.bias"),
        (
            "down_blocks.2.attentions.1.transformer_blocks.9.attn2.to_k.weight",
            "input_blocks.8.1.transformer_blocks.9.attn2.to_k.weight",
        ),
        ("up_blocks.1.upsamplers.0.conv.weight", "output_blocks.5.2.conv.weight"),
        ("up_blocks.2.resnets.2.conv_shortcut.weight", "output_blocks.8.0.skip_connection.weight"),
    ],
)
def test_names_of_sdxl(key: str, ldm: str) -> None:
    assert full_names("sdxl")[key] == ldm


@pytest.mark.parametrize("config", [SD15_UNET, SDXL_UNET], ids=["sd15", "sdxl"])
def test_the_guidance_embedding_of_a_full_lcm_has_no_name(config: dict[str, Any]) -> None:
    state = meta_unet(config | {"time_cond_proj_dim": 256}).state_dict()
    with pytest.raises(CheckpointError, match=r"^time_embedding\.cond_proj\.weight: this key"):
        unet_to_ldm(state)


@pytest.mark.parametrize(
    "key",
    [
        "down_blocks.0.resnets.0.conv3.weight",
        "up_blocks.0.resnets.9.strange.weight",
        "down_blocks.0.downsamplers.1.conv.weight",
        "down_blocks.0.upsamplers.0.conv.weight",
        "up_blocks.0.downsamplers.0.conv.weight",
        "mid_block.attentions.1.proj_in.weight",
        "conv_in.extra.weight",
        "class_embedding.weight",
    ],
)
def test_unknown_keys_are_errors_not_guesses(key: str) -> None:
    keys = [*meta_unet(TINY_SD15).state_dict(), key]
    with pytest.raises(CheckpointError, match="has no counterpart in the other layout"):
        unet_to_ldm(keys)


@pytest.mark.parametrize(
    "name",
    [
        "input_blocks.3.0.in_layers.0.weight",
        "input_blocks.0.1.weight",
        "output_blocks.0.1.conv.weight",
        "middle_block.3.weight",
        "out.1.weight",
        "time_embed.4.weight",
    ],
)
def test_unknown_single_file_keys_are_errors(name: str) -> None:
    names = [*unet_to_ldm(meta_unet(TINY_SD15).state_dict()).values(), name]
    with pytest.raises(CheckpointError, match="has no counterpart in the other layout"):
        ldm_to_unet(names)


@given(
    widths=st.lists(st.sampled_from([4, 8]), min_size=2, max_size=4),
    layers=st.integers(1, 3),
    attends=st.lists(st.booleans(), min_size=4, max_size=4),
    is_linear=st.booleans(),
)
def test_any_number_of_blocks_and_layers(
    widths: list[int], layers: int, attends: list[bool], is_linear: bool
) -> None:
    attends = attends[: len(widths)]
    kinds = ["CrossAttnDownBlock2D" if each else "DownBlock2D" for each in attends]
    model = meta_unet(
        {
            "block_out_channels": tuple(widths),
            "down_block_types": tuple(kinds),
            "up_block_types": tuple(kind.replace("Down", "Up") for kind in reversed(kinds)),
            "layers_per_block": layers,
            "norm_num_groups": 4,
            "attention_head_dim": 2,
            "cross_attention_dim": 4,
            "use_linear_projection": is_linear,
        }
    )
    keys = list(model.state_dict())
    names = unet_to_ldm(keys)
    assert set(names) == set(keys)
    assert len(set(names.values())) == len(keys)
    assert ldm_to_unet(names.values()) == {ldm: key for key, ldm in names.items()}


@given(st.lists(st.tuples(st.text(max_size=2), st.text(max_size=2)), max_size=6))
def test_one_to_one_is_what_it_says(pairs: list[tuple[str, str]]) -> None:
    keys, names = zip(*pairs, strict=True) if pairs else ((), ())
    if len(set(keys)) == len(set(names)) == len(pairs):
        assert one_to_one(pairs, "words") == dict(pairs)
    else:
        with pytest.raises(CheckpointError, match=r"(?s)^words: .*becomes? both|both become"):
            one_to_one(pairs, "words")
