"""A grid over a recipe's values: merged in memory, edited with, measured, compared."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merge.background.pool.options import ExecutorOptions
from merge.errors import EngineError, RecipeError
from merge.grid.axes import HINT, Axis, read_axes
from merge.grid.book import Book
from merge.grid.choice import choose_best
from merge.grid.estimate import Estimate, estimate
from merge.grid.executors import check_doable, facts_of, make_pool
from merge.grid.inputs import Inputs, find_edits
from merge.grid.measures import DEFAULT, check_metrics
from merge.grid.model import Cell, SweepResult
from merge.grid.page import render_sweep
from merge.grid.planning import CellPlanner
from merge.grid.record import (
    PAGE_NAME,
    TABLE_NAME,
    SweepFolder,
    metric_names,
    sample_trees,
    table_bytes,
    write_sweep,
)
from merge.recipe.schema import Recipe
from merge.records.lock.find import load_recipe_or_lock
from merge.run.model import Progress
from merge.verify.clip import find_clip

# A page of more pictures would be no overview.
MOST_SHOWN = 16


def sweep(
    recipe: Recipe | str | Path,
    axes: Sequence[str],
    *,
    out: str | Path | None = None,
    inputs: Inputs | None = None,
    metrics: Sequence[str] = DEFAULT,
    clip: str | None = None,
    device: str = "auto",
    threads: int | None = None,
    executor: ExecutorOptions | None = None,
    overwrite: bool = False,
    resume: bool = False,
    on_progress: Progress | None = None,
) -> SweepResult:
    """Merge, edit with and measure every combination of some values of a recipe.

    Inputs are read and hashed once, and nothing is exported: weights are merged into memory, with
    the bytes that `run_recipe` would write, and take the place of those of one resident model.
    Each finished cell is written to `out` at once.

    Args:
        recipe: From `load_recipe`; or its path or bundled name, or a lock's path.
        axes: Words such as `weight=0:1.5:0.25` or `timesteps=999/599/299/99,999/499/249/99`; one
            with a single value, as `steps=2`, is the same for every cell.
        out: The folder to write; default: `outputs/NAME-sweep`.
        inputs: What is edited; default: the recipe's edits with its seeds.
        metrics: Of `merge.grid.measures.CHOICES`.
        clip: Folder or Hub id of a CLIP model to measure edits with, too.
        device: As for `load_editor`; merges run there too.
        threads: Workers of a merge; None for the default.
        executor: Where cells run; None: in this process.
        overwrite: Replace an earlier sweep.
        resume: Keep the finished cells of an interrupted one.
        on_progress: Called with stage, done and total.

    Returns:
        What `sweep.json` holds.

    Raises:
        RecipeError: axes or values are not valid; all problems at once.
        EngineError: some cells could not be measured; the others are written.
        MergeError: of the family that fits; see `merge.errors`.
    """
    grid = _Grid.of(recipe, axes, inputs or Inputs(), metrics, on_progress, is_dry=False)
    place = SweepFolder(Path(out) if out is not None else Path("outputs") / f"{grid.name}-sweep")
    place.check(overwrite=overwrite, resume=resume)
    if clip is not None:
        find_clip(clip)
    cells = grid.planner.plan_grid(grid.axes)
    spec = grid.planner.spec(device, threads, grid.metrics, clip)
    executor = executor or ExecutorOptions()
    check_doable(executor, spec, cells)
    facts = facts_of(spec, cells)
    kept = place.open(facts, overwrite=overwrite, resume=resume)
    tell = on_progress or (lambda stage, done, total: None)
    shown = range(min(MOST_SHOWN, len(cells[0].samples)))
    book = Book(place, spec, shown, tell)
    work = _Work(book, grid.name, source_of(recipe), grid.axes, cells, facts)
    book.on_change = work.write
    book.restore(kept)
    book.take_kept(cells)
    work.write()
    is_left = book.kept_when_left(f"of {len(cells)} cells", work.write_page)
    with is_left, make_pool(executor, spec) as pool:
        book.measure(pool, cells)
    return work.finish()


def plan_sweep(
    recipe: Recipe | str | Path,
    axes: Sequence[str],
    *,
    inputs: Inputs | None = None,
    metrics: Sequence[str] = DEFAULT,
    device: str = "auto",
    threads: int | None = None,
    on_progress: Progress | None = None,
) -> Estimate:
    """Say what a sweep would take: from headers, and one forward pass that is timed.

    Args:
        recipe: As for `sweep`, and so is all else.
        axes: Likewise.
        inputs: Likewise.
        metrics: Likewise.
        device: Likewise.
        threads: Likewise.
        on_progress: Likewise.

    Raises:
        MergeError: of the family that fits; see `merge.errors`.
    """
    grid = _Grid.of(recipe, axes, inputs or Inputs(), metrics, on_progress, is_dry=True)
    cells = grid.planner.plan_grid(grid.axes)
    return estimate(grid.planner.spec(device, threads, grid.metrics), cells)


@dataclass(frozen=True, slots=True)
class _Grid:
    """What is asked of a sweep, read and checked."""

    name: str
    axes: tuple[Axis, ...]
    planner: CellPlanner
    metrics: tuple[str, ...]

    @classmethod
    def of(
        cls,
        recipe: Recipe | str | Path,
        words: Sequence[str],
        inputs: Inputs,
        metrics: Sequence[str],
        on_progress: Progress | None,
        *,
        is_dry: bool,
    ) -> _Grid:
        axes, overrides = read_axes(words)
        if not axes:
            raise RecipeError("there is no axis: name a key with several values", [], hint=HINT)
        names = check_metrics(metrics)
        loaded, lock = load_recipe_or_lock(recipe, overrides)
        planner = CellPlanner(
            loaded,
            find_edits(loaded, inputs),
            overrides=overrides,
            count=inputs.samples,
            lock=lock,
            on_progress=on_progress,
            is_dry=is_dry,
        )
        return cls(loaded.name, axes, planner, names)


def source_of(recipe: Recipe | str | Path) -> str:
    """Return a recipe as a command names it."""
    return recipe.name if isinstance(recipe, Recipe) else str(recipe)


@dataclass
class _Work:
    """A grid while it is measured, and its files."""

    book: Book
    recipe: str
    source: str
    axes: tuple[Axis, ...]
    cells: tuple[Cell, ...]
    facts: Mapping[str, str]

    def result(self) -> SweepResult:
        """Return what is there by now."""
        book = self.book
        measured = dict(book.measured)
        best, notes = choose_best(self.cells, measured)
        return SweepResult(
            book.place.folder,
            self.recipe,
            self.source,
            self.axes,
            self.cells,
            measured,
            metric_names(measured.values()),
            best,
            book.cost,
            book.device,
            book.is_whole(self.cells),
            notes,
        )

    def write(self) -> None:
        """Write `sweep.json` as it is by now."""
        self._write(self.result())

    def _write(self, result: SweepResult) -> dict[str, Any]:
        """Write `sweep.json`, and return its contents."""
        samples = sample_trees(
            self.cells[0].samples,
            self.book.shown,
            self.book.sources,
            self.book.references,
            has_seeds=all(axis.key != "seed" for axis in self.axes),
        )
        return write_sweep(self.book.place, result, samples, self.facts)

    def write_page(self) -> SweepResult:
        """Write everything that is there by now, the table and the page as well."""
        place, result = self.book.place, self.result()
        tree = self._write(result)
        place.write(TABLE_NAME, table_bytes(result))
        place.write(PAGE_NAME, render_sweep(tree, place.folder).encode())
        return result

    def finish(self) -> SweepResult:
        """Write everything, and raise for the cells that failed."""
        result = self.write_page()
        self.book.place.clean()
        failed = [cell for cell in self.cells if self.book.measured[cell.index].problem]
        if failed:
            first = failed[0]
            raise EngineError(
                f"{len(failed)} of {len(self.cells)} cells could not be measured, the first "
                f"{shlex.join(first.words)}: {self.book.measured[first.index].problem}",
                hint=f"the others are in {self.book.place.folder}",
            )
        return result
