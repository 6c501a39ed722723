"""What a run tells: its progress while it runs, its result at the end."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from merge.manifest import FileRecord
from merge.plan import MergePlan

# stage, done, total; bytes while merging
Progress = Callable[[str, int, int], None]


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
