"""What is known of the cells by now: each is written down before the next one is told."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from merge.background.pool.model import Pool
from merge.background.workers import Workers
from merge.errors import VerificationError
from merge.grid.counting import needs_paths, path_rows, reference_key
from merge.grid.jobs import BenchSpec
from merge.grid.measures import check_finite
from merge.grid.model import Cell, Measured, ReferenceCost
from merge.grid.record import SweepFolder, measured_of, rounded
from merge.grid.session import CellNews, Session
from merge.run.model import Progress

_LOG = logging.getLogger(__name__)
_JUDGED = "residual"
Values = Mapping[str, tuple[float | None, ...]]


@dataclass
class Book:
    """Keeps what was measured, and lets what is missing be measured.

    Attributes:
        place: Where it is written down.
        spec: What every worker knows.
        shown: Indices of the samples with pictures.
        tell: Called with stage, done and total: UNet rows, while cells are measured.
        on_change: Called when a cell was added.
        measured: Index of a cell to what was found.
        sources: Index of a sample to the file of what the model saw.
        references: Index of a sample to the file of the target's own picture.
        cost: Of the target's own paths.
        device: Kind of device and dtype.
    """

    place: SweepFolder
    spec: BenchSpec
    shown: Sequence[int]
    tell: Progress
    on_change: Callable[[], Any] = lambda: None
    measured: dict[int, Measured] = field(default_factory=dict)
    sources: dict[int, str] = field(default_factory=dict)
    references: dict[int, str] = field(default_factory=dict)
    cost: ReferenceCost | None = None
    device: str = ""
    _session: Session | None = None
    _kept: dict[tuple[str, ...], Measured] = field(default_factory=dict)
    _kept_latents: dict[tuple[str, ...], int] = field(default_factory=dict)
    _paths: dict[bytes, int] = field(default_factory=dict)
    _seconds: float = 0.0
    _rows: int = 0
    _total: int = 0

    @property
    def is_judged(self) -> bool:
        """Return True where the target says what it would change of each result."""
        return _JUDGED in self.spec.metrics

    def restore(self, kept: Mapping[str, Any]) -> None:
        """Take over what an interrupted run wrote down.

        Args:
            kept: Contents of its JSON.
        """
        self.device = str(kept.get("device", ""))
        if kept.get("reference"):
            self.cost = ReferenceCost(**kept["reference"])
            self._seconds = self.cost.seconds
        for tree in kept.get("cells", ()):
            if not tree["problem"]:
                self._kept[tuple(tree["words"])] = measured_of(tree)
                self._kept_latents[tuple(tree["words"])] = tree["index"]
        for index, sample in enumerate(kept.get("samples", ())):
            for mine, name in ((self.sources, "source"), (self.references, "reference")):
                if sample[name] is not None:
                    mine[index] = sample[name]

    def take_kept(self, cells: Sequence[Cell]) -> int:
        """Enter the cells that were kept; return how many."""
        count = 0
        for cell in cells:
            kept = self._kept.get(cell.words)
            if kept is None or kept.digest != cell.digest:
                continue
            if self.is_judged and _JUDGED not in kept.values and not self._has_latents(cell):
                continue
            self.measured[cell.index] = kept
            count += 1
        return count

    def _has_latents(self, cell: Cell) -> bool:
        is_same = self._kept_latents[cell.words] == cell.index
        return is_same and self.place.read_latents(cell.index) is not None

    def is_whole(self, cells: Sequence[Cell]) -> bool:
        """Return True when nothing is missing of these cells."""
        return all(c.index in self.measured and not self._is_unjudged(c) for c in cells)

    @contextmanager
    def kept_when_left(
        self, what: str, on_stop: Callable[[], Any] = lambda: None
    ) -> Iterator[None]:
        """Say what is kept when the block is left in the middle; of nothing leave no folder.

        Args:
            what: Is kept, in the words after its number.
            on_stop: Called when it was stopped, and no error ended it.
        """
        try:
            yield
        except BaseException as error:
            if not self.measured:
                self.place.discard()
            elif not isinstance(error, Exception):
                on_stop()
                error.add_note(f"{self.place.folder} keeps {len(self.measured)} {what}")
            raise

    def measure(self, pool: Pool, cells: Sequence[Cell]) -> None:
        """Measure what is missing of these cells.

        Args:
            pool: Of the workers.
            cells: With indices of their own among all cells of the book.

        Raises:
            MergeError: nothing can be measured at all.
        """
        if count := self.take_kept([c for c in cells if c.index not in self.measured]):
            _LOG.info("%d cells are kept", count)
        todo = [cell for cell in cells if cell.index not in self.measured]
        unjudged = [cell for cell in cells if self._is_unjudged(cell)]
        if not todo and not unjudged:
            return
        if self._session is None:
            self._session = Session(pool, self.spec, self._count)
        session = self._session
        rows = session.rows_of(todo, unjudged)
        if needs_paths(self.spec):
            for cell in cells:
                key = reference_key(cell, self.spec.prepared[cell.models])
                self._paths[key] = path_rows(self.spec, cell)
        self._total = self._rows + rows
        self._count(0)
        pictures = Workers(1, "pictures")
        try:
            session.measure(todo, self.shown, lambda news: self._keep(news, pictures))
        finally:
            pictures.end()
        if self.is_judged:
            self._judge([cell for cell in cells if self._is_unjudged(cell)])

    def _is_unjudged(self, cell: Cell) -> bool:
        found = self.measured.get(cell.index)
        if found is None or found.problem:
            return found is None and self.is_judged
        return self.is_judged and _JUDGED not in found.values

    def _count(self, rows: int) -> None:
        self._rows += rows
        self._total = max(self._total, self._rows)
        self.tell("sweep", self._rows, self._total)

    def _keep(self, news: CellNews, pictures: Workers) -> None:
        """Write a cell down: its latents and pictures first, then its line."""
        assert self._session is not None
        index, started = news.cell.index, time.perf_counter()
        if news.latents and self.is_judged:
            self.place.write_latents(index, news.latents)
        self._keep_sources(self._session)
        futures = [
            pictures.submit(self.place.write_picture, f"{index:03d}-{sample:03d}", picture)
            for sample, picture in sorted(news.pictures.items())
        ]
        written = tuple(future.result() for future in futures)
        seconds = dict(news.measured.seconds)
        if seconds:
            seconds["write"] = time.perf_counter() - started
        self.device = self._session.device or self.device
        if self._paths:
            seconds_in_all = self._seconds + self._session.seconds
            self.cost = ReferenceCost(
                *self.spec.guidance, sum(self._paths.values()), seconds_in_all
            )
        self.measured[index] = dataclasses.replace(
            news.measured, values=_rounded(news.measured.values), pictures=written, seconds=seconds
        )
        if news.measured.problem:
            _LOG.warning("%s: %s", " ".join(news.cell.words), news.measured.problem)
        self.on_change()

    def _keep_sources(self, session: Session) -> None:
        found = (
            ("source", self.sources, session.sources),
            ("reference", self.references, session.pictures),
        )
        for kind, names, pictures in found:
            for index in self.shown:
                if index in pictures and index not in names:
                    names[index] = self.place.write_picture(f"{kind}-{index:03d}", pictures[index])

    def _judge(self, cells: Sequence[Cell]) -> None:
        """Let the target say what it would change of these cells' results."""
        assert self._session is not None
        latents = {}
        for cell in cells:
            found = self.place.read_latents(cell.index)
            if found is not None:
                latents[cell.index] = found

        def take(cell: Cell, values: tuple[float | None, ...]) -> None:
            measured = self.measured[cell.index]
            try:
                check_finite({_JUDGED: values}, " ".join(cell.words))
            except VerificationError as error:
                measured = dataclasses.replace(measured, values={}, problem=error.message)
            else:
                found = {**measured.values, **_rounded({_JUDGED: values})}
                measured = dataclasses.replace(measured, values=found)
            self.measured[cell.index] = measured
            self.on_change()

        self._session.residuals(latents, [c for c in cells if c.index in latents], take)


def _rounded(values: Values) -> Values:
    """Return values as they are written down: a cell that was kept has no others."""
    return {name: tuple(map(rounded, found)) for name, found in values.items()}
