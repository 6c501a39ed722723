"""DARE: drop elements of each delta at random and scale up the rest."""

from __future__ import annotations

from typing import Annotated

from merge.methods.arrays import round_float32, weighted_sum
from merge.methods.model import Array, Arrays, Limits, Weights
from merge.methods.random_mask import keep_mask

# Fewer would leave next to nothing, and dividing by it overflows.
Kept = Annotated[float, Limits("part of each delta's elements that stays", 1e-6, 1)]
Seed = Annotated[int, Limits("of the random masks", 0, 2**63 - 1)]


def dare(
    target: Array,
    deltas: Arrays,
    weights: Weights,
    key: str,
    start: int,
    *,
    density: Kept = 0.5,
    seed: Seed = 0,
) -> None:
    """Add deltas of which a random part is dropped, in place.

    Computes `target + sum_i w_i m_i d_i / density` with `m_i` 1 at a random `density` of the
    elements and 0 elsewhere. The masks follow from seed, key, model and element alone. At density
    1 nothing is dropped.

    Args:
        target: Any shape, float32; overwritten.
        deltas: Same shape each; overwritten.
        weights: One a delta.
        key: Diffusers key of the tensor.
        start: Index of the first element.
        density: Part of the elements that stays.
        seed: Of the masks.

    Source:
        Yu et al. 2023, Language Models are Super Mario, arXiv:2311.03099. mergekit's `dare_linear`
        differs in its rescaling: to the L1 norm before the drop, not by `1 / density`.
    """
    drop(deltas, density, seed, key, start)
    target += weighted_sum(deltas, rescaled(weights, density))


def drop(deltas: Arrays, density: float, seed: int, key: str, start: int) -> None:
    """Set a random part of each delta to zero, in place."""
    for model, delta in enumerate(deltas):
        delta *= keep_mask(delta, density, seed, key, model, start)


def rescaled(weights: Weights, density: float) -> list[float]:
    """Return weights that make up for what is dropped, each rounded to float32."""
    return [round_float32(weight / density) for weight in weights]
