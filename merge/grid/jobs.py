"""What a worker is asked, and what it answers: plain values that travel between machines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from merge.background.pool.shared import Shared
from merge.grid.model import Cell
from merge.run.prepare import PreparedRun

Floats = np.ndarray[Any, np.dtype[np.float32]]
Bytes = np.ndarray[Any, np.dtype[np.uint8]]

# The group of jobs that need the target's own weights.
TARGET = "target"


@dataclass(frozen=True, slots=True)
class BenchSpec:
    """What every worker knows.

    Attributes:
        prepared: The models, once for each set of them.
        device: `auto`, `cpu`, `cuda`, `cuda:N` or `mps`.
        threads: Workers of a merge; None for the default.
        guidance: guidance_scale and image_guidance_scale of the target's own edits.
        metrics: What is measured.
        clip: Folder or Hub id of a CLIP model; None for none.
    """

    prepared: tuple[PreparedRun, ...]
    device: str
    threads: int | None
    guidance: tuple[float, float]
    metrics: tuple[str, ...]
    clip: str | None = None


@dataclass(frozen=True, slots=True)
class SampleReference:
    """The target's own answers to a sample's noise.

    Attributes:
        states: What each step begins with, `(steps, 4, h, w)`.
        ends: Where the target leads from there, likewise.
    """

    states: Floats
    ends: Floats

    @property
    def last(self) -> Floats:
        """Return the end of its path, `(4, h, w)`."""
        last: Floats = self.ends[-1]
        return last


@dataclass(frozen=True, slots=True)
class ReferenceJob:
    """Follow the target's own path for some samples of a cell.

    Attributes:
        key: Unique.
        group: `TARGET`.
        cell: Whose noise and timesteps.
        indices: Of its samples.
    """

    key: str
    group: str
    cell: Cell
    indices: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class CellJob:
    """Merge a cell, edit with it, measure.

    Attributes:
        key: Unique.
        group: Which models, and the digest of its weights.
        cell: What.
        references: Index of a sample to the target's answers, shared; None where no metric asks.
        shown: Indices of the samples whose pictures are wanted.
    """

    key: str
    group: str
    cell: Cell
    references: Shared | None
    shown: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class CellFound:
    """What a worker found of a cell.

    Attributes:
        sha256: Of the main component's file.
        values: Metric to its value for each sample.
        pictures: Index of a sample to its picture, `(height, width, 3)`.
        latents: What each picture was decoded from.
        unet_rows: Mean of one edit.
        seconds: Of `merge`, `edit` and `measure`.
        device: Kind of device and dtype.
    """

    sha256: str
    values: Mapping[str, tuple[float | None, ...]]
    pictures: Mapping[int, Bytes]
    latents: tuple[Floats, ...]
    unet_rows: float
    seconds: Mapping[str, float]
    device: str


@dataclass(frozen=True, slots=True)
class CellFailed:
    """A cell whose weights cannot be, such as those that overflow.

    Attributes:
        problem: Why.
    """

    problem: str


@dataclass(frozen=True, slots=True)
class ResidualJob:
    """Measure how much the target would change what a cell ended in.

    Attributes:
        key: Unique.
        group: `TARGET`.
        cell: What.
        latents: From `CellFound`.
    """

    key: str
    group: str
    cell: Cell
    latents: tuple[Floats, ...]


@dataclass(frozen=True, slots=True)
class ReferenceFound:
    """The target's answers.

    Attributes:
        references: Index of a sample to them.
        unet_rows: Over all of these samples.
        seconds: Wall time.
        sources: Index of a sample to the picture that the model sees.
        pictures: Index of a sample to the target's own picture of it.
    """

    references: Mapping[int, SampleReference]
    unet_rows: int
    seconds: float
    sources: Mapping[int, Bytes] = field(default_factory=dict)
    pictures: Mapping[int, Bytes] = field(default_factory=dict)


Job = ReferenceJob | CellJob | ResidualJob


def target_group(cell: Cell) -> str:
    """Return the group of the jobs that need the unmerged target of a cell's models."""
    return f"{TARGET} {cell.models}"


def chunks(count: int, size: int) -> Sequence[tuple[int, ...]]:
    """Return the indices of so many samples in runs of at most `size`."""
    return [tuple(range(begin, min(begin + size, count))) for begin in range(0, count, size)]
