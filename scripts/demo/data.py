"""Training data: pictures as latents and texts as token ids, drawn once from a seed."""

from __future__ import annotations

from dataclasses import dataclass

import models
import numpy as np
import torch
import transformers
import world


@dataclass(frozen=True, slots=True)
class Pool:
    """Edits ready to train on.

    Attributes:
        source: Unscaled latents of the pictures before, `(n, 4, 8, 8)`.
        outcome: Unscaled latents of the pictures after, `(n, 4, 8, 8)`.
        texts: Token ids of every different text, `(m, 12)`; row 0 is the empty text.
        source_caption: Row of each source's caption, `(n,)`.
        outcome_caption: Row of each outcome's caption, `(n,)`.
        instruction: Row of each instruction, `(n,)`.
        scale: What latents are multiplied by for the denoiser.
    """

    source: torch.Tensor
    outcome: torch.Tensor
    texts: torch.Tensor
    source_caption: torch.Tensor
    outcome_caption: torch.Tensor
    instruction: torch.Tensor
    scale: float

    def __len__(self) -> int:
        return len(self.source)


def make_pool(
    vae: torch.nn.Module,
    tokenizer: transformers.CLIPTokenizer,
    scale: float,
    seed: int,
    count: int,
) -> Pool:
    """Draw `count` edits and encode them."""
    edits = world.sample_edits(np.random.default_rng(seed), count)
    source_captions, outcome_captions = world.caption(edits.source), world.caption(edits.outcome)
    unique = sorted({*source_captions, *outcome_captions, *edits.instructions})
    rows = {text: row for row, text in enumerate(["", *unique])}
    ids = tokenizer(
        ["", *unique], padding="max_length", max_length=models.TEXT_LENGTH, return_tensors="pt"
    ).input_ids
    device = next(vae.parameters()).device

    def index(texts: list[str]) -> torch.Tensor:
        return torch.tensor([rows[text] for text in texts], device=device)

    return Pool(
        models.to_latents(vae, world.render(edits.source)),
        models.to_latents(vae, world.render(edits.outcome)),
        ids.to(device),
        index(source_captions),
        index(outcome_captions),
        index(edits.instructions),
        scale,
    )
