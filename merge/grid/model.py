"""What a grid is made of: samples, cells, and what was measured of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from merge.editor.settings import EditSettings
from merge.grid.axes import Axis
from merge.recipe.schema import Recipe
from merge.verify.model import Edit


@dataclass(frozen=True, slots=True)
class Sample:
    """One edit with one seed.

    Attributes:
        edit: What is asked.
        seed: Of the noise.
    """

    edit: Edit
    seed: int


@dataclass(frozen=True, slots=True)
class Cell:
    """One combination of a grid.

    Attributes:
        index: Its place.
        values: Key of each axis to the value, as JSON has it.
        labels: The values as they were typed.
        words: Its value of each axis, as one types them for a grid.
        overrides: What makes it of the recipe for `run`, those of every cell included.
        recipe: With these overrides.
        samples: What is edited.
        settings: Of each sample's edit.
        models: Which of the prepared models it is merged from.
        digest: Of everything that decides its weights.
    """

    index: int
    values: Mapping[str, Any]
    labels: tuple[str, ...]
    words: tuple[str, ...]
    overrides: tuple[str, ...]
    recipe: Recipe
    samples: tuple[Sample, ...]
    settings: tuple[EditSettings, ...]
    models: int
    digest: str


@dataclass(frozen=True, slots=True)
class Measured:
    """What was found of a cell.

    Attributes:
        digest: Of everything that decides its weights.
        sha256: Of the file that `run` would write for the main component.
        values: Name of a metric to its value for each sample; None where it has none.
        pictures: One file for each sample that has one, by its name in the folder.
        unet_rows: For one edit, over all steps.
        seconds: Of `merge`, `edit` and `measure`.
        problem: Why there is nothing else; empty for a cell that is whole.
    """

    digest: str
    sha256: str = ""
    values: Mapping[str, tuple[float | None, ...]] = field(default_factory=dict)
    pictures: tuple[str, ...] = ()
    unet_rows: float = 0
    seconds: Mapping[str, float] = field(default_factory=dict)
    problem: str = ""

    def mean(self, metric: str) -> float | None:
        """Return the mean of a metric over the samples that have it."""
        found = [value for value in self.values.get(metric, ()) if value is not None]
        return sum(found) / len(found) if found else None


@dataclass(frozen=True, slots=True)
class ReferenceCost:
    """How the target's own path was made.

    Attributes:
        guidance_scale: Of the target's own edits.
        image_guidance_scale: Likewise.
        unet_rows: That the target evaluated, over all samples.
        seconds: Wall time.
    """

    guidance_scale: float
    image_guidance_scale: float
    unet_rows: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Best:
    """The cell that a metric ranks first.

    Attributes:
        index: Of the cell.
        metric: That ranks it.
        words: Overrides for `run` that make it.
    """

    index: int
    metric: str
    words: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class SweepResult:
    """A grid and what was measured; `sweep.json` holds the same.

    Attributes:
        folder: Where pictures, tables and the page are.
        recipe: The recipe's name.
        source: The recipe as it was named, for commands.
        axes: What was varied.
        cells: Every combination.
        measured: Index of a cell to what was found.
        metrics: Names of what was measured, the deciding one first.
        best: None where nothing tells the cells apart.
        reference: None where no metric needed one.
        device: Kind of device and dtype.
        is_complete: True when every cell was measured.
        notes: What a reader has to know.
    """

    folder: Path
    recipe: str
    source: str
    axes: tuple[Axis, ...]
    cells: tuple[Cell, ...]
    measured: Mapping[int, Measured]
    metrics: tuple[str, ...]
    best: Best | None
    reference: ReferenceCost | None
    device: str
    is_complete: bool
    notes: tuple[str, ...] = ()

    @property
    def lines(self) -> tuple[str, ...]:
        """Return what was found, for people."""
        lines = [f"{len(self.measured)} of {len(self.cells)} cells measured"]
        if self.best is not None:
            value = self.measured[self.best.index].mean(self.best.metric)
            shown = "" if value is None else f" ({self.best.metric} {value:.4g})"
            lines.append(f"best: {' '.join(self.cells[self.best.index].words)}{shown}")
        return (*lines, *self.notes)
