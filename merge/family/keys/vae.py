"""VAE keys: diffusers' AutoencoderKL and `first_stage_model.` of single files, both ways.

The decoder's blocks are numbered from the other end in single files, and the one attention layer is
made of 1x1 convolutions there. Old diffusers saves name that layer's parts differently.

Source: `convert_ldm_vae_checkpoint` in diffusers.
"""

from __future__ import annotations

import re

from merge.family.keys.pairs import POINTWISE
from merge.family.keys.table import KeyTable, Row

_SAME = ("{half}.conv_in", "{half}.conv_out", "quant_conv", "post_quant_conv")
_ATTENTION = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_RESNETS = {
    "{half}.mid_block.resnets.0": "{half}.mid.block_1",
    "{half}.mid_block.resnets.1": "{half}.mid.block_2",
    "encoder.down_blocks.{block}.resnets.{layer}": "encoder.down.{block}.block.{layer}",
    "decoder.up_blocks.{from_end}.resnets.{layer}": "decoder.up.{from_end}.block.{layer}",
}
_SAMPLERS = {
    "encoder.down_blocks.{block}.downsamplers.0.conv": "encoder.down.{block}.downsample.conv",
    "decoder.up_blocks.{from_end}.upsamplers.0.conv": "decoder.up.{from_end}.upsample.conv",
}
# As diffusers wrote attention before 0.17; its loader still renames it.
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_OLD_KEY = re.compile(r"(.+\.attentions\.\d+\.)(query|key|value|proj_attn)(\.\w+)")


def in_new_words(key: str) -> str:
    """Return a key as diffusers writes it since 0.17."""
    match = _OLD_KEY.fullmatch(key)
    return f"{match[1]}{_OLD_ATTENTION[match[2]]}{match[3]}" if match else key


def _rows() -> list[Row]:
    rows = [Row(f"{name}.{{leaf}}", f"{name}.{{leaf}}") for name in _SAME]
    rows.append(Row("{half}.conv_norm_out.{leaf}", "{half}.norm_out.{leaf}"))
    norm = "{half}.mid_block.attentions.0.group_norm.{leaf}"
    rows.append(Row(norm, "{half}.mid.attn_1.norm.{leaf}"))
    for folder, single in _ATTENTION.items():
        key, name = f"{{half}}.mid_block.attentions.0.{folder}", f"{{half}}.mid.attn_1.{single}"
        rows.append(Row(f"{key}.weight", f"{name}.weight", POINTWISE))
        rows.append(Row(f"{key}.{{leaf}}", f"{name}.{{leaf}}"))
    for folder, single in _RESNETS.items():
        rows.append(Row(f"{folder}.conv_shortcut.{{rest}}", f"{single}.nin_shortcut.{{rest}}"))
        rows.append(Row(f"{folder}.{{rest}}", f"{single}.{{rest}}"))
    for folder, single in _SAMPLERS.items():
        rows.append(Row(f"{folder}.{{leaf}}", f"{single}.{{leaf}}"))
    return rows


VAE_KEYS = KeyTable("first_stage_model.", _rows(), "VAE keys", "a VAE", "a VAE", in_new_words)
