"""Cells measured by workers: the target's own paths first, then the cells, then what it says."""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from merge.background.pool.model import Pool
from merge.background.pool.shared import Shared
from merge.errors import VerificationError
from merge.grid.bench import make_bench
from merge.grid.counting import (
    count_rows,
    evaluations,
    needs_paths,
    reference_key,
    scheduler_config_of,
)
from merge.grid.jobs import (
    BenchSpec,
    Bytes,
    CellFailed,
    CellFound,
    CellJob,
    Floats,
    ReferenceFound,
    ReferenceJob,
    ResidualJob,
    SampleReference,
    chunks,
    target_group,
)
from merge.grid.measures import check_finite, check_latents
from merge.grid.model import Cell, Measured
from merge.run.prepare import PreparedRun

_LOG = logging.getLogger(__name__)
# Samples of one job: enough for a batch, few enough to share out.
_CHUNK_SAMPLES = 16


@dataclass(frozen=True, slots=True)
class CellNews:
    """A cell that was measured, and what only exists until it is written down.

    Attributes:
        cell: Which.
        measured: What was found, without the names of pictures.
        pictures: Index of a sample to its picture.
        latents: What the edits ended in; empty where the cell failed.
    """

    cell: Cell
    measured: Measured
    pictures: Mapping[int, Bytes]
    latents: tuple[Floats, ...]


@dataclass
class Session:
    """Measures cells over the same models and samples, as often as it is asked.

    Attributes:
        pool: Of the workers.
        spec: What every worker knows.
        on_rows: Told the UNet rows that were evaluated since the last call.
        seconds: That the target's own paths took so far.
        sources: Index of a sample to the picture that the model sees.
        pictures: Index of a sample to the target's own picture of it.
        device: Kind of device and dtype; empty before the first cell.
    """

    pool: Pool
    spec: BenchSpec
    on_rows: Callable[[int], None]
    seconds: float = 0.0
    sources: dict[int, Bytes] = field(default_factory=dict)
    pictures: dict[int, Bytes] = field(default_factory=dict)
    device: str = ""
    _references: dict[bytes, Shared] = field(default_factory=dict)

    def measure(
        self, cells: Sequence[Cell], shown: Sequence[int], on_cell: Callable[[CellNews], None]
    ) -> None:
        """Measure cells; each is told as soon as it is there, in any order.

        A cell that cannot be merged or gives no numbers is told with its problem.

        Args:
            cells: What.
            shown: Indices of the samples whose pictures are wanted.
            on_cell: Takes what was found.

        Raises:
            MergeError: nothing can be measured at all.
        """
        follows_path = needs_paths(self.spec)
        if follows_path:
            self._follow_paths(cells)
        jobs = [
            CellJob(
                f"cell {cell.index}",
                f"{cell.models} {cell.digest}",
                cell,
                self._references[reference_key(cell, self._prepared(cell))]
                if follows_path
                else None,
                tuple(shown),
            )
            # Models that are no others than before need not be loaded.
            for cell in sorted(cells, key=lambda cell: cell.models)
        ]

        def take(job: CellJob, found: CellFound | CellFailed) -> None:
            on_cell(self._news(job.cell, found))

        self.pool.run_jobs(make_bench, self.spec, jobs, on_result=take, on_progress=self.on_rows)

    def residuals(
        self,
        latents: Mapping[int, tuple[Floats, ...]],
        cells: Sequence[Cell],
        on_cell: Callable[[Cell, tuple[float | None, ...]], None],
    ) -> None:
        """Measure what the target would change of the results of cells.

        Args:
            latents: Index of a cell to what its edits ended in.
            cells: Of these.
            on_cell: Takes the value of each sample.
        """
        jobs = [
            ResidualJob(f"residual {cell.index}", target_group(cell), cell, latents[cell.index])
            for cell in cells
        ]
        self.pool.run_jobs(
            make_bench,
            self.spec,
            jobs,
            on_result=lambda job, found: on_cell(job.cell, found),
            on_progress=self.on_rows,
        )

    def rows_of(self, cells: Sequence[Cell], judged: Sequence[Cell]) -> int:
        """Return the UNet rows that measuring takes.

        Args:
            cells: What `measure` is given.
            judged: What `residuals` is given.
        """
        return count_rows(self.spec, cells, judged, self._references)

    def _prepared(self, cell: Cell) -> PreparedRun:
        return self.spec.prepared[cell.models]

    def _news(self, cell: Cell, found: CellFound | CellFailed) -> CellNews:
        if isinstance(found, CellFailed):
            return CellNews(cell, Measured(cell.digest, problem=found.problem), {}, ())
        self.device = found.device
        measured = Measured(
            cell.digest,
            found.sha256,
            found.values,
            unet_rows=found.unet_rows,
            seconds=found.seconds,
        )
        try:
            check_finite(dict(found.values), " ".join(cell.words))
            check_latents(found.latents, " ".join(cell.words))
        except VerificationError as error:
            measured = dataclasses.replace(measured, values={}, problem=error.message)
            return CellNews(cell, measured, found.pictures, ())
        return CellNews(cell, measured, found.pictures, found.latents)

    def _follow_paths(self, cells: Sequence[Cell]) -> None:
        """Make the references that these cells need and that are not there yet."""
        todo: dict[bytes, Cell] = {}
        for cell in cells:
            key = reference_key(cell, self._prepared(cell))
            if key not in self._references:
                todo.setdefault(key, cell)
        self._tell_of_noise(todo.values())
        numbers = itertools.count()
        jobs = [
            ReferenceJob(f"path {next(numbers)}", target_group(cell), cell, indices)
            for cell in todo.values()
            for indices in chunks(len(cell.samples), _CHUNK_SAMPLES)
        ]
        keys = {id(cell): key for key, cell in todo.items()}
        found: dict[bytes, dict[int, SampleReference]] = {key: {} for key in todo}

        def take(job: ReferenceJob, result: ReferenceFound) -> None:
            found[keys[id(job.cell)]].update(result.references)
            for mine, theirs in ((self.sources, result.sources), (self.pictures, result.pictures)):
                for index, picture in theirs.items():
                    mine.setdefault(index, picture)
            self.seconds += result.seconds

        self.pool.run_jobs(make_bench, self.spec, jobs, on_result=take, on_progress=self.on_rows)
        for key, references in found.items():
            self._references[key] = self.pool.share(references)

    def _tell_of_noise(self, cells: Iterable[Cell]) -> None:
        """Say which schedulers draw noise on the way, which no path of the target has."""
        names = {
            str(scheduler_config_of(cell, self._prepared(cell))["_class_name"])
            for cell in cells
            if evaluations(self.spec, cell, cell.settings[0]).draws
        }
        for name in sorted(names):
            _LOG.warning(
                "%s draws noise in its steps: the distance to the target's own path, which has "
                "none, holds that noise too",
                name,
            )
