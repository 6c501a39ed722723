"""UNet keys: diffusers' names and those of LDM/SGM single files, both ways.

Tensors keep their shape and bytes; only names differ. Single-file names are without the prefix
`model.diffusion_model.`. The number of blocks and of layers in a block is read off the keys, so
that small models of a family are translated too.

Source: `convert_ldm_unet_checkpoint` in diffusers and its scripts
`convert_diffusers_to_original_stable_diffusion.py` and `..._sdxl.py`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
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
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}

_BLOCK = re.compile(r"(?P<side>down|up)_blocks\.(?P<block>\d+)\.(?P<part>\w+)\.(?P<layer>\d+)\.")
_IN_ATTENTION = re.compile(
    r"(?P<place>(?:mid_block|(?:down|up)_blocks\.\d+)\.attentions\.\d+"
    r"|middle_block\.1|(?:input|output)_blocks\.\d+\.1(?!\.conv\.))\.(?P<rest>.+)"
)
_LDM_BLOCK = re.compile(
    r"(?P<side>input|output)_blocks\.(?P<index>\d+)\.(?P<inner>\d+)\.(?P<rest>.+)"
)


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
    return one_to_one(_checked(_Layout.of_diffusers(keys).to_ldm(keys)), "UNet keys")


def ldm_to_unet(names: Iterable[str]) -> dict[str, str]:
    """Translate single-file keys of one UNet, without their prefix, into diffusers keys.

    Raises:
        CheckpointError: a key has no diffusers name, or two have the same.
    """
    names = sorted(names)
    return one_to_one(_checked(_Layout.of_ldm(names).to_diffusers(names)), "UNet")


def unknown_to_unet(names: Iterable[str]) -> list[str]:
    """Return single-file keys of a UNet, without their prefix, that have no diffusers name."""
    names = sorted(names)
    return [name for name, key in _Layout.of_ldm(names).to_diffusers(names) if key is None]


def _checked(translated: Iterable[tuple[str, str | None]]) -> Iterator[tuple[str, str]]:
    for key, name in translated:
        if name is None:
            raise CheckpointError(
                f"{key}: this key of a UNet has no counterpart in the other layout",
                hint="only Stable Diffusion 1.x, 2.x and XL UNets are known",
            )
        yield key, name


@dataclass(frozen=True, slots=True)
class _Layout:
    """What the numbering depends on.

    Attributes:
        blocks: Down blocks, and up blocks.
        layers: Residual layers in a down block; an up block has one more.
        attending: Up blocks that have attention, which moves their upsampler to position 2.
    """

    blocks: int
    layers: int
    attending: frozenset[int]

    @staticmethod
    def of_diffusers(keys: Collection[str]) -> _Layout:
        matches = [match for key in keys if (match := _BLOCK.match(key))]
        down = [m for m in matches if m["side"] == "down" and m["part"] == "resnets"]
        layers = 1 + max((int(m["layer"]) for m in down), default=0)
        up = (m for m in matches if m["side"] == "up" and m["part"] == "attentions")
        blocks = 1 + max((int(m["block"]) for m in matches), default=0)
        return _Layout(blocks, layers, frozenset(int(m["block"]) for m in up))

    @staticmethod
    def of_ldm(names: Collection[str]) -> _Layout:
        matches = [match for name in names if (match := _LDM_BLOCK.match(name))]
        down = [m for m in matches if m["side"] == "input"]
        samplers = [int(m["index"]) for m in down if m["rest"].startswith("op.")]
        last = max((int(m["index"]) for m in down), default=1)
        layers = max(1, min(samplers) - 1 if samplers else last)
        up = (m for m in matches if m["side"] == "output" and _is_attention(m))
        blocks = 1 + max((int(m["index"]) for m in matches), default=0) // (layers + 1)
        return _Layout(blocks, layers, frozenset(int(m["index"]) // (layers + 1) for m in up))

    def to_ldm(self, keys: Iterable[str]) -> list[tuple[str, str | None]]:
        modules = self._modules()
        return [(key, _renamed(key, modules)) for key in keys]

    def to_diffusers(self, names: Iterable[str]) -> list[tuple[str, str | None]]:
        modules = {ldm: module for module, ldm in self._modules().items()}
        return [(name, _renamed(name, modules)) for name in names]

    def _modules(self) -> dict[str, str]:
        """Return every module to its single-file name; inside attention both have the same."""
        found = {**_TOP, "mid_block.attentions.0": "middle_block.1"}
        resnets = {"mid_block.resnets.0": "middle_block.0", "mid_block.resnets.1": "middle_block.2"}
        for block in range(self.blocks):
            down, up = f"down_blocks.{block}", f"up_blocks.{block}"
            first = block * (self.layers + 1)
            last = first + self.layers
            places = {(down, n): f"input_blocks.{first + n + 1}" for n in range(self.layers)}
            places |= {(up, n): f"output_blocks.{first + n}" for n in range(self.layers + 1)}
            for (side, layer), place in places.items():
                resnets[f"{side}.resnets.{layer}"] = f"{place}.0"
                found[f"{side}.attentions.{layer}"] = f"{place}.1"
            inner = 2 if block in self.attending else 1
            found[f"{down}.downsamplers.0.conv"] = f"input_blocks.{last + 1}.0.op"
            found[f"{up}.upsamplers.0.conv"] = f"output_blocks.{last}.{inner}.conv"
        for resnet, ldm in resnets.items():
            found |= {f"{resnet}.{part}": f"{ldm}.{other}" for part, other in _RESNET.items()}
        return found


def _is_attention(match: re.Match[str]) -> bool:
    return match["inner"] == "1" and not match["rest"].startswith("conv.")


def _renamed(key: str, modules: Mapping[str, str]) -> str | None:
    """Return a key in the other layout; None where it has none."""
    module, _, leaf = key.rpartition(".")
    if module not in modules:
        match = _IN_ATTENTION.fullmatch(key)
        module, leaf = (match["place"], match["rest"]) if match else ("", "")
    return f"{modules[module]}.{leaf}" if module in modules else None
