"""Work cut into units, and the state of each tensor while several workers are at it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from merge.plan.memory import UNIT_ELEMENTS
from merge.plan.model import TensorPlan


@dataclass(frozen=True, slots=True)
class Unit:
    """A range of one output tensor.

    Attributes:
        tensor: Index into the plan's tensors.
        start: First element.
        count: Elements; whole rows for a tensor that is merged by row, the
            whole tensor where its method or a baked bias needs that.
    """

    tensor: int
    start: int
    count: int


@dataclass(slots=True)
class TensorState:
    """What the workers found out about one tensor so far.

    Attributes:
        units_left: Units that are not done.
        changed: True once a delta had an element other than zero.
        overflows: Values that out_dtype could not hold and that a rule replaced.
    """

    units_left: int
    changed: bool = False
    overflows: int = 0


def cut_units(tensors: Sequence[TensorPlan]) -> list[Unit]:
    """Cut every tensor into units, in the order of the output file."""
    units: list[Unit] = []
    for index, tensor in enumerate(tensors):
        total = tensor.target.element_count
        step = UNIT_ELEMENTS
        if tensor.is_whole or tensor.bakes:
            step = max(total, 1)
        elif tensor.is_by_row:
            step = max(1, UNIT_ELEMENTS // tensor.row_elements) * tensor.row_elements
        starts = range(0, total, step) if total else range(1)
        units += [Unit(index, start, min(step, total - start)) for start in starts]
    return units


@dataclass
class WorkQueue:
    """Hands units out in file order and tracks what is finished.

    The frontier is the end of the longest run of finished tensors from the start of the file on:
    everything before it is final and may be hashed.

    Attributes:
        units: All work.
        states: One per tensor.
        ends: For each tensor the position after its last byte in the output file.
        on_frontier: Called with the new frontier in bytes, the old and the new one in tensors, one
            call at a time.
        finished: Tensors that were final before.
    """

    units: Sequence[Unit]
    states: Sequence[TensorState]
    ends: Sequence[int]
    on_frontier: Callable[[int, int, int], None]
    finished: int = 0
    _next: int = 0
    _stopped: bool = False
    _done: list[bool] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self._done = [index < self.finished for index in range(len(self.states))]

    def take(self) -> Iterator[Unit]:
        """Yield units until all are taken or the work is stopped."""
        while True:
            with self._lock:
                if self._stopped or self._next >= len(self.units):
                    return
                unit = self.units[self._next]
                self._next += 1
            yield unit

    def stop(self) -> None:
        """Hand out no more units."""
        self._stopped = True

    def is_last(self, unit: Unit) -> bool:
        """Count a unit as done; True when it was its tensor's last."""
        with self._lock:
            state = self.states[unit.tensor]
            state.units_left -= 1
            return state.units_left == 0

    def finish_tensor(self, index: int) -> None:
        """Mark a tensor as final and move the frontier."""
        with self._lock:
            self._done[index] = True
            before = self.finished
            while self.finished < len(self._done) and self._done[self.finished]:
                self.finished += 1
            if self.finished > before:
                self.on_frontier(self.ends[self.finished - 1], before, self.finished)
