"""Encode instructions with the text encoders of the checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from merge.editor.load import Editor

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False, slots=True)
class TextEmbedding:
    """An encoded instruction, in the UNet's dtype.

    Attributes:
        states: For the cross-attention, `(tokens, width)`.
        pooled: Of SDXL's second encoder, `(width,)`; None for SD1.5.
    """

    states: torch.Tensor
    pooled: torch.Tensor | None


def encode_texts(editor: Editor, texts: Sequence[str]) -> list[TextEmbedding]:
    """Encode instructions in one batch; what does not fit is cut off, with a warning.

    Source: `_encode_prompt` and `encode_prompt` of diffusers' InstructPix2Pix pipelines. SD1.5
    takes the last states behind the final norm, SDXL those before the last layer of both encoders
    side by side and the projected text of the second.
    """
    pipeline, dtype = editor.pipeline, editor.pipeline.unet.dtype
    if not editor.has_added_conditions:
        tokens = _tokenize(pipeline.tokenizer, pipeline.text_encoder, texts)
        mask = None
        if getattr(pipeline.text_encoder.config, "use_attention_mask", False):
            mask = tokens.attention_mask.to(editor.device)
        ids = tokens.input_ids.to(editor.device)
        states = pipeline.text_encoder(ids, attention_mask=mask)[0].to(dtype)
        return [TextEmbedding(row, None) for row in states]
    parts = []
    for tokenizer, encoder in _encoders(editor):
        ids = _tokenize(tokenizer, encoder, texts).input_ids.to(editor.device)
        output = encoder(ids, output_hidden_states=True)
        parts.append(output.hidden_states[-2])
    states = torch.cat(parts, dim=-1).to(dtype)
    # The second encoder's own first output is the projected text.
    pooled = output[0].to(dtype)
    return [TextEmbedding(row, text) for row, text in zip(states, pooled, strict=True)]


def empty_text(editor: Editor, like: TextEmbedding) -> TextEmbedding:
    """Return what stands for "no prompt": the encoded empty text, or zeros where SDXL asks for it.

    Args:
        editor: The checkpoint.
        like: Any of its embeddings.
    """
    if editor.has_added_conditions and editor.pipeline.config.force_zeros_for_empty_prompt:
        assert like.pooled is not None
        return TextEmbedding(torch.zeros_like(like.states), torch.zeros_like(like.pooled))
    return encode_texts(editor, [""])[0]


def warn_of_cuts(editor: Editor, text: str) -> None:
    """Say which end of an instruction the tokenizers leave out."""
    lost = []
    for tokenizer, encoder in _encoders(editor):
        limit = _token_limit(tokenizer, encoder)
        ids = tokenizer(text, verbose=False).input_ids
        if len(ids) > limit:
            # The last of those kept is the end mark.
            lost.append(tokenizer.decode(ids[limit - 1 : -1]).strip())
    for words in dict.fromkeys(lost):
        _LOG.warning("the instruction is too long; the model does not see: %s", words)


def _encoders(editor: Editor) -> list[tuple[Any, Any]]:
    """Return each tokenizer with its text encoder."""
    pipeline = editor.pipeline
    pairs = [(pipeline.tokenizer, pipeline.text_encoder)]
    if editor.has_added_conditions:
        pairs.append((pipeline.tokenizer_2, pipeline.text_encoder_2))
    # The pipeline class allows SDXL models with the second one only.
    return [(tokenizer, encoder) for tokenizer, encoder in pairs if encoder is not None]


def _tokenize(tokenizer: Any, encoder: Any, texts: Sequence[str]) -> Any:
    return tokenizer(
        list(texts),
        padding="max_length",
        max_length=_token_limit(tokenizer, encoder),
        truncation=True,
        return_tensors="pt",
    )


def _token_limit(tokenizer: Any, encoder: Any) -> int:
    # A tokenizer whose config names no length claims 10**30.
    return int(min(tokenizer.model_max_length, encoder.config.max_position_embeddings))
