"""A full LCM's guidance embedding, folded into a bias for one guidance scale.

An LCM adds `cond_proj @ e(w)` to the input of `time_embedding.linear_1`, with e a sinusoidal
embedding of its guidance. InstructPix2Pix pipelines never feed it. For one fixed guidance scale the
term is a constant, so the same network has `linear_1 @ (cond_proj @ e)` added to that layer's bias.

Source: `get_guidance_scale_embedding` of diffusers' latent consistency pipelines, and
`TimestepEmbedding.forward`; Luo et al. 2023, arXiv:2310.04378, for the embedding itself.
"""

from __future__ import annotations

import math
from typing import Any

# numpy.ndarray or torch.Tensor in float64.
Array = Any


def guidance_embedding(guidance_scale: float, size: int) -> list[float]:
    """Return the embedding of a guidance scale as an LCM was trained with it.

    Args:
        guidance_scale: As users write it; models were trained on `guidance_scale - 1`.
        size: Number of values, the second dimension of `cond_proj`; 256 in published models.

    Returns:
        `size` sines and cosines of `1000 * (guidance_scale - 1)` at falling frequencies.
    """
    value = 1000.0 * (guidance_scale - 1.0)
    half = size // 2
    step = math.log(10000.0) / max(half - 1, 1)
    angles = [value * math.exp(-step * index) for index in range(half)]
    return [*map(math.sin, angles), *map(math.cos, angles), *([0.0] * (size % 2))]


def bake_bias(linear: Array, cond_proj: Array, embedding: Array, weight: float) -> Array:
    """Return what a bias gains when the embedding's part is made constant.

    Args:
        linear: `(out, in)`, the merged weight of `time_embedding.linear_1`, float64.
        cond_proj: `(in, size)`, float64.
        embedding: `(size,)`, float64.
        weight: Of the delta; the base's missing `cond_proj` counts as zero.

    Returns:
        `(out,)`: `linear @ (weight * (cond_proj @ embedding))`.
    """
    return linear @ ((cond_proj @ embedding) * weight)
