"""What a tuning found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from merge.grid.model import Cell, Measured, ReferenceCost
from merge.grid.statistics import Interval, Ranking
from merge.tuning.settings import Setting


@dataclass(frozen=True, slots=True)
class Curve:
    """What was measured over the weight, all else the same.

    Attributes:
        guidance_scale: Of the edits.
        timesteps: None: the scheduler's own.
        cells: Weight to the index of its cell.
        best_weight: Where a parabola through the lowest points is lowest.
    """

    guidance_scale: float
    timesteps: tuple[int, ...] | None
    cells: Mapping[float, int]
    best_weight: float


@dataclass(frozen=True, slots=True)
class Neighbour:
    """A setting that the chosen one is compared with, on samples that it was not chosen on.

    Attributes:
        weight: Of the neighbour.
        difference: By how much its score is larger, and so worse.
    """

    weight: float
    difference: Interval


@dataclass(frozen=True, slots=True)
class HeldOut:
    """The choice on samples that it was not made on.

    Attributes:
        samples: How many.
        what: `pictures` or `noise`: what these samples have that the others had not.
        value: Score of the chosen setting.
        neighbours: Measured weights on both sides.
    """

    samples: int
    what: str
    value: float
    neighbours: tuple[Neighbour, ...]

    @property
    def passed(self) -> bool:
        """Return True when no neighbour is better beyond doubt."""
        return not any(found.difference.high < 0 for found in self.neighbours)


@dataclass(frozen=True, slots=True)
class TuneResult:
    """What a tuning chose, and why; `tune.json` holds the same.

    Attributes:
        folder: Where page, recipe and pictures are.
        recipe: The recipe's name.
        source: The recipe as it was named, for commands.
        over: What was tuned.
        steps: Of the edits.
        chosen: None where nothing tells the settings apart.
        reason: Why nothing was chosen; empty where something was.
        before: What the recipe had.
        overrides: For `run`, what makes the chosen setting of the recipe.
        ranking: What decided.
        picks: The weight that each fold of the samples would choose.
        curves: What was measured over the weight.
        held_out: None where nothing was chosen.
        cells: Everything that was merged and edited with.
        measured: Index of a cell to what was found.
        settings: Index of a cell to its setting.
        reference: How the target's own paths were made.
        device: Kind of device and dtype.
        notes: What a reader has to know.
    """

    folder: Path
    recipe: str
    source: str
    over: tuple[str, ...]
    steps: int
    chosen: Setting | None
    reason: str
    before: Setting
    overrides: tuple[str, ...]
    ranking: Ranking
    picks: tuple[float, ...]
    curves: tuple[Curve, ...]
    held_out: HeldOut | None
    cells: tuple[Cell, ...]
    measured: Mapping[int, Measured]
    settings: Mapping[int, Setting]
    reference: ReferenceCost | None
    device: str
    notes: tuple[str, ...] = ()

    @property
    def spread(self) -> float:
        """Return how far the folds' choices lie apart."""
        return max(self.picks) - min(self.picks) if self.picks else 0.0

    @property
    def lines(self) -> tuple[str, ...]:
        """Return what was found, for people."""
        if self.chosen is None:
            return (f"nothing was chosen: {self.reason}", *self.notes)
        words = ", ".join(
            f"{key} {text}" for key, text in self.chosen.labels if key in self.over or "[" in key
        )
        folds = ", ".join(f"{weight:.2f}" for weight in self.picks)
        return (f"chosen: {words}; quarters of the samples choose weights {folds}", *self.notes)
