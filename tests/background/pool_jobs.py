"""Jobs and workers that the tests of the pool run, on whatever process runs them."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from merge.errors import DeviceError, PlanError


@dataclass(frozen=True)
class Do:
    """A job that does one thing.

    `once` is a file: the first try leaves it behind.
    """

    key: str
    group: str = "g"
    what: str = "nothing"
    once: str = ""
    seconds: float = 0.0
    steps: int = 0
    words: dict[str, Any] = field(default_factory=dict)


class CustomError(PlanError):
    def __init__(self, one: int, two: int) -> None:
        self.two = two
        super().__init__(f"{one} and {two}", ["first", "second"], hint="add them")


class Doer:
    def __init__(self, shared: dict[str, Any]) -> None:
        if shared.get("fails"):
            raise DeviceError("no such device", hint="another one")
        if shared.get("dies"):
            os.kill(os.getpid(), signal.SIGKILL)
        self.shared = shared
        self.count = 0
        note(shared, "made")

    def run(self, job: Do, on_progress: Callable[[int], None]) -> dict[str, Any]:
        self.count += 1
        note(self.shared, f"run {job.key}")
        is_first = bool(job.once) and not Path(job.once).exists()
        if is_first:
            Path(job.once).write_text(str(os.getpid()))
        for _ in range(job.steps):
            on_progress(1)
            time.sleep(job.seconds / job.steps)
        if not job.steps:
            time.sleep(job.seconds)
        if job.what == "kill" or (job.what == "kill once" and is_first):
            os.kill(os.getpid(), signal.SIGKILL)
        if job.what == "wait once" and is_first:
            time.sleep(600)
        if job.what == "custom":
            raise CustomError(1, two=2)
        if job.what == "other":
            raise LookupError("it is not there")
        return {
            "key": job.key,
            "value": self.shared["base"] * len(job.key),
            "pid": os.getpid(),
            "count": self.count,
            "threads": os.environ.get("OMP_NUM_THREADS"),
            "folder": str(Path.cwd()),
            "ray": "ray" in sys.modules,
            "path": sys.path,
        }

    def close(self) -> None:
        note(self.shared, "closed")


def note(shared: dict[str, Any], line: str) -> None:
    """Write down in a file that all processes have what was done."""
    if shared.get("log"):
        with Path(shared["log"]).open("a") as file:
            file.write(f"{os.getpid()} {line}\n")


def make(shared: dict[str, Any]) -> Doer:
    return Doer(shared)
