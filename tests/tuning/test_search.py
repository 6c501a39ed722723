"""The search, on landscapes that are known."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from merge.grid.model import Measured
from merge.grid.statistics import PATH_SCORE, SCORE
from merge.tuning.search import Search
from merge.tuning.settings import Setting

WEIGHTS = tuple(index / 4 for index in range(7))
SAMPLES = 40
BEFORE = Setting(0.85, 1.0, (999, 659, 319, 59))
Landscape = Callable[[Setting], float]


def search_of(
    landscape: Landscape, *, noise: float = 0.02, budget: int = 60, answers: bool = True
) -> Search:
    """Return a search whose cells score as a landscape says, with noise of the samples."""
    rng = np.random.default_rng(3)
    common = rng.normal(size=SAMPLES)
    results: dict[int, Measured] = {}
    made: list[Setting] = []

    def measure(settings: Sequence[Setting]) -> list[Any]:
        cells = []
        for setting in settings:
            index = len(made)
            made.append(setting)
            # What samples have in common, and noise of each cell's own.
            logs = landscape(setting) + common + noise * rng.normal(size=SAMPLES)
            values = tuple(map(float, np.exp(logs)))
            metrics = {"residual": values, "path": values}
            if answers:
                metrics["endpoint"] = values
            results[index] = Measured("digest", values=metrics)
            cells.append(SimpleNamespace(index=index))
        return cells

    deciding = [index for index in range(SAMPLES) if index % 4 != 3]
    return Search(measure, results, SCORE, deciding, WEIGHTS, budget)


def bowl(best: float) -> Landscape:
    return lambda setting: (setting.weight - best) ** 2


@pytest.mark.parametrize("best", [0.4, 0.65, 1.1])
def test_the_weight_at_the_bottom_is_chosen(best: float) -> None:
    search = search_of(bowl(best))
    found = search.run(BEFORE, ["weight"], 4)
    assert found is not None
    assert found.weight == pytest.approx(best, abs=0.05)
    assert (found.guidance_scale, found.timesteps) == (1.0, BEFORE.timesteps)
    assert search.doubt(found, ["weight"]) == ""
    assert all(abs(weight - best) < 0.15 for weight in search.picks(found))
    # The grid, the recipe's own weight, the bottom and beside it.
    assert len(search.cells) <= len(WEIGHTS) + 5


def test_a_flat_curve_chooses_nothing() -> None:
    search = search_of(lambda setting: 0.0, noise=0.1)
    found = search.run(BEFORE, ["weight"], 4)
    assert found is not None
    assert "the curve is flat" in search.doubt(found, ["weight"])


def test_samples_that_disagree_choose_nothing() -> None:
    search = search_of(lambda setting: 0.02 * (setting.weight - 0.7) ** 2, noise=0.05)
    found = search.run(BEFORE, ["weight"], 4)
    assert found is not None
    assert search.doubt(found, ["weight"])


def test_weight_zero_is_no_choice() -> None:
    search = search_of(lambda setting: setting.weight)
    found = search.run(BEFORE, ["weight"], 4)
    assert found is not None
    assert found.weight == 0
    assert "no weight is better than 0" in search.doubt(found, ["weight"])


def test_timesteps_are_chosen_with_the_weight_that_is_best_for_them() -> None:
    def landscape(setting: Setting) -> float:
        placed = setting.timesteps == (999, 199)
        best = 1.1 if placed else 0.6
        return (setting.weight - best) ** 2 - 0.3 * placed

    search = search_of(landscape)
    found = search.run(Setting(0.85, 1.0, None), ["weight", "timesteps"], 2)
    assert found is not None
    assert found.timesteps == (999, 199)
    assert found.weight == pytest.approx(1.1, abs=0.06)


def test_guidance_is_taken_only_where_it_is_better_beyond_doubt() -> None:
    def gains(gain: float) -> Landscape:
        return lambda s: (s.weight - 0.7) ** 2 - gain * (s.guidance_scale == 1.5)

    over = ["weight", "guidance_scale"]
    better = search_of(gains(0.2)).run(BEFORE, over, 4)
    assert better is not None
    assert better.guidance_scale == 1.5
    hardly = search_of(gains(0.002), noise=0.1).run(BEFORE, over, 4)
    assert hardly is not None
    assert hardly.guidance_scale == 1.0


def test_weights_are_judged_at_guidance_1() -> None:
    def landscape(setting: Setting) -> float:
        return (setting.weight - (0.7 if setting.guidance_scale == 1 else 0.2)) ** 2

    search = search_of(landscape)
    found = search.run(Setting(1.0, 2.0, None), ["weight"], 4)
    assert found is not None
    assert found.weight == pytest.approx(0.7, abs=0.05)
    # The recipe's own setting is measured as it is, to compare with.
    assert Setting(1.0, 2.0, None) in search.cells
    assert "verify.guidance_scale=1" not in found.overrides(["weight"])


def test_a_budget_is_kept() -> None:
    search = search_of(bowl(0.7), budget=12)
    search.run(BEFORE, ["weight", "timesteps", "guidance_scale"], 4)
    assert len(search.cells) == 12
    assert search.is_cut


def test_a_setting_is_measured_once() -> None:
    search = search_of(bowl(0.75))
    found = search.run(Setting(0.75, 1.0, None), ["weight", "timesteps", "guidance_scale"], 4)
    assert found is not None
    assert len(search.cells) == len({cell.index for cell in search.cells.values()})


def test_without_answers_of_steps_the_path_decides() -> None:
    search = search_of(bowl(0.5), answers=False)
    found = search.run(BEFORE, ["weight"], 4)
    assert found is not None
    assert found.weight == pytest.approx(0.5, abs=0.05)
    assert search.ranking is PATH_SCORE


def test_no_numbers_no_choice() -> None:
    search = search_of(bowl(0.5))
    inner = search.measure

    def broken(settings: Sequence[Setting]) -> Sequence[Any]:
        cells = inner(settings)
        for cell in cells:
            search.results[cell.index] = Measured("digest", problem="not finite")  # type: ignore[index]
        return cells

    search.measure = broken
    assert search.run(BEFORE, ["weight"], 4) is None


def test_held_out_samples_compare_the_neighbours() -> None:
    search = search_of(bowl(0.7))
    found = search.run(BEFORE, ["weight"], 4)
    assert found is not None
    held = search.held_out(found, range(3, SAMPLES, 4), "noise")
    assert held is not None
    assert held.samples == 10
    assert held.passed
    assert [n.weight < found.weight for n in held.neighbours] == [True, False]
    assert search.held_out(found, [], "noise") is None


def test_a_neighbour_that_is_better_elsewhere_fails_the_check() -> None:
    search = search_of(bowl(0.7))
    found = search.run(BEFORE, ["weight"], 4)
    assert found is not None
    larger = min(w for w in search.along(found) if w > found.weight)
    cell = search.cells[search.along(found)[larger]]
    measured = search.results[cell.index]
    tiny = {name: tuple(v / 100 for v in values) for name, values in measured.values.items()}
    search.results[cell.index] = Measured("digest", values=tiny)  # type: ignore[index]
    held = search.held_out(found, range(3, SAMPLES, 4), "pictures")
    assert held is not None
    assert not held.passed


@pytest.mark.parametrize("answers", [True, False])
def test_groups_are_tried_one_after_the_other(answers: bool) -> None:
    def landscape(setting: Setting) -> float:
        groups = dict(setting.groups)
        return (setting.weight - 0.7) ** 2 + 0.5 * (groups.get("*.attn2.*", 0.7) - 0.95) ** 2

    search = search_of(landscape, noise=0.001, answers=answers)
    best = search.run(BEFORE, ["weight"], 4)
    assert best is not None
    found = search.run_groups(best)
    assert found is not None
    assert "*.attn2.*" in dict(found.groups)
    assert found.weight == best.weight
    # What decided is what held-out samples are asked for, with answers of single steps or without.
    held = range(3, SAMPLES, 4)
    assert search.is_better(found, best, held)
    assert not search.is_better(best, found, held)


def test_curves_are_told_once_each() -> None:
    search = search_of(bowl(0.7))
    search.run(BEFORE, ["weight", "guidance_scale"], 4)
    curves = search.curves(1.0)
    assert len({(c.guidance_scale, c.timesteps) for c in curves}) == len(curves)
    assert all(len(curve.cells) >= 3 for curve in curves)
    assert curves[0].best_weight == pytest.approx(0.7, abs=0.05)
