"""Text encoder keys: transformers' CLIP models and single files, both ways.

A single file holds CLIP-L as transformers names it, always with `text_model.`, and SDXL's second
encoder as OpenCLIP names it, with query, key and value fused and the projection transposed.
transformers from 5.6 on writes CLIPTextModel without the prefix, so both spellings are read.

Source: `convert_open_clip_checkpoint` in diffusers.
"""

from __future__ import annotations

from dataclasses import replace

from merge.family.keys.pairs import FUSED, TRANSPOSED
from merge.family.keys.table import KeyTable, Row

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
    # A constant, and what only CLIP's training uses.
    Row("text_model.embeddings.position_ids", ""),
    Row("", "logit_scale"),
    *(
        Row(f"{_LAYER}.{key}.{{term}}", f"{_BLOCK}.{name}.{{term}}")
        for key, name in _MODULES.items()
    ),
    *(
        Row(f"{_LAYER}.{module}.{{term}}", f"{_BLOCK}.attn.in_proj_{{term}}", FUSED, part)
        for part, module in enumerate(_PROJECTIONS)
    ),
)


def _with_text_model(key: str) -> str:
    return key if key.startswith((TEXT_MODEL, "text_projection.")) else TEXT_MODEL + key


SD15_TEXT = KeyTable(
    "cond_stage_model.transformer.",
    # The second spelling is of single files; a folder's keys are respelled.
    [Row(key, name) for key in _CLIP for name in (key, key.removeprefix(TEXT_MODEL))],
    "text encoder keys",
    "a text encoder",
    "CLIP's text model",
    lambda key: TEXT_MODEL + key.removeprefix(TEXT_MODEL),
)
SDXL_TEXT = replace(SD15_TEXT, prefix="conditioner.embedders.0.transformer.")
SDXL_TEXT_2 = KeyTable(
    "conditioner.embedders.1.model.",
    _OPEN_CLIP,
    "text_encoder_2 keys",
    "text_encoder_2",
    "an OpenCLIP text model",
    _with_text_model,
)
