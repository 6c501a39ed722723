"""The weight of a merge, and if asked the settings of its edits, chosen by measuring."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from merge.background.pool.model import Pool
from merge.background.pool.options import ExecutorOptions
from merge.errors import VerificationError
from merge.grid.book import Book
from merge.grid.estimate import Estimate, estimate
from merge.grid.executors import check_doable, facts_of, make_pool
from merge.grid.inputs import Inputs
from merge.grid.model import Cell, Sample
from merge.grid.record import SweepFolder, sample_trees
from merge.grid.statistics import SCORE
from merge.grid.sweep import source_of
from merge.json_files import json_bytes
from merge.recipe.schema import Recipe
from merge.run.model import Progress
from merge.tuning.asked import METRICS, Asked
from merge.tuning.model import Curve, TuneResult
from merge.tuning.page import render_tune
from merge.tuning.recipe import tuned_recipe
from merge.tuning.record import JSON_NAME, PAGE_NAME, RECIPE_NAME, tune_tree
from merge.tuning.search import Search
from merge.tuning.settings import WEIGHTS, Setting

BUDGET = 48
# Every fourth sample is held out: it decides nothing and is looked at in the end.
_HELD_EVERY = 4
_MOST_SHOWN = 6


def tune(
    recipe: Recipe | str | Path,
    overrides: Sequence[str] = (),
    *,
    over: Sequence[str] = ("weight",),
    steps: int | None = None,
    weights: str = WEIGHTS,
    budget: int = BUDGET,
    out: str | Path | None = None,
    inputs: Inputs | None = None,
    device: str = "auto",
    threads: int | None = None,
    executor: ExecutorOptions | None = None,
    overwrite: bool = False,
    resume: bool = False,
    on_progress: Progress | None = None,
) -> TuneResult:
    """Choose a recipe's weight by measuring, and if asked the guidance and the timesteps.

    What decides needs no right answers: how far a few-step picture is from where the target itself
    leads from the same noise, and how much the target would still change it. The folder gets
    `tuned.yaml`, a recipe for `run_recipe`, and a page with the curves; the same inputs, device
    and seeds give the same recipe.

    Args:
        recipe: From `load_recipe`; or its path or bundled name, or a lock's path.
        overrides: As for `load_recipe`; keys may be names of edit settings, as in `steps=2`.
        over: Of `weight`, `guidance_scale`, `timesteps`, `groups`.
        steps: Of the edits; None: the recipe's.
        weights: To try, as an axis.
        budget: The most settings that are measured.
        out: The folder to write; default: `outputs/NAME-tune`.
        inputs: What is edited; default: the recipe's edits, repeated with new noise to 128.
        device: As for `load_editor`; merges run there too.
        threads: Workers of a merge; None for the default.
        executor: Where settings are measured; None: in this process.
        overwrite: Replace an earlier tuning.
        resume: Keep what an interrupted one measured.
        on_progress: Called with stage, done and total.

    Returns:
        What `tune.json` holds.

    Raises:
        RecipeError: values are not valid.
        VerificationError: nothing was chosen: the curve is flat, or no numbers are finite. What was
            measured is written all the same.
        MergeError: of the family that fits; see `merge.errors`.
    """
    started = time.perf_counter()
    asked = Asked.of(
        recipe, overrides, over, steps, weights, inputs or Inputs(), on_progress, is_dry=False
    )
    place = SweepFolder(
        Path(out) if out is not None else Path("outputs") / f"{asked.recipe.name}-tune",
        JSON_NAME,
        [RECIPE_NAME],
    )
    place.check(overwrite=overwrite, resume=resume)
    (before,) = asked.planner.plan([asked.before.grid])
    spec = asked.planner.spec(device, threads, METRICS)
    executor = executor or ExecutorOptions()
    check_doable(executor, spec, [before])
    facts = facts_of(spec, [before]) | {"what is tuned": " ".join(asked.over), "weights": weights}
    kept = place.open(facts, overwrite=overwrite, resume=resume)
    tell = on_progress or (lambda stage, done, total: None)
    shown = range(min(_MOST_SHOWN, len(before.samples)))
    book = Book(place, spec, shown, tell)
    work = _Work(asked, book, source_of(recipe), before.samples, facts, budget, started)
    book.on_change = work.write
    book.restore(kept)
    work.write()
    with book.kept_when_left("settings"), make_pool(executor, spec) as pool:
        work.search(pool)
    return work.finish()


def plan_tune(
    recipe: Recipe | str | Path,
    overrides: Sequence[str] = (),
    *,
    over: Sequence[str] = ("weight",),
    steps: int | None = None,
    weights: str = WEIGHTS,
    budget: int = BUDGET,
    inputs: Inputs | None = None,
    device: str = "auto",
    threads: int | None = None,
) -> Estimate:
    """Say what a tuning would take at most: from headers, and one forward pass that is timed.

    Args:
        recipe: As for `tune`, and so is all else.
        overrides: Likewise.
        over: Likewise.
        steps: Likewise.
        weights: Likewise.
        budget: Likewise.
        inputs: Likewise.
        device: Likewise.
        threads: Likewise.

    Raises:
        MergeError: of the family that fits; see `merge.errors`.
    """
    asked = Asked.of(recipe, overrides, over, steps, weights, inputs or Inputs(), None, is_dry=True)
    wanted = asked.expected()[:budget]
    cells = asked.planner.plan([setting.grid for setting in wanted])
    return estimate(asked.planner.spec(device, threads, METRICS), cells)


@dataclass
class _Work:
    """A tuning while it runs, and its files."""

    asked: Asked
    book: Book
    source: str
    samples: tuple[Sample, ...]
    facts: Mapping[str, str]
    budget: int
    started: float
    found: Search | None = None
    cells: list[Cell] = field(default_factory=list)
    settings: dict[int, Setting] = field(default_factory=dict)
    chosen: Setting | None = None
    reason: str = "it was interrupted"
    notes: list[str] = field(default_factory=list)

    @property
    def held(self) -> list[int]:
        """Return the indices of the samples that decide nothing."""
        if len(self.samples) < 2 * _HELD_EVERY:
            return []
        if not self.has_many_edits:
            return list(range(_HELD_EVERY - 1, len(self.samples), _HELD_EVERY))
        edits = list(dict.fromkeys(id(sample.edit) for sample in self.samples))
        held = set(edits[_HELD_EVERY - 1 :: _HELD_EVERY])
        return [index for index, sample in enumerate(self.samples) if id(sample.edit) in held]

    @property
    def has_many_edits(self) -> bool:
        """Return True where there are edits enough to hold some of them out."""
        return len({id(sample.edit) for sample in self.samples}) >= 2 * _HELD_EVERY

    @property
    def deciding(self) -> list[int]:
        """Return the indices of the samples that settings are chosen on."""
        held = set(self.held)
        return [index for index in range(len(self.samples)) if index not in held]

    def search(self, pool: Pool) -> None:
        """Measure, and choose."""

        def measure(settings: Sequence[Setting]) -> Sequence[Cell]:
            cells = self.asked.planner.plan(
                [setting.grid for setting in settings], first=len(self.cells)
            )
            self.cells += cells
            self.settings |= {c.index: s for c, s in zip(cells, settings, strict=True)}
            self.book.measure(pool, cells)
            return cells

        asked = self.asked
        search = self.found = Search(
            measure, self.book.measured, SCORE, self.deciding, asked.weights, self.budget
        )
        best = search.run(asked.before, asked.over, asked.steps)
        if best is None:
            self.reason = "no setting gave finite numbers"
            return
        self.reason = search.doubt(best, asked.over)
        self.chosen = None if self.reason else best
        if self.chosen is not None:
            self._note(search, best)
        if search.is_cut:
            self.notes.append(f"The budget of {self.budget} settings cut the search short.")

    def _note(self, search: Search, best: Setting) -> None:
        curve = search.along(best)
        own = self.asked.before.guidance_scale
        if own > 1 and "guidance_scale" not in self.asked.over:
            self.notes.append(
                "Judged at guidance 1, where measures do not mislead; the recipe edits with "
                f"{own:g}: --over weight,guidance_scale chooses that as well."
            )
        if "weight" in self.asked.over and best.weight == max(curve):
            self.notes.append("The best weight is the largest that was tried: see --weights.")
        picks = search.picks(best)
        if max(picks) - min(picks) > 0.25:
            self.notes.append(
                "Quarters of the samples choose weights more than 0.25 apart: more --samples, or "
                "more pictures, would make the choice surer."
            )
        if "groups" in self.asked.over:
            self._try_groups(search, best)

    def _try_groups(self, search: Search, best: Setting) -> None:
        """Take weights of groups only where samples that did not choose them agree."""
        found = search.run_groups(best)
        if found is None or not self.held:
            self.notes.append("No group of blocks is better with a weight of its own.")
            return
        if search.is_better(found, best, self.held):
            self.chosen = found
            self.notes.append("Groups of blocks have weights of their own, which held out.")
        else:
            self.notes.append(
                "Weights for groups of blocks were no better on samples that they were not chosen "
                "on, so they are left out."
            )

    def result(self) -> TuneResult:
        """Return what is there by now."""
        asked, search, chosen = self.asked, self.found, self.chosen
        # Weights of groups are looked at on the held-out samples already.
        scalar = replace(chosen, groups=()) if chosen is not None else None
        curves: tuple[Curve, ...] = ()
        picks: tuple[float, ...] = ()
        held_out = None
        if search is not None:
            curves = search.curves(scalar.guidance_scale if scalar is not None else 1.0)
        if search is not None and scalar is not None:
            picks = search.picks(scalar)
            what = "pictures" if self.has_many_edits else "noise"
            held_out = search.held_out(scalar, self.held, what)
        return TuneResult(
            folder=self.book.place.folder,
            recipe=asked.recipe.name,
            source=self.source,
            over=asked.over,
            steps=asked.steps,
            chosen=chosen,
            reason=self.reason,
            before=asked.before,
            overrides=() if chosen is None else (*asked.overrides, *chosen.overrides(asked.over)),
            ranking=search.ranking if search is not None else SCORE,
            picks=picks,
            curves=curves,
            held_out=held_out,
            cells=tuple(self.cells),
            measured=dict(self.book.measured),
            settings=dict(self.settings),
            reference=self.book.cost,
            device=self.book.device,
            notes=tuple(self.notes),
        )

    def write(self) -> None:
        """Write `tune.json` as it is by now."""
        self._write(self.result())

    def _write(self, result: TuneResult) -> dict[str, Any]:
        """Write `tune.json`, and return its contents."""
        book = self.book
        samples = sample_trees(
            self.samples, book.shown, book.sources, book.references, has_seeds=True
        )
        own = book.cost.unet_rows if book.cost is not None else 0
        measured = book.measured.values()
        cost = {
            "unet_rows": own + round(sum(m.unet_rows * len(self.samples) for m in measured)),
            "seconds": round(time.perf_counter() - self.started, 1),
            "merges": len({found.digest for found in measured}),
        }
        tree = tune_tree(result, self.deciding, samples, book.shown, self.facts, cost)
        book.place.write(JSON_NAME, json_bytes(tree))
        return tree

    def finish(self) -> TuneResult:
        """Write everything; raise where nothing was chosen."""
        place, result = self.book.place, self.result()
        tree = self._write(result)
        place.write(PAGE_NAME, render_tune(tree, place.folder).encode())
        place.clean()
        if result.chosen is None:
            raise VerificationError(
                f"nothing was chosen: {self.reason}",
                hint=f"see {place.folder / PAGE_NAME}; more pictures under --edits, or more "
                "--samples, may tell",
            )
        place.write(RECIPE_NAME, tuned_recipe(self.asked.recipe, result))
        return result
