"""Weight files that people name as a model, and are something else."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

Shape = tuple[int, ...]

_CONTROLNET = re.compile(r"control_model\.|controlnet_cond_embedding\.|controlnet_down_blocks\.")
# What some keys of a file begin with, and what it then is.
_KINDS: tuple[tuple[re.Pattern[str], str], ...] = (
    (
        re.compile(r"emb_params|string_to_(?:param|token)(?:\.|$)|<[^>]+>"),
        "a textual-inversion embedding",
    ),
    (re.compile(r"image_proj(?:_model)?\.|ip_adapter\.|adapter_modules\."), "an IP-Adapter"),
    (_CONTROLNET, "a ControlNet"),
    (re.compile(r"adapter\.(?:body|conv_in|unshuffle)\."), "a T2I-Adapter"),
    (re.compile(r"(?:.+\.)?motion_modules\."), "a motion module of AnimateDiff"),
    (re.compile(r"hypernetwork|\d+\.(?:0|1)\.linear"), "a hypernetwork"),
    (
        re.compile(r"(?:.*\.)?(?:transformer_blocks\.0\.img_mlp|double_blocks\.0)\."),
        "a transformer",
    ),
    (
        re.compile(r"(?:first_stage_model\.)?(?:decoder|encoder)\.(?:conv_in|mid_block|mid)\."),
        "a VAE",
    ),
    (re.compile(r"text_model\.|(?:.+\.)?resblocks\."), "a text encoder"),
)
_SD_UNET = re.compile(r"(?:.*\.)?(?:conv_in|input_blocks\.0\.0)\.weight")


def is_controlnet(names: Iterable[str]) -> bool:
    """Return True for the keys of a ControlNet, which has a UNet's own keys as well."""
    return any(_CONTROLNET.match(name) for name in names)


def foreign_kind(shapes: Mapping[str, Shape]) -> str:
    """Return what a weight file is that is neither a UNet nor a LoRA; empty where nothing tells.

    Args:
        shapes: Its keys and shapes.
    """
    if not shapes:
        return "an empty file, without a tensor"
    names = list(shapes)
    if any(".base_layer." in name for name in names):
        return (
            "a model saved with its adapters (it has "
            f"{next(name for name in names if '.base_layer.' in name)}); save it after "
            "fuse_lora and unload_lora_weights"
        )
    for pattern, kind in _KINDS:
        if any(pattern.match(name) for name in names):
            return kind
    is_pair = set(names) <= {"clip_l", "clip_g"} and all(len(s) == 2 for s in shapes.values())
    return "a textual-inversion embedding" if is_pair else ""
