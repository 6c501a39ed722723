"""Scores, their intervals by the bootstrap, and which cell is best where the samples tell."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from merge.editor.settings import EditSettings
from merge.grid.choice import LEAST_SAMPLES, choose_best
from merge.grid.model import Best, Cell, Measured, Sample
from merge.grid.statistics import (
    PATH,
    PATH_SCORE,
    RESIDUAL,
    RIGHT,
    SCORE,
    Interval,
    Ranking,
    difference,
    part,
    score_interval,
)
from merge.recipe.schema import ModelRef, Models, Recipe, SchedulerSpec
from merge.verify.model import Edit

positive = st.lists(st.floats(1e-3, 1e3), min_size=2, max_size=12)
RECIPE = Recipe("r", Models(ModelRef(path="/t"), [], None))


def resampled(values: Sequence[float], seed: int, draws: int = 20_000) -> Any:
    """Return means of draws with replacement, by indices."""
    drawn = np.random.default_rng(seed).integers(len(values), size=(draws, len(values)))
    return np.array(values)[drawn].mean(axis=1)


# Scores ------------------------------------------------------------------------------------------


@given(positive)
def test_a_score_is_the_logarithm_of_a_geometric_mean(path: list[float]) -> None:
    residual = [value**0.5 + 0.1 for value in path]
    values = {"path": path, "residual": residual, "endpoint": path[::-1]}
    means = {name: math.log(np.mean(found)) for name, found in values.items()}
    assert PATH.score(values) == pytest.approx(means["path"])
    assert RESIDUAL.score(values) == pytest.approx(means["residual"])
    assert PATH_SCORE.score(values) == pytest.approx((means["path"] + means["residual"]) / 2)
    parts = SCORE.metrics
    expected = sum(part * means[name] for name, part in parts.items()) / sum(parts.values())
    assert SCORE.score(values) == pytest.approx(expected)


def test_a_share_is_better_the_larger_it_is() -> None:
    assert RIGHT.score({"right": [1, 0, 1, 1]}) == -0.75
    assert RIGHT.score({"right": [0, 0]}) == 0


def test_a_perfect_answer_is_best_of_all() -> None:
    assert PATH.score({"path": [0.0, 0.0]}) < PATH.score({"path": [1e-9, 1e-9]})


def test_what_a_sample_lacks_ranks_nothing() -> None:
    assert PATH.can_rank({"path": (1.0, 2.0)})
    assert not PATH.can_rank({"path": (1.0, None)})
    assert not PATH.can_rank({"residual": (1.0, 2.0)})
    assert not PATH_SCORE.can_rank({"path": (1.0, 2.0)})


# Intervals ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [6, 20, 100])
def test_an_interval_is_that_of_a_bootstrap_by_indices(count: int) -> None:
    values = np.random.default_rng(count).lognormal(size=count)
    found = score_interval(PATH, {"path": list(values)})
    drawn = np.log(resampled(values, 7))
    low, high = np.percentile(drawn, (2.5, 97.5))
    spread = drawn.std()
    assert found.value == pytest.approx(math.log(values.mean()))
    assert abs(found.low - low) < 0.25 * spread
    assert abs(found.high - high) < 0.25 * spread


def test_a_share_has_the_interval_of_its_binomial() -> None:
    found = score_interval(RIGHT, {"right": [1.0] * 60 + [0.0] * 40})
    width = 1.96 * math.sqrt(0.6 * 0.4 / 100)
    assert found.low == pytest.approx(-0.6 - width, abs=0.02)
    assert found.high == pytest.approx(-0.6 + width, abs=0.02)


def test_cells_are_compared_over_the_same_samples() -> None:
    rng = np.random.default_rng(0)
    # Samples differ by factors of a hundred, and the cells by a tenth.
    hard = rng.lognormal(sigma=2, size=40)
    first, second = hard * 1.1 * rng.normal(1, 0.01, 40), hard * rng.normal(1, 0.01, 40)
    found = difference(PATH, {"path": list(first)}, {"path": list(second)})
    assert 0 < found.low < found.value < found.high
    assert found.value == pytest.approx(math.log(1.1), abs=0.02)
    assert found.high - found.low < 0.05
    alone = [score_interval(PATH, {"path": list(values)}) for values in (first, second)]
    assert all(each.high - each.low > 0.5 for each in alone)


@given(positive, st.floats(0.1, 10))
def test_a_factor_between_cells_has_no_doubt(values: list[float], factor: float) -> None:
    first, second = {"path": [v * factor for v in values]}, {"path": values}
    found = difference(PATH, first, second)
    for value in (found.value, found.low, found.high):
        assert value == pytest.approx(math.log(factor), abs=1e-9)
    other = difference(PATH, second, first)
    assert other.low == pytest.approx(-found.high, abs=1e-9)
    same = difference(PATH, second, second)
    assert (same.value, same.low, same.high) == (0, 0, 0)
    assert not same.excludes_zero


def test_more_confidence_takes_a_wider_interval() -> None:
    rng = np.random.default_rng(3)
    first, second = ({"path": list(rng.lognormal(size=30))} for _ in range(2))
    usual, sure = (difference(PATH, first, second, c) for c in (0.95, 0.999))
    assert sure.low < usual.low < usual.high < sure.high


def test_intervals_are_the_same_each_time() -> None:
    values = {"path": [1.0, 2.0, 4.0, 8.0]}
    assert score_interval(PATH, values) == score_interval(PATH, values)


def test_zero_is_outside_of_what_does_not_touch_it() -> None:
    assert Interval(1, 0.1, 2).excludes_zero
    assert Interval(-1, -2, -0.1).excludes_zero
    assert not Interval(1, 0, 2).excludes_zero


def test_some_samples_are_a_part() -> None:
    values = {"path": (1.0, 2.0, 3.0), "right": (None, 1.0, 0.0)}
    assert part(values, [2, 0]) == {"path": (3.0, 1.0), "right": (0.0, None)}


# The best cell -----------------------------------------------------------------------------------


def make_cells(count: int, samples: int = 8, **settings: Any) -> list[Cell]:
    edits = tuple(Sample(Edit(None, "make it winter"), seed) for seed in range(samples))
    return [
        Cell(
            index=index,
            values={"weight": index},
            labels=(str(index),),
            words=(f"weight={index}",),
            overrides=("steps=4", f"weight={index}"),
            recipe=RECIPE,
            samples=edits,
            settings=tuple(EditSettings(**settings) for _ in edits),
            models=0,
            digest=str(index),
        )
        for index in range(count)
    ]


def spread(mean: float, seed: int, samples: int = 8, noise: float = 0.05) -> tuple[float, ...]:
    rng = np.random.default_rng(seed)
    return tuple(float(mean * value) for value in rng.normal(1, noise, samples))


def choose(cells: Sequence[Cell], **metrics: Sequence[Any]) -> tuple[Best | None, tuple[str, ...]]:
    """Choose among cells with these values, one of each metric for each cell."""
    measured = {
        cell.index: Measured(cell.digest, values={k: v[i] for k, v in metrics.items()})
        for i, cell in enumerate(cells)
    }
    return choose_best(cells, measured)


def test_a_clear_winner_is_best() -> None:
    path = [spread(4, 1), spread(1, 2), spread(2, 3)]
    best, notes = choose(make_cells(3), path=path)
    assert best == Best(1, "path", ("steps=4", "weight=1"))
    assert notes == ()


def test_cells_that_are_as_good_are_named() -> None:
    path = [spread(9, 0), *(spread(1, seed, noise=0.3) for seed in range(1, 8))]
    best, notes = choose(make_cells(8), path=path)
    assert best is not None
    assert best.index != 0
    (note,) = notes
    first = "These samples do not tell the best cell from: "
    assert re.fullmatch(first + r"weight=\d(; weight=\d){3} and 2 more\.", note)
    assert f"weight={best.index}" not in note
    assert "weight=0" not in note


def test_a_flat_grid_has_no_best_cell() -> None:
    path = [spread(1, seed, noise=0.5) for seed in range(4)]
    best, notes = choose(make_cells(4), path=path)
    assert best is None
    assert notes == ("No best cell: so few samples do not tell even the outermost cells apart.",)
    assert choose(make_cells(2), path=[spread(1, 0)] * 2)[0] is None


@pytest.mark.parametrize("samples", range(1, LEAST_SAMPLES))
def test_too_few_samples_choose_nothing(samples: int) -> None:
    cells = make_cells(2, samples)
    best, notes = choose(cells, path=[spread(1, 1, samples), spread(9, 2, samples)])
    assert best is None
    assert notes[0].startswith("No best cell: ")
    assert "too little" in notes[0]


def test_the_distance_to_two_paths_compares_nothing() -> None:
    cells = make_cells(2)
    values = {"path": [spread(1, 1), spread(4, 2)]}
    other = [
        dataclasses.replace(cells[1], settings=(EditSettings(timesteps=(999, 499)),) * 8),
        dataclasses.replace(cells[1], settings=(EditSettings(resolution=256),) * 8),
        dataclasses.replace(cells[1], models=1),
        dataclasses.replace(cells[1], samples=make_cells(1, 9)[0].samples[1:]),
        dataclasses.replace(
            cells[1],
            recipe=dataclasses.replace(RECIPE, scheduler=SchedulerSpec("DDIMScheduler")),
        ),
    ]
    for cell in other:
        assert choose([cells[0], cell], **values) == (
            None,
            ("No best cell: the cells have no measure that compares them.",),
        )
        # With what the target would change they can be compared.
        residual = [spread(2, 3), spread(1, 4)]
        best, _ = choose([cells[0], cell], residual=residual, **values)
        assert best is not None
    # Guidance and weight change no path.
    guided = dataclasses.replace(cells[1], settings=(EditSettings(guidance_scale=3),) * 8)
    best, _ = choose([cells[0], guided], **values)
    assert best is not None
    assert best.index == 0


def test_right_answers_decide_where_all_are_known() -> None:
    cells = make_cells(2, 20)
    right = [(1.0,) * 18 + (0.0,) * 2, (1.0,) * 4 + (0.0,) * 16]
    path = [spread(9, 1, 20), spread(1, 2, 20)]
    best, _ = choose(cells, path=path, right=right)
    assert best == Best(0, "right", cells[0].overrides)
    # One edit without an answer, and they decide nothing.
    unknown = [(None, *found[1:]) for found in right]
    best, _ = choose(cells, path=path, right=unknown)
    assert best == Best(1, "path", cells[1].overrides)


def test_single_steps_and_what_the_target_would_change_decide_before_the_path() -> None:
    cells = make_cells(2)
    first = {"path": [spread(9, 1), spread(1, 2)], "residual": [spread(1, 3), spread(2, 4)]}
    best, _ = choose(cells, **first)
    assert best == Best(1, "score", cells[1].overrides)
    best, _ = choose(cells, endpoint=[spread(1, 5), spread(2, 6)], **first)
    assert best == Best(0, "score", cells[0].overrides)


def test_cells_that_failed_or_are_not_there_are_left_out() -> None:
    cells = make_cells(4)
    measured = {
        0: Measured("0", values={"path": spread(3, 1)}),
        1: Measured("1", problem="it overflows"),
        2: Measured("2", values={"path": spread(2, 2)}),
    }
    best, notes = choose_best(cells, measured)
    assert best is not None
    assert (best.index, notes) == (2, ())
    assert choose_best(cells, {0: measured[0], 1: measured[1]}) == (None, ())
    assert choose_best(cells, {}) == (None, ())


def test_rankings_of_several_shares_add_up() -> None:
    both = Ranking("both", "", "", {"a": 1, "b": 1}, is_share=True)
    assert both.score({"a": [1.0, 0.0], "b": [1.0, 1.0]}) == -1.5
