"""VAE and text encoder keys of single files, and which key belongs where."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from merge.errors import CheckpointError
from merge.family.keys.pairs import FUSED, POINTWISE, TRANSPOSED, KeyPair, checked_pairs
from merge.family.keys.single_file import join_single_file, split_single_file
from merge.family.keys.table import KeyTable
from merge.family.keys.text import SD15_TEXT, SDXL_TEXT, SDXL_TEXT_2
from merge.family.keys.vae import VAE_KEYS
from scripts.make_tiny import SD15_UNET, SDXL_UNET, TEXT, VAE

# Source: vae/config.json of the published SD1.5 and SDXL models.
FULL_VAE: dict[str, Any] = VAE | {
    "block_out_channels": (128, 256, 512, 512),
    "norm_num_groups": 32,
}


def meta(library: str, name: str, config: Any) -> list[str]:
    """Return the keys of a model that is built without memory for its weights."""
    import importlib

    with torch.device("meta"):
        module = getattr(importlib.import_module(library), name)
        model = module(**config) if isinstance(config, dict) else module(config)
    return list(model.state_dict())


def vae_keys(config: dict[str, Any]) -> list[str]:
    return meta("diffusers", "AutoencoderKL", config)


def text_keys(name: str = "CLIPTextModel", **changes: Any) -> list[str]:
    """Return keys as published files have them, with `text_model.`."""
    import transformers

    config = transformers.CLIPTextConfig(
        **{**TEXT, "hidden_size": 8, "intermediate_size": 16, "projection_dim": 6, **changes}
    )
    keys = meta("transformers", name, config)
    return [
        key if key.startswith(("text_model.", "text_projection.")) else f"text_model.{key}"
        for key in keys
    ]


# The VAE ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [VAE, FULL_VAE], ids=["tiny", "full"])
def test_diffusers_translates_our_vae_names_back(config: dict[str, Any]) -> None:
    import diffusers
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    with torch.device("meta"):
        model = diffusers.AutoencoderKL(**config)
    state = model.state_dict()
    pairs = VAE_KEYS.to_single(state)
    assert len(pairs) == len(state) == 248
    # A value that says which key it is of, in the shape that single files have.
    values = {}
    for number, pair in enumerate(pairs):
        tail = (1, 1) if pair.form == POINTWISE else ()
        values[pair.single] = torch.full((1, 1, *tail), float(number))
    found = convert_ldm_vae_checkpoint(values, dict(model.config))
    # The converter writes attention's old names, which diffusers then loads under the new ones.
    old = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
    names = {}
    for key, value in found.items():
        for before, after in old.items():
            key = key.replace(f"attentions.0.{before}.", f"attentions.0.{after}.")
        names[key] = int(value.flatten()[0])
    assert names == {pair.folder: number for number, pair in enumerate(pairs)}
    assert {pair.folder for pair in pairs if pair.form == POINTWISE} == {
        f"{half}.mid_block.attentions.0.{part}.weight"
        for half in ("encoder", "decoder")
        for part in ("to_q", "to_k", "to_v", "to_out.0")
    }


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("decoder.up_blocks.0.resnets.2.conv1.weight", "decoder.up.3.block.2.conv1.weight"),
        ("decoder.up_blocks.2.upsamplers.0.conv.bias", "decoder.up.1.upsample.conv.bias"),
        (
            "decoder.up_blocks.3.resnets.0.conv_shortcut.bias",
            "decoder.up.0.block.0.nin_shortcut.bias",
        ),
        ("encoder.down_blocks.0.downsamplers.0.conv.bias", "encoder.down.0.downsample.conv.bias"),
        ("encoder.mid_block.resnets.1.norm2.weight", "encoder.mid.block_2.norm2.weight"),
        ("decoder.mid_block.attentions.0.group_norm.bias", "decoder.mid.attn_1.norm.bias"),
        ("decoder.conv_norm_out.weight", "decoder.norm_out.weight"),
        ("post_quant_conv.weight", "post_quant_conv.weight"),
    ],
)
def test_names_of_vaes(key: str, name: str) -> None:
    pairs = {pair.folder: pair.single for pair in VAE_KEYS.to_single(vae_keys(VAE))}
    assert pairs[key] == f"first_stage_model.{name}"


def test_old_names_of_attention_are_the_same_tensors() -> None:
    keys = vae_keys(VAE)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = []
    for key in keys:
        for after, before in old.items():
            key = key.replace(f"attentions.0.{after}.", f"attentions.0.{before}.")
        renamed.append(key)
    assert len(set(renamed) - set(keys)) == 16
    ours = {pair.single: pair.form for pair in VAE_KEYS.to_single(renamed)}
    assert ours == {pair.single: pair.form for pair in VAE_KEYS.to_single(keys)}


def test_both_spellings_of_one_vae_key_are_an_error() -> None:
    keys = [*vae_keys(VAE), "encoder.mid_block.attentions.0.query.weight"]
    with pytest.raises(CheckpointError, match=r"^VAE keys: .*query.* both become .*attn_1\.q"):
        VAE_KEYS.to_single(keys)


@pytest.mark.parametrize(
    "key",
    [
        "encoder.up_blocks.0.resnets.0.conv1.weight",
        "decoder.mid_block.resnets.2.conv1.weight",
        "decoder.mid_block.attentions.0.to_x.weight",
        "encoder.odd.weight",
        "quantize.embedding.weight",
    ],
)
def test_unknown_vae_keys(key: str) -> None:
    with pytest.raises(CheckpointError, match="this key of a VAE has no name in a single file"):
        VAE_KEYS.to_single([*vae_keys(VAE), key])


@given(blocks=st.integers(1, 4), layers=st.integers(1, 3), quant=st.booleans())
def test_vaes_of_any_depth_come_back(blocks: int, layers: int, quant: bool) -> None:
    config = VAE | {
        "block_out_channels": (4,) * blocks,
        "down_block_types": ("DownEncoderBlock2D",) * blocks,
        "up_block_types": ("UpDecoderBlock2D",) * blocks,
        "layers_per_block": layers,
        "use_quant_conv": quant,
        "use_post_quant_conv": quant,
    }
    keys = vae_keys(config)
    pairs = VAE_KEYS.to_single(keys)
    assert {pair.folder for pair in pairs} == set(keys)
    assert set(VAE_KEYS.to_folder([pair.single for pair in pairs])) == set(pairs)


# Text encoders ---------------------------------------------------------------------------------


@pytest.mark.parametrize("table", [SD15_TEXT, SDXL_TEXT], ids=["sd15", "sdxl"])
def test_diffusers_translates_our_clip_names_back(table: KeyTable) -> None:
    from diffusers.loaders.single_file_utils import convert_ldm_clip_checkpoint

    keys = [*text_keys(), "text_model.embeddings.position_ids"]
    pairs = table.to_single(keys)
    found = convert_ldm_clip_checkpoint({pair.single: pair.folder for pair in pairs})
    assert found == {key: key for key in keys}
    assert all(pair.form == "same" for pair in pairs)
    flat = table.to_single([key.removeprefix("text_model.") for key in keys])
    assert [pair.single for pair in flat] == [pair.single for pair in pairs]
    assert table.to_folder([pair.single for pair in pairs]) == pairs


def test_both_spellings_of_one_text_key_are_an_error() -> None:
    keys = [*text_keys(), "final_layer_norm.weight"]
    with pytest.raises(CheckpointError, match=r"^text encoder keys: .* both become .*final_layer"):
        SD15_TEXT.to_single(keys)


@given(layers=st.integers(1, 4), width=st.sampled_from([4, 8]))
def test_diffusers_splits_what_we_fuse(layers: int, width: int) -> None:
    import transformers
    from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint

    changes = {"num_hidden_layers": layers, "hidden_size": width, "projection_dim": width}
    config = transformers.CLIPTextConfig(**{**TEXT, "intermediate_size": 16, **changes})
    with torch.device("meta"):
        model = transformers.CLIPTextModelWithProjection(config)
    keys = text_keys("CLIPTextModelWithProjection", **changes)
    pairs = SDXL_TEXT_2.to_single(keys)
    assert {pair.folder for pair in pairs} == set(keys)
    numbers = {key: float(number) for number, key in enumerate(keys)}
    values: dict[str, torch.Tensor] = {}
    for pair in pairs:
        tail = (width,) if pair.single.endswith(("in_proj_weight", "text_projection")) else ()
        shape = (3 * width if pair.form == FUSED else width, *tail)
        value = values.setdefault(pair.single, torch.zeros(shape))
        rows = slice(pair.part * width, (pair.part + 1) * width) if pair.form == FUSED else ...
        value[rows] = numbers[pair.folder]
    found = convert_open_clip_checkpoint(model, values, prefix=SDXL_TEXT_2.prefix)
    named = {
        key if key.startswith(("text_model.", "text_projection.")) else f"text_model.{key}": value
        for key, value in found.items()
    }
    assert named.keys() == numbers.keys()
    for key, value in named.items():
        assert set(value.flatten().tolist()) == {numbers[key]}, key
    assert [pair.folder for pair in pairs if pair.form == TRANSPOSED] == ["text_projection.weight"]
    assert set(SDXL_TEXT_2.to_folder({pair.single for pair in pairs})) == set(pairs)


def test_a_part_without_its_siblings_cannot_be_fused() -> None:
    keys = text_keys("CLIPTextModelWithProjection")
    keys.remove("text_model.encoder.layers.1.self_attn.v_proj.bias")
    with pytest.raises(CheckpointError, match=r"resblocks\.1\.attn\.in_proj_bias needs query, key"):
        SDXL_TEXT_2.to_single(keys)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("text_model.encoder.layers.0.mlp.fc3.weight", "this key of text_encoder_2 has no name"),
        ("text_model.pooler.weight", "this key of text_encoder_2 has no name"),
    ],
)
def test_unknown_text_keys(key: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        SDXL_TEXT_2.to_single([*text_keys("CLIPTextModelWithProjection"), key])
    with pytest.raises(CheckpointError, match="this key of a text encoder has no name"):
        SD15_TEXT.to_single([*text_keys(), key])


def test_pairs_must_be_one_to_one() -> None:
    with pytest.raises(CheckpointError, match="words: a and b both become x"):
        checked_pairs([KeyPair("a", "x"), KeyPair("b", "x")], "words")
    with pytest.raises(CheckpointError, match="words: a becomes both x and y"):
        checked_pairs([KeyPair("a", "x"), KeyPair("a", "y")], "words")
    with pytest.raises(CheckpointError, match=r"words: a and b both become x\[1\]"):
        checked_pairs([KeyPair("a", "x", FUSED, 1), KeyPair("b", "x", FUSED, 1)], "words")


# Whole files -----------------------------------------------------------------------------------


def whole(family: str) -> dict[str, list[str]]:
    unet = SD15_UNET if family == "sd15" else SDXL_UNET
    keys = {
        "unet": meta("diffusers", "UNet2DConditionModel", unet),
        "vae": vae_keys(VAE),
        "text_encoder": text_keys(),
    }
    if family == "sdxl":
        keys["text_encoder_2"] = text_keys("CLIPTextModelWithProjection")
    return keys


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_what_is_joined_splits_into_the_same(family: str) -> None:
    keys = whole(family)
    joined = join_single_file(keys)
    names = {pair.single for pairs in joined.pairs.values() for pair in pairs}
    split = split_single_file(names)
    assert split.left_out == joined.left_out == {}
    assert {name: set(pairs) for name, pairs in split.pairs.items()} == {
        name: set(pairs) for name, pairs in joined.pairs.items()
    }
    assert {name: {p.folder for p in pairs} for name, pairs in split.pairs.items()} == {
        name: set(component) for name, component in keys.items()
    }


WHOLE_SD15 = whole("sd15")
# Key of files that people have, and the beginning of the reason why no folder has it.
LEFT_OUT = {
    "model_ema.decay": "a moving average",
    "model_ema.num_updates": "a moving average",
    "model_ema.diffusion_modelinput_blocks00weight": "a moving average",
    "betas": "a constant of the noise schedule",
    "alphas_cumprod": "a constant of the noise schedule",
    "alphas_cumprod_prev": "a constant of the noise schedule",
    "sqrt_alphas_cumprod": "a constant of the noise schedule",
    "sqrt_one_minus_alphas_cumprod": "a constant of the noise schedule",
    "log_one_minus_alphas_cumprod": "a constant of the noise schedule",
    "sqrt_recip_alphas_cumprod": "a constant of the noise schedule",
    "sqrt_recipm1_alphas_cumprod": "a constant of the noise schedule",
    "posterior_variance": "a constant of the noise schedule",
    "posterior_log_variance_clipped": "a constant of the noise schedule",
    "posterior_mean_coef1": "a constant of the noise schedule",
    "logvar": "a constant of the noise schedule",
    "lvlb_weights": "a constant of the noise schedule",
    "denoiser.sigmas": "a constant of the noise schedule",
    "cond_stage_model.logit_scale": "of CLIP's training",
    "conditioner.embedders.1.model.logit_scale": "of CLIP's training",
    "optimizer_states.0.exp_avg": "of training",
    "first_stage_model.loss.discriminator.main.0.weight": "of the VAE's training",
}


@pytest.mark.parametrize("key", LEFT_OUT)
def test_every_key_that_is_left_out_has_its_reason(key: str) -> None:
    joined = join_single_file(WHOLE_SD15)
    names = [pair.single for pairs in joined.pairs.values() for pair in pairs]
    split = split_single_file([*names, key])
    assert split.left_out.keys() == {key}
    assert split.left_out[key].startswith(LEFT_OUT[key])
    assert sum(map(len, split.pairs.values())) == len(names)


@given(st.data())
def test_no_key_is_dropped_without_a_word(data: Any) -> None:
    """Every name is in a component, is left out with a reason, or stops the conversion."""
    joined = join_single_file(WHOLE_SD15)
    names = [pair.single for pairs in joined.pairs.values() for pair in pairs]
    base = data.draw(st.sampled_from([*names, *LEFT_OUT]))
    cut = data.draw(st.integers(0, len(base)))
    extra = base[:cut] + data.draw(st.sampled_from(["", "x", ".weight", "0", ".0.bias"]))
    try:
        split = split_single_file({*names, extra})
    except CheckpointError as error:
        # Blocks are counted, so that a key too many of the UNet can make another one strange.
        is_unet = extra.startswith("model.diffusion_model.")
        if extra not in error.message and not (is_unet and "key of a UNet" in error.message):
            raise
        return
    used = {pair.single for pairs in split.pairs.values() for pair in pairs}
    assert used | set(split.left_out) == {*names, extra}
    assert not used & set(split.left_out)
    assert all(split.left_out.values())


def test_two_unets_and_no_unet() -> None:
    joined = join_single_file(WHOLE_SD15)
    names = [pair.single for pairs in joined.pairs.values() for pair in pairs]
    for other, root in {
        "conv_in.weight": r"\*",
        "unet.conv_in.weight": r"unet\.\*",
        "diffusion_model.input_blocks.0.0.weight": r"diffusion_model\.\*",
    }.items():
        with pytest.raises(CheckpointError, match=rf"has two UNets: model\.diffusion.* and {root}"):
            split_single_file([*names, other])
    with pytest.raises(CheckpointError, match="this is no LDM/SGM single file: no key begins with"):
        split_single_file(WHOLE_SD15["unet"])


def test_unknown_keys_are_listed_and_counted() -> None:
    joined = join_single_file(WHOLE_SD15)
    names = [pair.single for pairs in joined.pairs.values() for pair in pairs]
    with pytest.raises(CheckpointError, match=r"file: odd\.0, odd\.1, .*odd\.4 and 3 more\n") as e:
        split_single_file([*names, *(f"odd.{n}" for n in range(8))])
    assert "leave them out by `exclude`" in e.value.hint
