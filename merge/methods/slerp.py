"""SLERP: along the arc from the target to the target with the delta."""

from __future__ import annotations

import math
from typing import Annotated

from merge.methods.arrays import dot, norm, pieces, round_float32, weighted_sum
from merge.methods.model import Array, Arrays, Limits, Weights

_T = Limits("0 for the target, 1 for the target with the whole delta", 0, 1)
# As in mergekit. Above it the sines are too small to divide by and the arc is a line to 4e-5.
_PARALLEL = 0.9995


def slerp(
    target: Array, deltas: Arrays, weights: Weights, *, t: Annotated[float, _T] = 0.5
) -> None:
    """Interpolate on the sphere between the target and the target with all deltas, in place.

    With `u = target`, `v = target + sum_i w_i d_i` and `o` the angle between them as vectors of
    all the tensor's elements: `sin((1 - t) o) / sin o * u + sin(t o) / sin o * v`, unnormalised.
    When they are nearly parallel or opposite, or one of them is zero and has no direction:
    `(1 - t) u + t v`. Fine-tuned models are nearly parallel in most tensors.

    `t` 0 gives the target and `t` 1 gives `v`. Angle and sines are computed in float64 on the
    host, whatever the arrays' device, and the two factors are rounded to float32.

    Args:
        target: Any shape, the whole tensor, float32; overwritten.
        deltas: Same shape each; overwritten.
        weights: One a delta.
        t: Within 0 to 1.

    Source:
        Shoemake 1985, Animating rotation with quaternion curves, doi:10.1145/325165.325242;
        threshold and lack of normalisation as in mergekit's `slerp`.
    """
    end = weighted_sum(deltas, weights)
    end += target
    near, far = _factors(t, target, end)
    for view, piece in pieces(target, end):
        view *= near
        piece *= far
        view += piece


def _factors(t: float, target: Array, end: Array) -> tuple[float, float]:
    """Return what target and end are multiplied with, as float32 numbers."""
    lengths = norm(target) * norm(end)
    # NaN takes the line too and so reaches the result.
    cosine = dot(target, end) / lengths if lengths > 0 else 1.0
    if not abs(cosine) <= _PARALLEL:
        return round_float32(1 - t), round_float32(t)
    angle = math.acos(cosine)
    sine = math.sin(angle)
    return (
        round_float32(math.sin((1 - t) * angle) / sine),
        round_float32(math.sin(t * angle) / sine),
    )
