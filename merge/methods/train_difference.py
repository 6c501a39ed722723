"""Add a delta where the target is still far from the distilled model."""

from __future__ import annotations

from merge.methods.arrays import library, round_float32, weighted_sum
from merge.methods.model import Array, Arrays, Parents, Weights

# Makes up for the mask's mean, about one half, in supermerger and sd-mecha alike.
_FACTOR = 1.8


def train_difference(target: Array, deltas: Arrays, weights: Weights, parents: Parents) -> None:
    """Add each delta where the target is still far from the distilled model, in place.

    Computes `target + sum_i 1.8 w_i s_i d_i` with
    `s_i = |distilled_i - target| / (|distilled_i - target| + |d_i|)`, 0 where both are zero. An
    element that is the distilled model's already gains nothing.

    Args:
        target: Any shape, float32; overwritten.
        deltas: Same shape each, distilled - base; overwritten.
        weights: One a delta.
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
    target += weighted_sum(deltas, [round_float32(_FACTOR * w) for w in weights])
