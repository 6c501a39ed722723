"""VAE keys: diffusers' AutoencoderKL and `first_stage_model.` of single files, both ways.

The decoder's blocks are numbered from the other end in single files, and the one attention layer is
made of 1x1 convolutions there. Old diffusers saves name that layer's parts differently.

Source: `convert_ldm_vae_checkpoint` in diffusers.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

from merge.errors import CheckpointError
from merge.family.keys.pairs import (
    POINTWISE,
    SAME,
    UNKNOWN_KEY_HINT,
    KeyPair,
    checked_pairs,
    strip,
)

VAE_PREFIX = "first_stage_model."

_ATTENTION = {
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}
_ATTENTION_BACK = {ldm: name for name, ldm in _ATTENTION.items()}
# As diffusers wrote them before 0.17.
_OLD_ATTENTION = {"query": "q", "key": "k", "value": "v", "proj_attn": "proj_out"}
_MID = {"resnets.0": "block_1", "resnets.1": "block_2"}
_MID_BACK = {ldm: name for name, ldm in _MID.items()}

_LAYER = re.compile(
    r"(?P<half>encoder|decoder)\.(?P<side>down|up)_blocks\.(?P<block>\d+)\."
    r"(?:resnets\.(?P<layer>\d+)\.(?P<rest>.+)|(?:down|up)samplers\.0\.conv\.(?P<leaf>\w+))"
)
_MID_LAYER = re.compile(
    r"(?P<half>encoder|decoder)\.mid_block\."
    r"(?:(?P<resnet>resnets\.\d+)\.(?P<rest>.+)|attentions\.0\.(?P<module>.+)\.(?P<leaf>\w+))"
)
_TOP = re.compile(
    r"(?:(?:encoder|decoder)\.(?:conv_in|conv_norm_out|conv_out)|quant_conv|post_quant_conv)\.\w+"
)
_LDM_LAYER = re.compile(
    r"(?P<half>encoder|decoder)\.(?P<side>down|up)\.(?P<block>\d+)\."
    r"(?:block\.(?P<layer>\d+)\.(?P<rest>.+)|(?:down|up)sample\.conv\.(?P<leaf>\w+))"
)
_LDM_MID = re.compile(
    r"(?P<half>encoder|decoder)\.mid\."
    r"(?:(?P<resnet>block_\d)\.(?P<rest>.+)|attn_1\.(?P<module>\w+)\.(?P<leaf>\w+))"
)
_LDM_TOP = re.compile(
    r"(?:(?:encoder|decoder)\.(?:conv_in|norm_out|conv_out)|quant_conv|post_quant_conv)\.\w+"
)


def vae_to_single(keys: Iterable[str]) -> tuple[KeyPair, ...]:
    """Translate all diffusers keys of a VAE; old spellings of its attention are understood.

    Raises:
        CheckpointError: a key is not one of an AutoencoderKL, or the map is not one-to-one.
    """
    keys = sorted(keys)
    last = _last_block(keys, _LAYER)
    pairs = []
    for key in keys:
        found = _to_ldm(key, last)
        if found is None:
            raise CheckpointError(f"{key}: this key of a VAE has no name in a single file")
        name, form = found
        pairs.append(KeyPair(key, VAE_PREFIX + name, form))
    return checked_pairs(pairs, "VAE keys")


def single_to_vae(names: Collection[str]) -> tuple[KeyPair, ...]:
    """Translate the VAE's keys of a single file; other keys are passed over.

    Raises:
        CheckpointError: a key with the VAE's prefix is not one of its, or two become one.
    """
    inner = strip(names, VAE_PREFIX)
    last = _last_block(inner, _LDM_LAYER)
    pairs = []
    for name in inner:
        found = _to_diffusers(name, last)
        if found is None:
            raise CheckpointError(
                f"{VAE_PREFIX}{name}: this is no key of a VAE", hint=UNKNOWN_KEY_HINT
            )
        key, form = found
        pairs.append(KeyPair(key, VAE_PREFIX + name, form))
    return checked_pairs(pairs, "VAE keys")


def unknown_to_vae(names: Collection[str]) -> list[str]:
    """Return keys with the VAE's prefix that are not one of its."""
    inner = strip(names, VAE_PREFIX)
    last = _last_block(inner, _LDM_LAYER)
    return [VAE_PREFIX + name for name in inner if _to_diffusers(name, last) is None]


def _last_block(keys: Iterable[str], pattern: re.Pattern[str]) -> int:
    matches = (match for key in keys if (match := pattern.match(key)))
    return max((int(m["block"]) for m in matches if m["half"] == "decoder"), default=0)


def _to_ldm(key: str, last: int) -> tuple[str, str] | None:
    if _TOP.fullmatch(key):
        return key.replace("conv_norm_out", "norm_out"), SAME
    if match := _MID_LAYER.fullmatch(key):
        mid = f"{match['half']}.mid"
        if match["resnet"]:
            part = _MID.get(match["resnet"])
            return (f"{mid}.{part}.{_shortcut(match['rest'])}", SAME) if part else None
        module = _ATTENTION.get(match["module"]) or _OLD_ATTENTION.get(match["module"])
        return (f"{mid}.attn_1.{module}.{match['leaf']}", _form(module, match)) if module else None
    match = _LAYER.fullmatch(key)
    if match is None or (match["side"] == "up") != (match["half"] == "decoder"):
        return None
    place = f"{match['half']}.{match['side']}.{_numbered(match, last)}"
    if match["leaf"]:
        return f"{place}.{match['side']}sample.conv.{match['leaf']}", SAME
    return f"{place}.block.{match['layer']}.{_shortcut(match['rest'])}", SAME


def _to_diffusers(name: str, last: int) -> tuple[str, str] | None:
    if _LDM_TOP.fullmatch(name):
        return re.sub(r"\bnorm_out\b", "conv_norm_out", name), SAME
    if match := _LDM_MID.fullmatch(name):
        mid = f"{match['half']}.mid_block"
        if match["resnet"]:
            part = _MID_BACK.get(match["resnet"])
            return (f"{mid}.{part}.{_shortcut_back(match['rest'])}", SAME) if part else None
        module = _ATTENTION_BACK.get(match["module"])
        if module is None:
            return None
        return f"{mid}.attentions.0.{module}.{match['leaf']}", _form(match["module"], match)
    match = _LDM_LAYER.fullmatch(name)
    if match is None or (match["side"] == "up") != (match["half"] == "decoder"):
        return None
    place = f"{match['half']}.{match['side']}_blocks.{_numbered(match, last)}"
    if match["leaf"]:
        return f"{place}.{match['side']}samplers.0.conv.{match['leaf']}", SAME
    return f"{place}.resnets.{match['layer']}.{_shortcut_back(match['rest'])}", SAME


def _numbered(match: re.Match[str], last: int) -> int:
    block = int(match["block"])
    return last - block if match["half"] == "decoder" else block


def _form(module: str, match: re.Match[str]) -> str:
    return POINTWISE if module != "norm" and match["leaf"] == "weight" else SAME


def _shortcut(rest: str) -> str:
    return rest.replace("conv_shortcut.", "nin_shortcut.")


def _shortcut_back(rest: str) -> str:
    return rest.replace("nin_shortcut.", "conv_shortcut.")
