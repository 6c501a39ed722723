"""UNet keys: diffusers' names and those of LDM/SGM single files, both ways.

Tensors keep their shape and bytes; only names differ. Single-file names are without the prefix
`model.diffusion_model.`. The number of blocks and of layers in a block is read off the keys, so
that small models of a family are translated too.

Source: `convert_ldm_unet_checkpoint` in diffusers and its scripts
`convert_diffusers_to_original_stable_diffusion.py` and `..._sdxl.py`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from merge.errors import CheckpointError
from merge.family.keys.one_to_one import one_to_one

LDM_UNET_PREFIX = "model.diffusion_model."

_TOP = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_MID = {
    "resnets.0": "middle_block.0",
    "attentions.0": "middle_block.1",
    "resnets.1": "middle_block.2",
}
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_TOP_BACK = {ldm: name for name, ldm in _TOP.items()}
_MID_BACK = {ldm: name for name, ldm in _MID.items()}
_RESNET_BACK = {ldm: name for name, ldm in _RESNET.items()}

_BLOCK = re.compile(
    r"(?P<side>down|up)_blocks\.(?P<block>\d+)\."
    r"(?P<part>resnets|attentions|downsamplers|upsamplers)\.(?P<layer>\d+)\.(?P<rest>.+)"
)
_MID_PART = re.compile(r"mid_block\.(?P<part>(?:resnets|attentions)\.\d+)\.(?P<rest>.+)")
_LDM_BLOCK = re.compile(
    r"(?P<side>input|output)_blocks\.(?P<index>\d+)\.(?P<inner>\d+)\.(?P<rest>.+)"
)
_LDM_MID = re.compile(r"(?P<part>middle_block\.\d+)\.(?P<rest>.+)")


def unet_to_ldm(keys: Iterable[str]) -> dict[str, str]:
    """Translate diffusers keys of one UNet into single-file keys.

    Args:
        keys: All keys of the UNet, e.g. `down_blocks.0.resnets.0.conv1.weight`.

    Returns:
        Each key to its single-file name without the prefix.

    Raises:
        CheckpointError: a key has no single-file name, or two have the same.
    """
    keys = sorted(keys)
    layout = _Layout.of_diffusers(keys)
    return one_to_one(((key, _checked(key, layout.to_ldm(key))) for key in keys), "UNet keys")


def ldm_to_unet(names: Iterable[str]) -> dict[str, str]:
    """Translate single-file keys of one UNet, without their prefix, into diffusers keys.

    Raises:
        CheckpointError: a key has no diffusers name, or two have the same.
    """
    names = sorted(names)
    layout = _Layout.of_ldm(names)
    return one_to_one(((name, _checked(name, layout.to_diffusers(name))) for name in names), "UNet")


def unknown_to_unet(names: Iterable[str]) -> list[str]:
    """Return single-file keys of a UNet, without their prefix, that have no diffusers name."""
    names = sorted(names)
    layout = _Layout.of_ldm(names)
    return [name for name in names if layout.to_diffusers(name) is None]


def _checked(key: str, name: str | None) -> str:
    if name is None:
        raise CheckpointError(
            f"{key}: this key of a UNet has no counterpart in the other layout",
            hint="only Stable Diffusion 1.x, 2.x and XL UNets are known",
        )
    return name


@dataclass(frozen=True, slots=True)
class _Layout:
    """What the numbering depends on.

    Attributes:
        layers: Residual layers in a down block; an up block has one more.
        attending: Up blocks that have attention, which moves their upsampler to position 2.
    """

    layers: int
    attending: frozenset[int]

    @staticmethod
    def of_diffusers(keys: Collection[str]) -> _Layout:
        matches = [match for key in keys if (match := _BLOCK.match(key))]
        down = [m for m in matches if m["side"] == "down" and m["part"] == "resnets"]
        layers = 1 + max((int(m["layer"]) for m in down), default=0)
        up = (m for m in matches if m["side"] == "up" and m["part"] == "attentions")
        return _Layout(layers, frozenset(int(m["block"]) for m in up))

    @staticmethod
    def of_ldm(names: Collection[str]) -> _Layout:
        matches = [match for name in names if (match := _LDM_BLOCK.match(name))]
        down = [m for m in matches if m["side"] == "input"]
        samplers = [int(m["index"]) for m in down if m["rest"].startswith("op.")]
        last = max((int(m["index"]) for m in down), default=1)
        layers = max(1, min(samplers) - 1 if samplers else last)
        up = (m for m in matches if m["side"] == "output" and _is_attention(m))
        return _Layout(layers, frozenset(int(m["index"]) // (layers + 1) for m in up))

    def to_ldm(self, key: str) -> str | None:
        module, _, leaf = key.rpartition(".")
        if module in _TOP:
            return f"{_TOP[module]}.{leaf}"
        if match := _MID_PART.fullmatch(key):
            inner = _inner(match["part"].partition(".")[0], match["rest"], _RESNET)
            return f"{_MID[match['part']]}.{inner}" if inner and match["part"] in _MID else None
        match = _BLOCK.fullmatch(key)
        if match is None:
            return None
        block, layer, part = int(match["block"]), int(match["layer"]), match["part"]
        is_down = match["side"] == "down"
        first = block * (self.layers + 1)
        if part in ("resnets", "attentions"):
            inner = _inner(part, match["rest"], _RESNET)
            limit = self.layers if is_down else self.layers + 1
            if inner is None or layer >= limit:
                return None
            place = (
                f"input_blocks.{first + layer + 1}" if is_down else f"output_blocks.{first + layer}"
            )
            return f"{place}.{0 if part == 'resnets' else 1}.{inner}"
        if layer or not match["rest"].startswith("conv."):
            return None
        leaf = match["rest"].removeprefix("conv.")
        if part == "downsamplers" and is_down:
            return f"input_blocks.{first + self.layers + 1}.0.op.{leaf}"
        if part == "upsamplers" and not is_down:
            inner_index = 2 if block in self.attending else 1
            return f"output_blocks.{first + self.layers}.{inner_index}.conv.{leaf}"
        return None

    def to_diffusers(self, name: str) -> str | None:
        module, _, leaf = name.rpartition(".")
        if module in _TOP_BACK:
            return f"{_TOP_BACK[module]}.{leaf}"
        if match := _LDM_MID.fullmatch(name):
            part = _MID_BACK.get(match["part"])
            inner = _inner(part.partition(".")[0], match["rest"], _RESNET_BACK) if part else None
            return f"mid_block.{part}.{inner}" if inner else None
        match = _LDM_BLOCK.fullmatch(name)
        if match is None:
            return None
        index, place, rest = int(match["index"]), int(match["inner"]), match["rest"]
        is_down = match["side"] == "input"
        block, layer = divmod(index - 1 if is_down else index, self.layers + 1)
        prefix = f"{'down' if is_down else 'up'}_blocks.{block}"
        if is_down and layer == self.layers:
            if place == 0 and rest.startswith("op."):
                return f"{prefix}.downsamplers.0.conv.{rest.removeprefix('op.')}"
            return None
        if place == 0:
            inner = _inner("resnets", rest, _RESNET_BACK)
            return f"{prefix}.resnets.{layer}.{inner}" if inner else None
        if rest.startswith("conv."):
            is_sampler = not is_down and layer == self.layers
            is_sampler &= place == (2 if block in self.attending else 1)
            return f"{prefix}.upsamplers.0.{rest}" if is_sampler else None
        return f"{prefix}.attentions.{layer}.{rest}" if place == 1 else None


def _is_attention(match: re.Match[str]) -> bool:
    return match["inner"] == "1" and not match["rest"].startswith("conv.")


def _inner(part: str, rest: str, resnet: dict[str, str]) -> str | None:
    """Translate the name inside a block; attention layers have the same names on both sides."""
    if part == "attentions":
        return rest
    module, _, leaf = rest.rpartition(".")
    return f"{resnet[module]}.{leaf}" if module in resnet else None
