"""Add the deltas, but never more than a share of the target."""

from __future__ import annotations

from typing import Annotated

from merge.methods.arrays import norm, round_float32, weighted_sum
from merge.methods.model import Array, Arrays, Limits, Weights

_CAP = Limits("largest norm of a delta, in norms of the target", 0, 1e6, is_open=True)


def capped_difference(
    target: Array, deltas: Arrays, weights: Weights, *, cap: Annotated[float, _CAP] = 1.0
) -> None:
    """Add the weighted deltas, scaled down where they would outgrow the target, in place.

    With `d = sum_i w_i d_i`: `target + d * min(1, cap * |target| / |d|)`, Euclidean norms over
    the tensor (under `channel_rule: first` over the channels that receive a delta). A tensor of
    zeros gains nothing. A delta within the cap is added as `add_difference` adds it.

    Args:
        target: Any shape, the whole tensor, float32; overwritten.
        deltas: Same shape each; overwritten.
        weights: One a delta.
        cap: Above 0.

    Source:
        Clipping by norm, Pascanu et al. 2013, arXiv:1211.5063, section 3.2, applied to a task
        vector (arXiv:2212.04089) instead of a gradient.
    """
    delta = weighted_sum(deltas, weights)
    limit = cap * norm(target)
    length = norm(delta)
    if length > limit:
        delta *= round_float32(limit / length)
    target += delta
