"""TIES: the models elect a sign for every element, and those that agree are merged."""

from __future__ import annotations

from typing import Annotated

from merge.methods.arrays import kth_smallest, library, pieces, round_float32
from merge.methods.model import Array, Arrays, Limits, Weights

_DENSITY = Limits("part of each delta's elements that stays", 0, 1, is_open=True)
NORMALIZE = Limits("take the mean, not the sum, of those that agree")


def ties(
    target: Array,
    deltas: Arrays,
    weights: Weights,
    *,
    density: Annotated[float, _DENSITY] = 0.5,
    normalize: Annotated[bool, NORMALIZE] = True,
) -> None:
    """Trim, elect signs, merge what agrees; in place.

    1. Trim: each delta keeps its `density * elements` largest magnitudes (rounded down, at least
       one); equal magnitudes at the threshold all stay, so that no order decides between them.
    2. Elect: the sign of `sum_i w_i d_i`; a sum of zero counts as positive.
    3. Merge: `target + sum over agreeing i of w_i d_i`. With `normalize` that sum is divided by
       `sum over agreeing i of |w_i| / mean |w|`: with equal weights it is their mean times the
       weight.

    One delta at density 1 gives `add_difference` bit for bit.

    Args:
        target: Any shape, the whole tensor, float32; overwritten.
        deltas: Same shape each; overwritten.
        weights: One a delta.
        density: Part of each delta's elements that stays.
        normalize: True for a mean over the models that agree.

    Source:
        Yadav et al. 2023, TIES-Merging, arXiv:2306.01708. mergekit's `ties` at all weights 1;
        there, `normalize` also divides by the weights' own size and by their signs, which makes
        the weight of a single model do nothing.
    """
    for delta in deltas:
        trim(delta, density)
    elect_and_merge(target, deltas, weights, normalize)


def trim(delta: Array, density: float) -> None:
    """Set all but the largest magnitudes to zero, in place.

    Args:
        delta: Any shape, float32.
        density: Part of the elements that stays, above 0 and up to 1.
    """
    magnitudes = library(delta).abs(delta).reshape(-1)
    count = len(magnitudes)
    kept = max(1, int(density * count))
    if kept >= count:
        return
    threshold = kth_smallest(magnitudes, count - kept)
    for (piece,) in pieces(delta):
        piece *= library(delta).abs(piece) >= threshold


def elect_and_merge(target: Array, deltas: Arrays, weights: Weights, normalize: bool) -> None:
    """Add the weighted deltas that agree with the elected sign, in place; see `ties`.

    Args:
        target: Any shape, float32; overwritten.
        deltas: Same shape each; overwritten with the weighted deltas.
        weights: One a delta.
        normalize: True for a mean over the models that agree.
    """
    mean = sum(abs(weight) for weight in weights) / len(weights)
    shares = [round_float32(abs(weight) / mean) if mean else 1.0 for weight in weights]
    zeros = library(target).zeros_like
    for view, *parts in pieces(target, *deltas):
        total = zeros(view)
        for part, weight in zip(parts, weights, strict=True):
            part *= weight
            total += part
        is_positive = total >= 0
        merged, divisor = zeros(view), zeros(view)
        for part, share in zip(parts, shares, strict=True):
            agrees = ((part > 0) & is_positive) | ((part < 0) & ~is_positive)
            part *= agrees
            merged += part
            vote = zeros(view)
            vote += agrees
            vote *= share
            divisor += vote
        if normalize:
            divisor += divisor == 0
            merged /= divisor
        view += merged
