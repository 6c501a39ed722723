"""Where a curve over weights is lowest, and how sure that is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from merge.sweep.statistics import Ranking, Values, part

# Finer is no better than the samples are.
_STEP = 0.05


def lowest(points: Sequence[tuple[float, float]]) -> float:
    """Return the weight at the minimum of a parabola through the lowest point and its neighbours.

    Args:
        points: Weight and score, ascending by weight; at least one.
    """
    index = min(range(len(points)), key=lambda i: points[i][1])
    if not 0 < index < len(points) - 1:
        return points[index][0]
    (x0, y0), (x1, y1), (x2, y2) = points[index - 1 : index + 2]
    # Newton's divided differences.
    first, second = (y1 - y0) / (x1 - x0), (y2 - y1) / (x2 - x1)
    bend = (second - first) / (x2 - x0)
    if bend <= 0:
        return x1
    vertex = (x0 + x1) / 2 - first / (2 * bend)
    return min(max(vertex, x0), x2)


def rounded(weight: float) -> float:
    """Return a weight to the nearest twentieth."""
    return round(round(weight / _STEP) * _STEP, 2)


def pick(
    ranking: Ranking, curve: Mapping[float, Values], indices: Sequence[int] | None = None
) -> float:
    """Return the weight that some samples choose, not rounded.

    Args:
        ranking: What decides.
        curve: Weight to the values of its cell.
        indices: Of the samples; None for all of them.
    """
    points = [
        (weight, ranking.score(values if indices is None else part(values, indices)))
        for weight, values in sorted(curve.items())
    ]
    return lowest(points)


def folds(indices: Sequence[int], count: int = 4) -> tuple[tuple[int, ...], ...]:
    """Return samples in so many parts, every part with every kind that comes in turn."""
    return tuple(found for k in range(count) if (found := tuple(indices[k::count])))
