"""A grid over a recipe's values: merged in memory, edited with, measured, compared."""

from __future__ import annotations

import dataclasses
import logging
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from merge.background.workers import Workers
from merge.errors import EngineError, RecipeError
from merge.recipe.schema import Recipe
from merge.records.lock.find import load_recipe_or_lock
from merge.sweep.axes import HINT, Axis, read_axes
from merge.sweep.choice import choose_best
from merge.sweep.inputs import find_edits
from merge.sweep.jobs import BenchSpec
from merge.sweep.measures import DEFAULT, METRICS, check_metrics
from merge.sweep.model import Cell, Measured, ReferenceCost, Sample, SweepResult
from merge.sweep.page import render_sweep
from merge.sweep.planning import CellPlanner
from merge.sweep.record import (
    PAGE_NAME,
    TABLE_NAME,
    SweepFolder,
    measured_of,
    sample_trees,
    table_bytes,
    write_sweep,
)
from merge.sweep.session import CellNews, Session
from merge.sweep.workplace import ExecutorOptions, facts_of, make_pool
from merge.verify.model import Edit

_LOG = logging.getLogger(__name__)
# A page of more pictures would be no overview.
MOST_SHOWN = 16

# stage, done, total; UNet rows while cells are measured
Progress = Callable[[str, int, int], None]


def sweep(
    recipe: Recipe | str | Path,
    axes: Sequence[str],
    *,
    out: str | Path | None = None,
    edits: str | Path | Sequence[Edit] | None = None,
    images: str | Path | None = None,
    instructions: str | Path | None = None,
    samples: int | None = None,
    metrics: Sequence[str] = DEFAULT,
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
        edits: A YAML or JSON list of edits, or edits; default: the recipe's.
        images: A folder of pictures, instead.
        instructions: A text file with the instructions for these, one on each line.
        samples: How many edits there are; more than there are edits and seeds repeat them with
            new noise.
        metrics: Of `merge.sweep.measures.CHOICES`.
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
    found_axes, overrides = read_axes(axes)
    if not found_axes:
        raise RecipeError("there is no axis: name a key with several values", [], hint=HINT)
    names = check_metrics(metrics)
    loaded, lock = load_any(recipe, overrides)
    chosen = named_edits(loaded, edits, images, instructions)
    folder = Path(out) if out is not None else Path("outputs") / f"{loaded.name}-sweep"
    place = SweepFolder(folder)
    place.check(overwrite=overwrite, resume=resume)
    tell = on_progress or (lambda stage, done, total: None)
    planner = CellPlanner(
        loaded, chosen, overrides=overrides, count=samples, lock=lock, on_progress=tell
    )
    cells = planner.plan_grid(found_axes)
    compare = loaded.verify.compare
    spec = BenchSpec(
        planner.prepared,
        device,
        threads,
        (compare.guidance_scale, compare.image_guidance_scale),
        names,
    )
    facts = facts_of(spec, cells)
    kept = place.open(facts, overwrite=overwrite, resume=resume)
    work = _Work(place, loaded.name, source_of(recipe), found_axes, cells, spec, facts, tell)
    work.restore(kept)
    work.write()
    with _told(folder, work):
        work.run(executor or ExecutorOptions())
    return work.finish()


def load_any(recipe: Recipe | str | Path, overrides: Sequence[str]) -> tuple[Recipe, Any]:
    """Return a recipe with overrides, and the lock that it came from, if any.

    Raises:
        RecipeError: it cannot be read, or values are not valid.
    """
    if isinstance(recipe, Recipe):
        from merge.recipe.load import override_recipe

        return (override_recipe(recipe, overrides) if overrides else recipe), None
    return load_recipe_or_lock(str(recipe), overrides)


def named_edits(
    recipe: Recipe,
    edits: str | Path | Sequence[Edit] | None,
    images: str | Path | None,
    instructions: str | Path | None,
) -> tuple[Edit, ...]:
    """Return what to edit, named by a file, a folder, or edits themselves."""
    if edits is None or isinstance(edits, str | Path):
        return find_edits(recipe, edits, images, instructions)
    if not edits:
        raise RecipeError("there is nothing to edit", [], hint="name at least one edit")
    return tuple(edits)


def source_of(recipe: Recipe | str | Path) -> str:
    """Return a recipe as a command names it."""
    return recipe.name if isinstance(recipe, Recipe) else str(recipe)


@contextmanager
def _told(folder: Path, work: _Work) -> Iterator[None]:
    """Say what is kept when the block is left in the middle."""
    try:
        yield
    except BaseException as error:
        done = len(work.measured)
        if not isinstance(error, Exception) and done:
            work.write_page()
            error.add_note(f"{folder} keeps {done} of {len(work.cells)} cells")
        raise


@dataclass
class _Work:
    """A grid while it is measured."""

    place: SweepFolder
    recipe: str
    source: str
    axes: tuple[Axis, ...]
    cells: tuple[Cell, ...]
    spec: BenchSpec
    facts: Mapping[str, str]
    tell: Progress
    measured: dict[int, Measured] = field(default_factory=dict)
    sources: dict[int, str] = field(default_factory=dict)
    references: dict[int, str] = field(default_factory=dict)
    session: Session | None = None
    cost: ReferenceCost | None = None
    device: str = ""
    _rows: int = 0
    _total: int = 0
    _tree: dict[str, Any] = field(default_factory=dict)

    @property
    def samples(self) -> tuple[Sample, ...]:
        return self.cells[0].samples

    @property
    def shown(self) -> range:
        return range(min(MOST_SHOWN, len(self.samples)))

    def restore(self, kept: Mapping[str, Any]) -> None:
        """Take over the finished cells of an interrupted sweep."""
        self.device = str(kept.get("device", ""))
        if kept.get("reference"):
            self.cost = ReferenceCost(**kept["reference"])
        for tree in kept.get("cells", ()):
            if not tree["problem"]:
                self.measured[tree["index"]] = measured_of(tree)
        for index, sample in enumerate(kept.get("samples", ())):
            for mine, name in ((self.sources, "source"), (self.references, "reference")):
                if sample[name] is not None:
                    mine[index] = sample[name]
        needed = "residual" in self.spec.metrics
        for index, measured in list(self.measured.items()):
            is_whole = not needed or "residual" in measured.values
            if not is_whole and self.place.read_latents(index) is None:
                del self.measured[index]
        if self.measured:
            _LOG.info("%d of %d cells are kept", len(self.measured), len(self.cells))

    def run(self, executor: ExecutorOptions) -> None:
        """Measure what is missing."""
        todo = [cell for cell in self.cells if cell.index not in self.measured]
        unjudged = [
            cell
            for cell in self.cells
            if "residual" in self.spec.metrics
            and "residual" not in getattr(self.measured.get(cell.index), "values", {"residual": 0})
        ]
        if not todo and not unjudged:
            return
        with make_pool(executor, self.spec) as pool:
            session = self.session = Session(pool, self.spec, self._count)
            self._total = session.rows_of(todo, [*todo, *unjudged])
            self._count(0)
            pictures = Workers(1, "pictures")
            try:
                session.measure(todo, self.shown, lambda news: self._keep(news, pictures))
            finally:
                pictures.end()
            if "residual" in self.spec.metrics:
                self._judge(session)

    def _count(self, rows: int) -> None:
        self._rows += rows
        self.tell("sweep", min(self._rows, self._total), self._total)

    def _keep(self, news: CellNews, pictures: Workers) -> None:
        """Write a cell down: its latents and pictures first, then its line."""
        assert self.session is not None
        index, started = news.cell.index, time.perf_counter()
        if news.latents and "residual" in self.spec.metrics:
            self.place.write_latents(index, news.latents)
        self._keep_sources()
        names = [f"{index:03d}-{sample:03d}" for sample in sorted(news.pictures)]
        futures = [
            pictures.submit(self.place.write_picture, name, news.pictures[sample])
            for name, sample in zip(names, sorted(news.pictures), strict=True)
        ]
        written = tuple(future.result() for future in futures)
        seconds = dict(news.measured.seconds)
        if seconds:
            seconds["write"] = time.perf_counter() - started
        self.measured[index] = dataclasses.replace(news.measured, pictures=written, seconds=seconds)
        if news.measured.problem:
            _LOG.warning("%s: %s", " ".join(news.cell.words), news.measured.problem)
        self.write()

    def _keep_sources(self) -> None:
        assert self.session is not None
        found = (
            ("source", self.sources, self.session.sources),
            ("reference", self.references, self.session.pictures),
        )
        for kind, names, pictures in found:
            for index in self.shown:
                if index in pictures and index not in names:
                    names[index] = self.place.write_picture(f"{kind}-{index:03d}", pictures[index])

    def _judge(self, session: Session) -> None:
        """Let the target judge every cell that it has not judged."""
        latents = {}
        for cell in self.cells:
            measured = self.measured[cell.index]
            if not measured.problem and "residual" not in measured.values:
                found = self.place.read_latents(cell.index)
                if found is not None:
                    latents[cell.index] = found

        def take(cell: Cell, values: tuple[float | None, ...]) -> None:
            measured = self.measured[cell.index]
            self.measured[cell.index] = dataclasses.replace(
                measured, values={**measured.values, "residual": values}
            )

        session.residuals(latents, [c for c in self.cells if c.index in latents], take)

    def result(self) -> SweepResult:
        """Return what is there by now."""
        names = tuple(
            name for name in METRICS if any(name in m.values for m in self.measured.values())
        )
        session = self.session
        best, notes = choose_best(self.cells, self.measured)
        cost = session.cost if session is not None else None
        device = session.device if session is not None else ""
        return SweepResult(
            self.place.folder,
            self.recipe,
            self.source,
            self.axes,
            self.cells,
            dict(self.measured),
            names,
            best,
            cost or self.cost,
            device or self.device,
            notes,
        )

    def write(self) -> None:
        """Write `sweep.json` as it is by now."""
        samples = sample_trees(
            self.samples,
            self.shown,
            self.sources,
            self.references,
            has_seeds=all(axis.key != "seed" for axis in self.axes),
        )
        self._tree = write_sweep(self.place, self.result(), samples, self.facts)

    def write_page(self) -> None:
        """Write the table and the page of what is there by now."""
        self.write()
        self.place.write(TABLE_NAME, table_bytes(self.result()))
        self.place.write(PAGE_NAME, render_sweep(self._tree, self.place.folder).encode())

    def finish(self) -> SweepResult:
        """Write everything, and raise for the cells that failed."""
        self.write_page()
        self.place.clean()
        failed = [cell for cell in self.cells if self.measured[cell.index].problem]
        if failed:
            first = failed[0]
            raise EngineError(
                f"{len(failed)} of {len(self.cells)} cells could not be measured, the first "
                f"{shlex.join(first.words)}: {self.measured[first.index].problem}",
                hint=f"the others are in {self.place.folder}",
            )
        return self.result()
