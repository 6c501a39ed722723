"""Where a curve over weights is lowest, and how sure that is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from merge.grid.statistics import Ranking, Values, part

# Finer is no better than the samples are.
_STEP = 0.05
# Points that a curve is fitted to at least, and where its minimum is looked for.
_LEAST = 5
_GRID = 601


def lowest(points: Sequence[tuple[float, float]]) -> float:
    """Return the weight at the minimum of a smooth curve through the points.

    A cubic by least squares over the half of the weights that is nearest to the lowest point: three
    points alone would follow their noise, and the curves are steeper on one side.

    Args:
        points: Weight and score, ascending by weight; at least one.
    """
    every = np.array(points, dtype=np.float64)
    start = every[int(every[:, 1].argmin()), 0]
    distances = np.abs(every[:, 0] - start)
    window = max((every[-1, 0] - every[0, 0]) / 2, np.sort(distances)[:_LEAST].max())
    weights, values = every[distances <= window + 1e-9].T
    if len(weights) < 3:
        return float(start)
    degree = min(3, max(2, len(weights) - 2))
    # Around the middle, where powers of the weights are small.
    middle = float(weights.mean())
    curve = np.polynomial.polynomial.polyfit(weights - middle, values, degree)
    grid = np.linspace(weights[0], weights[-1], _GRID)
    fitted = np.polynomial.polynomial.polyval(grid - middle, curve)
    return float(grid[int(fitted.argmin())])


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
