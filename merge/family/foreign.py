"""For which kind of model a LoRA was made, where its keys tell that it is another one."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

from merge.family.model import Family, Shape, Shapes

# Width of the text that cross-attention reads, and who reads such a text.
_WIDTHS = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 2048: "SDXL"}
# Names of layers that no UNet has.
_OTHERS = {
    r"(?:^|[._])(?:double_blocks|single_blocks|single_transformer_blocks)[._]": "FLUX",
    r"(?:^|[._])joint_blocks[._]": "Stable Diffusion 3",
    r"transformer_blocks[._]\d+[._](?:img_mlp|txt_mlp|ff_context)": "a transformer",
    r"(?:^|[._])blocks[._]\d+[._](?:self_attn|cross_attn|ffn)[._]": "Wan",
}
# Layers that one kind of UNet has and the other has not, in both layouts: SDXL has several
# transformer blocks in a row, Stable Diffusion 1.x and 2.x have attention in the first block, and a
# fourth one.
_LAYERS = {
    r"transformer_blocks[._][1-9]": "SDXL",
    r"down_blocks[._](?:0[._]attentions|3)[._]|up_blocks[._]3[._]"
    r"|input_blocks[._][12][._]1[._]|output_blocks[._](?:9|10|11)[._]": (
        "Stable Diffusion 1.x or 2.x"
    ),
}


def foreign_lora(
    names: Collection[str], downs: Iterable[tuple[str, Shape]], target: Shapes, family: Family
) -> str:
    """Return a line when a LoRA was made for another kind of model; empty where it was not.

    Args:
        names: The LoRA's keys.
        downs: Name of each module to the shape of its `down`.
        target: The main component's keys and shapes.
        family: Its architecture.
    """
    others = {
        pattern: words
        for pattern, words in _OTHERS.items()
        if not any(re.search(pattern, key) for key in target)
    }
    for name in names:
        other = next((words for pattern, words in others.items() if re.search(pattern, name)), "")
        if other:
            what = f"the target is a {family.main.title}"
            return f"it is a LoRA for {other} (it has {name}), and {what}"
    theirs = _context(downs)
    ours = _context((key.removesuffix(".weight"), shape) for key, shape in target.items())
    if not theirs or not ours or theirs == ours:
        return _foreign_layers(names, target)
    words = [_WIDTHS.get(width, f"width {width}") for width in (theirs, ours)]
    return (
        f"it looks like a LoRA for {words[0]}, and the target is {words[1]}: its cross-attention "
        f"reads a text of width {theirs}, the target's one of {ours}"
    )


def _foreign_layers(names: Iterable[str], target: Shapes) -> str:
    for pattern, kind in _LAYERS.items():
        found = next((name for name in names if re.search(pattern, name)), "")
        if found and not any(re.search(pattern, key) for key in target):
            return f"it looks like a LoRA for {kind}: the target has no layer such as {found}"
    return ""


def _context(weights: Iterable[tuple[str, Shape]]) -> int:
    return next(
        (
            shape[1]
            for name, shape in weights
            if "attn2" in name and name.endswith(("to_k", "to_v", "to_k_lora", "to_v_lora"))
            if len(shape) > 1
        ),
        0,
    )
