"""Scores of cells, and the intervals that so few samples leave."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[np.float64]]
# Sample by sample values of a cell, by metric.
Values = Mapping[str, Sequence[float | None]]

_DRAWS, _SEED = 2000, 0


@dataclass(frozen=True, slots=True)
class Ranking:
    """How cells are put into an order, the lowest score first.

    Attributes:
        name: Short.
        title: For people.
        meaning: What it is.
        metrics: What it is made of: the sum of the logarithms of their means; of shares their mean
            with a minus.
    """

    name: str
    title: str
    meaning: str
    metrics: tuple[str, ...]
    is_share: bool = False

    def can_rank(self, values: Values) -> bool:
        """Return True where every sample has what is needed."""
        return all(
            name in values and all(value is not None for value in values[name])
            for name in self.metrics
        )

    def score(self, values: Values) -> float:
        """Return the score of a cell."""
        return float(self.scores(values, _ones(len(values[self.metrics[0]])))[0])

    def scores(self, values: Values, shares: Array) -> Array:
        """Return a score for each way to weight the samples.

        Args:
            values: Of the cell.
            shares: `(ways, samples)`, each row with the sum 1.
        """
        means = [shares @ np.array(values[name], dtype=np.float64) for name in self.metrics]
        if self.is_share:
            total: Array = -means[0]
            return total
        # A mean of zero is a perfect answer, and has no logarithm.
        logs: Array = np.sum([np.log(np.maximum(mean, 1e-12)) for mean in means], axis=0)
        return logs / len(means)


@dataclass(frozen=True, slots=True)
class Interval:
    """A value and its 95 % interval.

    Attributes:
        value: From all samples.
        low: Lower end.
        high: Upper end.
    """

    value: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Return True when zero is outside."""
        return self.low > 0 or self.high < 0


def score_interval(ranking: Ranking, values: Values) -> Interval:
    """Return the score of a cell, with the interval that other samples would leave."""
    return _interval(ranking.score(values), ranking.scores(values, _draws(_count(values))))


def difference(ranking: Ranking, first: Values, second: Values) -> Interval:
    """Return by how much the first cell's score is larger, over the same samples.

    Source: Efron 1979, the bootstrap; cells share the samples of each draw, so what they have in
    common cancels out.
    """
    shares = _draws(_count(first))
    gaps = ranking.scores(first, shares) - ranking.scores(second, shares)
    return _interval(ranking.score(first) - ranking.score(second), gaps)


def part(values: Values, indices: Sequence[int]) -> dict[str, tuple[float | None, ...]]:
    """Return the values of some samples."""
    return {name: tuple(found[index] for index in indices) for name, found in values.items()}


def _count(values: Values) -> int:
    return len(next(iter(values.values())))


def _interval(value: float, drawn: Array) -> Interval:
    low, high = np.percentile(drawn, (2.5, 97.5))
    return Interval(value, float(low), float(high))


def _ones(count: int) -> Array:
    return np.full((1, count), 1 / count)


@functools.lru_cache(maxsize=8)
def _draws(count: int) -> Array:
    """Return the shares that samples have in so many draws with replacement."""
    drawn = np.random.default_rng(_SEED).multinomial(count, np.full(count, 1 / count), size=_DRAWS)
    shares: Array = drawn / count
    return shares


RIGHT = Ranking(
    "right", "Right edits", "share of the edits that are near to a known answer", ("right",), True
)
BOTH = Ranking(
    "score",
    "Path and residual",
    "geometric mean of the distance to the target's own path and of what the target would change",
    ("path", "residual"),
)
PATH = Ranking("path", "Distance to the target's own path", "mean squared difference", ("path",))
RESIDUAL = Ranking("residual", "What the target would change", "mean squared change", ("residual",))
RANKINGS = (RIGHT, BOTH, PATH, RESIDUAL)
