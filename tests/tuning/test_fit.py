"""Where curves over weights are lowest."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from merge.grid.statistics import Ranking
from merge.tuning.fit import folds, lowest, pick, rounded

WEIGHTS = [index / 4 for index in range(7)]
PLAIN = Ranking("plain", "", "", {"value": 1})


@given(st.floats(0.3, 1.2), st.floats(0.1, 10), st.floats(-5, 5))
def test_the_minimum_of_a_parabola_is_found(best: float, bend: float, height: float) -> None:
    points = [(weight, height + bend * (weight - best) ** 2) for weight in WEIGHTS]
    assert lowest(points) == pytest.approx(best, abs=0.005)


@given(st.floats(0.4, 1.1))
def test_the_minimum_of_a_lopsided_curve_is_found(best: float) -> None:
    # Steeper on the right, as too large weights are.
    points = [(w, (w - best) ** 2 * (1 + 0.4 * (w - best))) for w in WEIGHTS]
    assert lowest(points) == pytest.approx(best, abs=0.01)


def test_noise_of_one_point_does_not_decide() -> None:
    points = [(weight, (weight - 0.75) ** 2) for weight in WEIGHTS]
    points[1] = (0.25, -0.05)
    assert 0.4 < lowest(points) < 0.8


def test_at_the_ends_the_end_is_taken() -> None:
    assert lowest([(weight, weight) for weight in WEIGHTS]) == 0
    assert lowest([(weight, -weight) for weight in WEIGHTS]) == 1.5


def test_few_points_are_enough() -> None:
    assert lowest([(0.5, 1.0)]) == 0.5
    assert lowest([(0.5, 1.0), (1.0, 0.5)]) == 1.0
    assert lowest([(0.0, 1.0), (0.5, 0.0), (1.0, 1.0)]) == pytest.approx(0.5, abs=0.005)


def test_uneven_weights_are_no_matter() -> None:
    weights = [0.0, 0.25, 0.5, 0.6, 0.75, 0.85, 1.0, 1.5]
    assert lowest([(w, (w - 0.7) ** 2) for w in weights]) == pytest.approx(0.7, abs=0.005)


@given(st.floats(0, 2))
def test_weights_are_rounded_to_twentieths(weight: float) -> None:
    found = rounded(weight)
    assert abs(found - weight) <= 0.025 + 1e-9
    assert found * 20 == pytest.approx(round(found * 20))


@given(st.integers(1, 50), st.integers(1, 6))
def test_folds_share_the_samples_out(samples: int, count: int) -> None:
    found = folds(range(samples), count)
    assert sorted(index for fold in found for index in fold) == list(range(samples))
    assert max(map(len, found)) - min(map(len, found)) <= 1


def test_a_part_of_the_samples_chooses_for_itself() -> None:
    curve = {
        weight: {"value": [np.exp((weight - 0.5) ** 2), np.exp((weight - 1.0) ** 2)]}
        for weight in WEIGHTS
    }
    assert pick(PLAIN, curve, [0]) == pytest.approx(0.5, abs=0.01)
    assert pick(PLAIN, curve, [1]) == pytest.approx(1.0, abs=0.01)
    assert 0.5 < pick(PLAIN, curve) < 1.0
