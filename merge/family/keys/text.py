"""Text encoder keys: transformers' CLIP models and single files, both ways.

A single file holds CLIP-L as transformers names it, always with `text_model.`, and SDXL's second
encoder as OpenCLIP names it, with query, key and value fused and the projection transposed.
transformers from 5.6 on writes CLIPTextModel without the prefix, so both spellings are read.

Source: `convert_open_clip_checkpoint` in diffusers.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

from merge.errors import CheckpointError
from merge.family.keys.pairs import (
    FUSED,
    SAME,
    TRANSPOSED,
    UNKNOWN_KEY_HINT,
    KeyPair,
    checked_pairs,
    strip,
)

SD15_TEXT_PREFIX = "cond_stage_model.transformer."
SDXL_TEXT_PREFIX = "conditioner.embedders.0.transformer."
SDXL_TEXT_2_PREFIX = "conditioner.embedders.1.model."
TEXT_MODEL = "text_model."

_CLIP = re.compile(
    r"embeddings\.(?:token_embedding\.weight|position_embedding\.weight|position_ids)"
    r"|encoder\.layers\.\d+\.(?:self_attn\.(?:q|k|v|out)_proj|layer_norm[12]|mlp\.fc[12])"
    r"\.(?:weight|bias)"
    r"|final_layer_norm\.(?:weight|bias)"
)
_OPEN_TOP = {
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.weight": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
    "text_projection.weight": "text_projection",
}
_OPEN_TOP_BACK = {name: key for key, name in _OPEN_TOP.items()}
_OPEN_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
_OPEN_LAYER_BACK = {name: key for key, name in _OPEN_LAYER.items()}
_LAYER = re.compile(
    r"text_model\.encoder\.layers\.(?P<layer>\d+)\.(?P<module>.+)\.(?P<leaf>weight|bias)"
)
_BLOCK = re.compile(
    r"transformer\.resblocks\.(?P<layer>\d+)\."
    r"(?:attn\.in_proj_(?P<fused>weight|bias)|(?P<module>.+)\.(?P<leaf>weight|bias))"
)
_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


def clip_to_single(keys: Iterable[str], prefix: str) -> tuple[KeyPair, ...]:
    """Translate all keys of CLIP-L, spelled with or without `text_model.`.

    Args:
        keys: Of the text encoder's own file.
        prefix: `SD15_TEXT_PREFIX` or `SDXL_TEXT_PREFIX`.

    Raises:
        CheckpointError: a key is not one of CLIP's text model, or is there in both spellings.
    """
    pairs = []
    for key in sorted(keys):
        inner = key.removeprefix(TEXT_MODEL)
        if not _CLIP.fullmatch(inner):
            raise CheckpointError(f"{key}: this key of a text encoder has no name in a single file")
        pairs.append(KeyPair(key, prefix + TEXT_MODEL + inner))
    return checked_pairs(pairs, "text encoder keys")


def single_to_clip(names: Collection[str], prefix: str) -> tuple[KeyPair, ...]:
    """Translate CLIP-L's keys of a single file; other keys are passed over.

    Raises:
        CheckpointError: a key with this prefix is not one of CLIP's text model.
    """
    pairs = []
    for name in strip(names, prefix):
        inner = name.removeprefix(TEXT_MODEL)
        if not _CLIP.fullmatch(inner):
            raise CheckpointError(
                f"{prefix}{name}: this is no key of CLIP's text model", hint=UNKNOWN_KEY_HINT
            )
        pairs.append(KeyPair(TEXT_MODEL + inner, prefix + name))
    return checked_pairs(pairs, "text encoder keys")


def open_clip_to_single(keys: Iterable[str]) -> tuple[KeyPair, ...]:
    """Translate all keys of SDXL's second text encoder, but for its constant position_ids.

    Raises:
        CheckpointError: a key is not one of CLIP's, or the map is not one-to-one.
    """
    pairs = []
    for key in sorted(keys):
        full = key
        if not key.startswith((TEXT_MODEL, "text_projection.")):
            full = TEXT_MODEL + key
        if full.endswith("embeddings.position_ids"):
            continue
        found = _to_open(full)
        if found is None:
            raise CheckpointError(f"{key}: this key of text_encoder_2 has no name in a single file")
        name, form, part = found
        pairs.append(KeyPair(key, SDXL_TEXT_2_PREFIX + name, form, part))
    return checked_pairs(pairs, "text_encoder_2 keys")


def single_to_open_clip(names: Collection[str]) -> tuple[KeyPair, ...]:
    """Translate the second text encoder's keys of a single file; other keys are passed over.

    Raises:
        CheckpointError: a key with its prefix is not one of OpenCLIP's.
    """
    pairs: list[KeyPair] = []
    for name in strip(names, SDXL_TEXT_2_PREFIX):
        single = SDXL_TEXT_2_PREFIX + name
        if name == "logit_scale":
            continue
        if name in _OPEN_TOP_BACK:
            form = TRANSPOSED if name == "text_projection" else SAME
            pairs.append(KeyPair(_OPEN_TOP_BACK[name], single, form))
            continue
        match = _BLOCK.fullmatch(name)
        place = f"text_model.encoder.layers.{match['layer']}" if match else ""
        if match and match["fused"]:
            pairs += [
                KeyPair(f"{place}.{module}.{match['fused']}", single, FUSED, part)
                for part, module in enumerate(_QKV)
            ]
        elif match and match["module"] in _OPEN_LAYER_BACK:
            module = _OPEN_LAYER_BACK[match["module"]]
            pairs.append(KeyPair(f"{place}.{module}.{match['leaf']}", single))
        else:
            raise CheckpointError(
                f"{single}: this is no key of an OpenCLIP text model", hint=UNKNOWN_KEY_HINT
            )
    return checked_pairs(pairs, "text_encoder_2 keys")


def unknown_to_clip(names: Collection[str]) -> list[str]:
    """Return keys with a text encoder's prefix that are not one of its."""
    found = []
    for prefix in (SD15_TEXT_PREFIX, SDXL_TEXT_PREFIX):
        inner = strip(names, prefix)
        found += [prefix + n for n in inner if not _CLIP.fullmatch(n.removeprefix(TEXT_MODEL))]
    for name in strip(names, SDXL_TEXT_2_PREFIX):
        match = _BLOCK.fullmatch(name)
        is_layer = match and (match["fused"] or match["module"] in _OPEN_LAYER_BACK)
        if not is_layer and name not in _OPEN_TOP_BACK and name != "logit_scale":
            found.append(SDXL_TEXT_2_PREFIX + name)
    return found


def _to_open(key: str) -> tuple[str, str, int] | None:
    if key in _OPEN_TOP:
        return _OPEN_TOP[key], TRANSPOSED if key == "text_projection.weight" else SAME, 0
    match = _LAYER.fullmatch(key)
    if match is None:
        return None
    block = f"transformer.resblocks.{match['layer']}"
    if match["module"] in _QKV:
        return f"{block}.attn.in_proj_{match['leaf']}", FUSED, _QKV.index(match["module"])
    module = _OPEN_LAYER.get(match["module"])
    return (f"{block}.{module}.{match['leaf']}", SAME, 0) if module else None
