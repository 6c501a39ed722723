"""What a run tells: its progress while it runs, its result at the end."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from merge.plan.model import MergePlan
from merge.records.manifest import FileRecord

# stage, done, total; bytes while merging
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Laps:
    """Wall time per stage of a run.

    Attributes:
        seconds: Stage to its time.
        started: When it began, as `time.perf_counter` has it.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    started: float = field(default_factory=time.perf_counter)

    def add(self, stage: str, since: float) -> None:
        """Take the time of a stage that began then."""
        self.seconds[stage] = time.perf_counter() - since

    @contextmanager
    def lap(self, stage: str) -> Iterator[None]:
        """Take the time of a block."""
        mark = time.perf_counter()
        yield
        self.add(stage, mark)


@dataclass(frozen=True, slots=True)
class RunResult:
    """What a run made.

    Attributes:
        folder: The output.
        plan: What was done.
        recipe_digest: 64 hexadecimal digits.
        files: Every file of the reproducible set but the manifest.
        seconds: Wall time per stage.
        verified: True when the closing edits ran and no check failed; None when there were none.
        verdict: What they prove, and a line on what they do not; empty when there were none.
    """

    folder: Path
    plan: MergePlan
    recipe_digest: str
    files: Mapping[str, FileRecord]
    seconds: Mapping[str, float]
    verified: bool | None
    verdict: str = ""
