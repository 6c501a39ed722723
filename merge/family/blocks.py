"""The blocks of a UNet: A1111's names for weights (BASE, IN00.., M00, OUT00..), groups for charts.

Source: the extension sd-webui-supermerger, whose names number the blocks of LDM/SGM files. What
lies in no block (time and label embeddings, the last convolution, text encoders) is BASE.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from merge.family.keys.unet import unet_to_ldm
from merge.family.model import Blocks

BASE = "BASE"
_NAME = re.compile(r"(?P<side>IN|OUT|M)(?P<index>\d+)|BASE")
_LDM = re.compile(r"(?P<side>input_blocks|middle_block|output_blocks)\.(?P<index>\d+)\.")
_SIDES = {"input_blocks": "IN", "middle_block": "M", "output_blocks": "OUT"}
_RANK = {BASE: 0, "IN": 1, "M": 2, "OUT": 3}
_NUMBERED = ("down_blocks", "up_blocks")
_GROUPS = ("conv_in", "time_embedding", "add_embedding", "down_blocks", "mid_block", "up_blocks")


def is_block_name(text: str) -> bool:
    """Return True for a word that has the form of a block name, whether or not it exists."""
    return _NAME.fullmatch(text) is not None


def unet_blocks(keys: Iterable[str]) -> dict[str, str]:
    """Return the block name of every key of one UNet.

    Args:
        keys: All diffusers keys of the UNet.

    Returns:
        E.g. `down_blocks.0.resnets.0.conv1.weight` to `IN01`.

    Raises:
        CheckpointError: a key is not one of a known UNet.
    """
    return {key: _block(ldm) for key, ldm in unet_to_ldm(keys).items()}


def block_order(names: Iterable[str]) -> list[str]:
    """Sort block names as data flows: BASE, IN00 on, M00, OUT00 on."""
    return sorted(set(names), key=lambda name: (_RANK[name.rstrip("0123456789")], name))


def layer_of(key: str) -> str:
    """Return the part of a key that names its layer, e.g. `down_blocks.0.resnets.0`."""
    parts = key.split(".")
    return ".".join(parts[:4] if parts[0] in _NUMBERED else parts[:1])


def group_of(key: str) -> str:
    """Return the block of the UNet that a tensor belongs to, e.g. `down_blocks.0`."""
    parts = key.split(".")
    if parts[0] in _NUMBERED:
        return ".".join(parts[:2])
    return "conv_out" if parts[0] == "conv_norm_out" else parts[0]


def group_rank(name: str) -> tuple[int, int, str]:
    """Order groups as data flows through the UNet."""
    stem, _, number = name.partition(".")
    rank = _GROUPS.index(stem) if stem in _GROUPS else len(_GROUPS)
    return rank, int(number) if number.isdecimal() else 0, stem


def _block(ldm: str) -> str:
    match = _LDM.match(ldm)
    if match is None:
        return BASE
    # The three parts of the middle block are one.
    index = 0 if match["side"] == "middle_block" else int(match["index"])
    return f"{_SIDES[match['side']]}{index:02d}"


UNET_BLOCKS = Blocks(
    unet_blocks,
    is_block_name,
    block_order,
    layer_of,
    ("IN", "M", "OUT"),
    BASE,
    group_of,
    group_rank,
)
