"""DARE and TIES together: drop at random, then merge what agrees."""

from __future__ import annotations

from typing import Annotated

from merge.methods.dare import Kept, Seed, drop, rescaled
from merge.methods.model import Array, Arrays, Weights
from merge.methods.ties import NORMALIZE, elect_and_merge


def dare_ties(
    target: Array,
    deltas: Arrays,
    weights: Weights,
    key: str,
    start: int,
    *,
    density: Kept = 0.5,
    seed: Seed = 0,
    # The default of mergekit: with the random drop few models meet in an element.
    normalize: Annotated[bool, NORMALIZE] = False,
) -> None:
    """Drop elements at random, then elect signs and merge what agrees, in place.

    As `ties` with the trim replaced by the random drop of `dare`, so each element stands alone
    and the tensor may come in blocks.

    Args:
        target: Any shape, float32; overwritten.
        deltas: Same shape each; overwritten.
        weights: One a delta.
        key: Diffusers key of the tensor.
        start: Index of the first element.
        density: Part of the elements that stays.
        seed: Of the masks.
        normalize: True for a mean over the models that agree.

    Source:
        arXiv:2311.03099 and arXiv:2306.01708; mergekit's `dare_ties`.
    """
    drop(deltas, density, seed, key, start)
    elect_and_merge(target, deltas, rescaled(weights, density), normalize)
