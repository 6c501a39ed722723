"""Stable Diffusion 1.x, 2.x and XL: UNets that InstructPix2Pix editors are trained from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from merge.errors import CheckpointError
from merge.family.blocks import UNET_BLOCKS
from merge.family.keys.text import TEXT_MODEL
from merge.family.keys.unet import LDM_UNET_PREFIX, ldm_to_unet, unet_to_ldm
from merge.family.model import (
    Component,
    Family,
    GuidanceEmbedding,
    LoraNames,
    Shapes,
    SingleFile,
    Widening,
)

_CONV_IN = "conv_in.weight"
_LDM_CONV_IN = "input_blocks.0.0.weight"
# What tools put before the keys of a UNet that is alone in its file, the longest first.
_ROOTS = (LDM_UNET_PREFIX, "diffusion_model.", "unet.unet.", "unet.", "model.", "")


def _is_unet(shapes: Shapes) -> bool:
    return len(shapes.get(_CONV_IN, ())) == 4


def _is_xl(shapes: Shapes) -> bool:
    return _is_unet(shapes) and "add_embedding.linear_1.weight" in shapes


def _is_2(shapes: Shapes) -> bool:
    """Tell 2.x by linear `proj_in` layers, where 1.x has 1x1 convolutions.

    Sizes are not looked at, so small models of a family are recognised.
    """
    return _is_unet(shapes) and any(
        key.endswith(".proj_in.weight") and len(shape) == 2 for key, shape in shapes.items()
    )


def _alone(shapes: Shapes) -> dict[str, str] | None:
    """Return key to diffusers key for a UNet that is alone in its file."""
    for root in _ROOTS:
        if not all(name.startswith(root) for name in shapes):
            continue
        if len(shapes.get(root + _CONV_IN, ())) == 4:
            return {name: name.removeprefix(root) for name in shapes} if root else {}
        if root != LDM_UNET_PREFIX and len(shapes.get(root + _LDM_CONV_IN, ())) == 4:
            inner = ldm_to_unet(name.removeprefix(root) for name in shapes)
            return {name: inner[name.removeprefix(root)] for name in shapes}
    return None


def _unet_paths(keys: Iterable[str]) -> Mapping[str, tuple[str, ...]]:
    keys = sorted(keys)
    try:
        ldm = unet_to_ldm(keys)
    except CheckpointError:
        # A UNet with blocks of its own has no single-file names, so no LoRA can use them.
        ldm = {}
    return {
        key: tuple(dict.fromkeys(path.removesuffix(".weight") for path in (key, ldm.get(key, key))))
        for key in keys
    }


def _text_paths(keys: Iterable[str]) -> Mapping[str, tuple[str, ...]]:
    found = {}
    for key in keys:
        path = key.removesuffix(".weight")
        inner = path.removeprefix(TEXT_MODEL)
        # transformers from 5.6 on leaves `text_model.` out, and older LoRAs have it.
        is_outside = path.startswith("text_projection")
        found[key] = (path,) if is_outside else (inner, TEXT_MODEL + inner)
    return found


# Early diffusers kept the factors of attention in a processor, named after the projection.
_UNET_LORAS = LoraNames(
    flat=("lora_unet_", "lycoris_"),
    paths=_unet_paths,
    roots=("model.diffusion_model.", "diffusion_model.", "unet.", "model."),
    processors={
        "to_q": "to_q_lora",
        "to_k": "to_k_lora",
        "to_v": "to_v_lora",
        "to_out.0": "to_out_lora",
    },
    processor=".processor",
    is_bare=True,
)
_TEXT_LORAS = LoraNames(
    flat=("lora_te_", "lora_te1_"),
    paths=_text_paths,
    # ComfyUI's names of the text encoders.
    roots=("clip_l.", "te1.", "conditioner.embedders.0.", "cond_stage_model."),
    inner_roots=("transformer.", "model.", "base_model.model.", "base_model."),
    starts=(TEXT_MODEL,),
    processors={
        "q_proj": "to_q_lora",
        "k_proj": "to_k_lora",
        "v_proj": "to_v_lora",
        "out_proj": "to_out_lora",
    },
)
_TOKENS = "text_model.embeddings.token_embedding.weight"
_UNET = Component(
    "unet",
    "UNet",
    "diffusion_pytorch_model.safetensors",
    class_name="UNet2DConditionModel",
    is_mergeable=True,
    sizes=(
        ("in_channels", _CONV_IN, 1),
        ("out_channels", "conv_out.weight", 0),
        ("cross_attention_dim", ".attn2.to_k.weight", 1),
        ("projection_class_embeddings_input_dim", "add_embedding.linear_1.weight", 1),
    ),
    loras=_UNET_LORAS,
)
_TEXT = Component(
    "text_encoder",
    "text encoder",
    "model.safetensors",
    is_mergeable=True,
    inner=TEXT_MODEL,
    sizes=(("hidden_size", _TOKENS, 1), ("vocab_size", _TOKENS, 0)),
    loras=_TEXT_LORAS,
)
_XL_TEXT = replace(_TEXT, loras=replace(_TEXT_LORAS, flat=("lora_te1_", "lora_te_")))
_TEXT_2 = Component(
    "text_encoder_2",
    "second text encoder",
    "model.safetensors",
    is_mergeable=True,
    inner=TEXT_MODEL,
    sizes=(("hidden_size", _TOKENS, 1), ("projection_dim", "text_projection.weight", 0)),
    loras=replace(
        _TEXT_LORAS,
        flat=("lora_te2_",),
        roots=("clip_g.", "te2.", "conditioner.embedders.1."),
        starts=(),
    ),
)
_VAE = Component(
    "vae",
    "VAE",
    "diffusion_pytorch_model.safetensors",
    sizes=(("latent_channels", "decoder.conv_in.weight", 1),),
)
_SCHEDULER_KEYS = (
    "beta_end",
    "beta_schedule",
    "beta_start",
    "clip_sample",
    "clip_sample_range",
    "dynamic_thresholding_ratio",
    "num_train_timesteps",
    "original_inference_steps",
    "prediction_type",
    "rescale_betas_zero_snr",
    "sample_max_value",
    "set_alpha_to_one",
    "skip_prk_steps",
    "steps_offset",
    "thresholding",
    "timestep_scaling",
    "timestep_spacing",
    "trained_betas",
)

SD1 = Family(
    name="sd15",
    title="Stable Diffusion 1.x",
    is_like=_is_unet,
    sign=f"{_CONV_IN} of rank 4",
    components=(_UNET, _VAE, _TEXT, _TEXT_2),
    pipeline_class="StableDiffusionInstructPix2PixPipeline",
    plain_class="StableDiffusionPipeline",
    modelspec=("stable-diffusion-v1", "stable-diffusion-v1-edit"),
    tag="stable-diffusion",
    resolution=512,
    alone=_alone,
    context="attn2.to_k.weight",
    pointwise=(".proj_in.weight", ".proj_out.weight", ".conv_shortcut.weight"),
    widening=Widening(_CONV_IN, edit_channels=8),
    # What a full LCM adds; InstructPix2Pix pipelines never feed it.
    guidance=GuidanceEmbedding(
        key="time_embedding.cond_proj.weight",
        linear="time_embedding.linear_1.weight",
        bias="time_embedding.linear_1.bias",
        field="time_cond_proj_dim",
    ),
    blocks=UNET_BLOCKS,
    single_file=SingleFile(
        ("unet", "vae", "text_encoder"), "https://github.com/CompVis/stable-diffusion"
    ),
    scheduler_keys=_SCHEDULER_KEYS,
    pipeline_options={"safety_checker": None, "requires_safety_checker": False},
)
SD2 = replace(
    SD1,
    name="sd21",
    title="Stable Diffusion 2.x",
    is_like=_is_2,
    modelspec=("stable-diffusion-v2", "stable-diffusion-v2-edit"),
    single_file=None,
)
SDXL = replace(
    SD1,
    name="sdxl",
    title="Stable Diffusion XL",
    is_like=_is_xl,
    components=(_UNET, _VAE, _XL_TEXT, _TEXT_2),
    pipeline_class="StableDiffusionXLInstructPix2PixPipeline",
    plain_class="StableDiffusionXLPipeline",
    modelspec=("stable-diffusion-xl-v1-base", "stable-diffusion-xl-v1-edit"),
    tag="stable-diffusion-xl",
    resolution=768,
    single_file=SingleFile(
        ("unet", "vae", "text_encoder", "text_encoder_2"),
        "sgm",
        caveat="A1111 takes an 8-channel SDXL file for a plain one and cannot edit with it.",
    ),
    pipeline_options={"add_watermarker": False},
    has_fixed_size=True,
    has_added_conditions=True,
    overflows_vae=True,
)
