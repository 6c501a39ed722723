"""Variants of `add_difference` that scale the delta: per element or per tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from merge.methods.arrays import library, norm, round_float32, weighted_sum
from merge.methods.model import Array

# Makes up for the mask's mean, about one half, in supermerger and sd-mecha alike.
_TRAIN_FACTOR = 1.8


def train_difference(
    target: Array,
    deltas: Sequence[Array],
    weights: Sequence[float],
    params: Mapping[str, Any],
    key: str,
    start: int,
    parents: Sequence[tuple[Array, Array]],
) -> None:
    """Add each delta where the target is still far from the distilled model, in place.

    Computes `target + sum_i 1.8 w_i s_i d_i` with
    `s_i = |distilled_i - target| / (|distilled_i - target| + |d_i|)`, 0 where both are zero. An
    element that is the distilled model's already gains nothing.

    Args:
        target: Any shape, float32; overwritten.
        deltas: Same shape each, distilled - base; overwritten.
        weights: One a delta.
        params: None are used.
        key: Not used.
        start: Not used.
        parents: Distilled and base of each delta, same shape; left as they are.

    Source:
        `trainDifference` of https://github.com/hako-mikan/sd-webui-supermerger,
        `train_difference_mask` of https://github.com/ljleb/sd-mecha.
    """
    absolute = library(target).abs
    for delta, (distilled, _) in zip(deltas, parents, strict=True):
        distance = absolute(distilled - target)
        total = distance + absolute(delta)
        total += total == 0
        distance /= total
        delta *= distance
    target += weighted_sum(deltas, [round_float32(_TRAIN_FACTOR * w) for w in weights])


def capped_difference(
    target: Array,
    deltas: Sequence[Array],
    weights: Sequence[float],
    params: Mapping[str, Any],
    key: str,
    start: int,
) -> None:
    """Add the weighted deltas, scaled down where they would outgrow the target, in place.

    With `d = sum_i w_i d_i`: `target + d * min(1, cap * |target| / |d|)`, Euclidean norms over
    the tensor (under `channel_rule: first` over the channels that receive a delta). A tensor of
    zeros gains nothing. A delta within the cap is added as `add_difference` adds it.

    Args:
        target: Any shape, the whole tensor, float32; overwritten.
        deltas: Same shape each; overwritten.
        weights: One a delta.
        params: `cap`, above 0.
        key: Not used.
        start: Not used.

    Source:
        Clipping by norm, Pascanu et al. 2013, arXiv:1211.5063, section 3.2, applied to a task
        vector (arXiv:2212.04089) instead of a gradient.
    """
    delta = weighted_sum(deltas, weights)
    limit = params["cap"] * norm(target)
    length = norm(delta)
    if length > limit:
        delta *= round_float32(limit / length)
    target += delta
