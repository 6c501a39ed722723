"""Weight files that people name as a model, and are something else."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

Shape = tuple[int, ...]

_CONTROLNET = r"control_model\.|controlnet_cond_embedding\.|controlnet_down_blocks\."
# What some keys of a file begin with, and what it then is.
_KINDS = {
    r"emb_params|string_to_(?:param|token)(?:\.|$)|<[^>]+>": "a textual-inversion embedding",
    r"image_proj(?:_model)?\.|ip_adapter\.|adapter_modules\.": "an IP-Adapter",
    _CONTROLNET: "a ControlNet",
    r"adapter\.(?:body|conv_in|unshuffle)\.": "a T2I-Adapter",
    r"(?:.+\.)?motion_modules\.": "a motion module of AnimateDiff",
    r"hypernetwork|\d+\.(?:0|1)\.linear": "a hypernetwork",
    r"(?:.*\.)?(?:transformer_blocks\.0\.img_mlp|double_blocks\.0)\.": "a transformer",
    r"(?:first_stage_model\.)?(?:decoder|encoder)\.(?:conv_in|mid_block|mid)\.": "a VAE",
    r"text_model\.|(?:.+\.)?resblocks\.": "a text encoder",
}


def is_controlnet(names: Iterable[str]) -> bool:
    """Return True for the keys of a ControlNet, which has a UNet's own keys as well."""
    return any(re.match(_CONTROLNET, name) for name in names)


def foreign_kind(shapes: Mapping[str, Shape]) -> str:
    """Return what a weight file is that is neither a UNet nor a LoRA; empty where nothing tells.

    Args:
        shapes: Its keys and shapes.
    """
    if not shapes:
        return "an empty file, without a tensor"
    names = list(shapes)
    if adapted := next((name for name in names if ".base_layer." in name), ""):
        return (
            f"a model saved with its adapters (it has {adapted}); save it after fuse_lora and "
            "unload_lora_weights"
        )
    for pattern, kind in _KINDS.items():
        if any(re.match(pattern, name) for name in names):
            return kind
    is_pair = set(names) <= {"clip_l", "clip_g"} and all(len(s) == 2 for s in shapes.values())
    return "a textual-inversion embedding" if is_pair else ""
