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

    A score is a mean of logarithms: metrics have different sizes, and what counts is by which
    factor one cell is better than another.

    Attributes:
        name: Short.
        title: For people.
        meaning: What it is.
        metrics: What it is made of, each with its part; of shares the mean with a minus.
        is_share: True where the metric is a share of right answers.
    """

    name: str
    title: str
    meaning: str
    metrics: Mapping[str, int]
    is_share: bool = False

    def can_rank(self, values: Values) -> bool:
        """Return True where every sample has what is needed."""
        return all(
            name in values and all(value is not None for value in values[name])
            for name in self.metrics
        )

    def score(self, values: Values) -> float:
        """Return the score of a cell."""
        return float(self.scores(values, _ones(_count(values)))[0])

    def scores(self, values: Values, shares: Array) -> Array:
        """Return a score for each way to weight the samples.

        Args:
            values: Of the cell.
            shares: `(ways, samples)`, each row with the sum 1.
        """
        means = {name: shares @ np.array(values[name], dtype=np.float64) for name in self.metrics}
        if self.is_share:
            total: Array = -np.sum(list(means.values()), axis=0)
            return total
        # A mean of zero is a perfect answer, and has no logarithm.
        logs: Array = sum(
            (part * np.log(np.maximum(means[name], 1e-12)) for name, part in self.metrics.items()),
            start=np.zeros(len(shares)),
        )
        return logs / sum(self.metrics.values())


@dataclass(frozen=True, slots=True)
class Interval:
    """A value and its interval, of 95 % where nothing else is said.

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


def difference(
    ranking: Ranking, first: Values, second: Values, confidence: float = 0.95
) -> Interval:
    """Return by how much the first cell's score is larger, over the same samples.

    Args:
        ranking: What is compared.
        first: Values of a cell.
        second: Of the same samples.
        confidence: Of the interval; more where the cells were picked among many.

    Source: Efron 1979, the bootstrap; cells share the samples of each draw, so what they have in
    common cancels out.
    """
    shares = _draws(_count(first))
    gaps = ranking.scores(first, shares) - ranking.scores(second, shares)
    return _interval(ranking.score(first) - ranking.score(second), gaps, confidence)


def part(values: Values, indices: Sequence[int]) -> dict[str, tuple[float | None, ...]]:
    """Return the values of some samples."""
    return {name: tuple(found[index] for index in indices) for name, found in values.items()}


def _count(values: Values) -> int:
    return len(next(iter(values.values())))


def _interval(value: float, drawn: Array, confidence: float = 0.95) -> Interval:
    low, high = np.quantile(drawn, ((1 - confidence) / 2, (1 + confidence) / 2))
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
    "right",
    "Right edits",
    "share of the edits that are near to a known answer",
    {"right": 1},
    is_share=True,
)
# What ranked the demo's models best, of both sizes: the error of single steps says whether a model
# does what the target would, and what the target would change whether a picture came out whole.
SCORE = Ranking(
    "score",
    "Score",
    "the error of single steps, three times, and what the target would change, as a geometric mean",
    {"endpoint": 3, "residual": 1},
)
PATH_SCORE = Ranking(
    "score",
    "Score",
    "the distance to the target's own path and what the target would change, as a geometric mean",
    {"path": 1, "residual": 1},
)
PATH = Ranking("path", "Distance to the target's own path", "mean squared difference", {"path": 1})
RESIDUAL = Ranking(
    "residual", "What the target would change", "mean squared change", {"residual": 1}
)
RANKINGS = (RIGHT, SCORE, PATH_SCORE, PATH, RESIDUAL)
