"""Text encoder keys: transformers' CLIP models and single files, both ways.

A single file holds CLIP-L as transformers names it, always with `text_model.`, and SDXL's second
encoder as OpenCLIP names it, with query, key and value fused and the projection transposed.
transformers from 5.6 on writes CLIPTextModel without the prefix, so both spellings are read.

Source: `convert_open_clip_checkpoint` in diffusers.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from merge.family.keys.pairs import FUSED, TRANSPOSED, KeyPair
from merge.family.keys.table import KeyTable, Row

SD15_TEXT_PREFIX = "cond_stage_model.transformer."
SDXL_TEXT_PREFIX = "conditioner.embedders.0.transformer."
SDXL_TEXT_2_PREFIX = "conditioner.embedders.1.model."
TEXT_MODEL = "text_model."

_LAYER, _BLOCK = "text_model.encoder.layers.{layer}", "transformer.resblocks.{layer}"
_PROJECTIONS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
# Modules of a layer, and what OpenCLIP calls them.
_MODULES = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
_CLIP = (
    "text_model.embeddings.token_embedding.weight",
    "text_model.embeddings.position_embedding.weight",
    "text_model.embeddings.position_ids",
    "text_model.final_layer_norm.{term}",
    *(f"{_LAYER}.{module}.{{term}}" for module in (*_MODULES, *_PROJECTIONS)),
)
_OPEN_CLIP = (
    Row("text_model.embeddings.token_embedding.weight", "token_embedding.weight"),
    Row("text_model.embeddings.position_embedding.weight", "positional_embedding"),
    Row("text_model.final_layer_norm.{term}", "ln_final.{term}"),
    Row("text_projection.weight", "text_projection", TRANSPOSED),
    *(
        Row(f"{_LAYER}.{key}.{{term}}", f"{_BLOCK}.{name}.{{term}}")
        for key, name in _MODULES.items()
    ),
    *(
        Row(f"{_LAYER}.{module}.{{term}}", f"{_BLOCK}.attn.in_proj_{{term}}", FUSED, part)
        for part, module in enumerate(_PROJECTIONS)
    ),
)


def clip_to_single(keys: Iterable[str], prefix: str) -> tuple[KeyPair, ...]:
    """Translate all keys of CLIP-L, spelled with or without `text_model.`.

    Args:
        keys: Of the text encoder's own file.
        prefix: `SD15_TEXT_PREFIX` or `SDXL_TEXT_PREFIX`.

    Raises:
        CheckpointError: a key is not one of CLIP's text model, or is there in both spellings.
    """
    return _CLIP_TABLE.to_single(keys, prefix)


def single_to_clip(names: Collection[str], prefix: str) -> tuple[KeyPair, ...]:
    """Translate CLIP-L's keys of a single file; other keys are passed over.

    Raises:
        CheckpointError: a key with this prefix is not one of CLIP's text model.
    """
    return _CLIP_TABLE.to_folder(names, prefix)


def open_clip_to_single(keys: Iterable[str]) -> tuple[KeyPair, ...]:
    """Translate all keys of SDXL's second text encoder, but for its constant position_ids.

    Raises:
        CheckpointError: a key is not one of CLIP's, or the map is not one-to-one.
    """
    stored = [key for key in keys if not _with_text_model(key).endswith("embeddings.position_ids")]
    return _OPEN_CLIP_TABLE.to_single(stored, SDXL_TEXT_2_PREFIX)


def single_to_open_clip(names: Collection[str]) -> tuple[KeyPair, ...]:
    """Translate the second text encoder's keys of a single file; other keys are passed over.

    Raises:
        CheckpointError: a key with its prefix is not one of OpenCLIP's.
    """
    return _OPEN_CLIP_TABLE.to_folder(_used(names), SDXL_TEXT_2_PREFIX)


def unknown_to_clip(names: Collection[str]) -> list[str]:
    """Return keys with a text encoder's prefix that are not one of its."""
    return [
        *_CLIP_TABLE.unknown(names, SD15_TEXT_PREFIX),
        *_CLIP_TABLE.unknown(names, SDXL_TEXT_PREFIX),
        *_OPEN_CLIP_TABLE.unknown(_used(names), SDXL_TEXT_2_PREFIX),
    ]


def _used(names: Collection[str]) -> list[str]:
    """Return keys of a single file without the one of CLIP's training."""
    return [name for name in names if name != f"{SDXL_TEXT_2_PREFIX}logit_scale"]


def _with_text_model(key: str) -> str:
    return key if key.startswith((TEXT_MODEL, "text_projection.")) else TEXT_MODEL + key


_CLIP_TABLE = KeyTable(
    # The second spelling is of single files; a folder's keys are respelled.
    [Row(key, name) for key in _CLIP for name in (key, key.removeprefix(TEXT_MODEL))],
    "text encoder keys",
    "a text encoder",
    "CLIP's text model",
    lambda key: TEXT_MODEL + key.removeprefix(TEXT_MODEL),
)
_OPEN_CLIP_TABLE = KeyTable(
    _OPEN_CLIP, "text_encoder_2 keys", "text_encoder_2", "an OpenCLIP text model", _with_text_model
)
