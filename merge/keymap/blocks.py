"""The block names of A1111's block-weighted merges: BASE, IN00.., M00, OUT00..

Source: the extension sd-webui-supermerger, whose names number the blocks of LDM/SGM files. What
lies in no block (time and label embeddings, the last convolution, text encoders) is BASE.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from merge.keymap.unet import unet_to_ldm

BASE = "BASE"
_NAME = re.compile(r"(?P<side>IN|OUT|M)(?P<index>\d+)|BASE")
_LDM = re.compile(r"(?P<side>input_blocks|middle_block|output_blocks)\.(?P<index>\d+)\.")
_SIDES = {"input_blocks": "IN", "middle_block": "M", "output_blocks": "OUT"}


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


_RANK = {BASE: 0, "IN": 1, "M": 2, "OUT": 3}


def _block(ldm: str) -> str:
    match = _LDM.match(ldm)
    if match is None:
        return BASE
    # The three parts of the middle block are one.
    index = 0 if match["side"] == "middle_block" else int(match["index"])
    return f"{_SIDES[match['side']]}{index:02d}"
