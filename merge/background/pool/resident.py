"""What lives in a Ray actor: one worker, and the count of its steps."""

from __future__ import annotations

import contextlib
import functools
import os
import pickle
from dataclasses import dataclass
from typing import Any

from merge.background.pool.failures import Failure, failure_of
from merge.background.pool.shared import register


@dataclass(frozen=True)
class Answer:
    """What came out of a call.

    Attributes:
        value: The pickled result; None if it failed.
        steps: How many steps the job did.
        failure: What was raised, if anything.
    """

    value: bytes | None = None
    steps: int = 0
    failure: Failure | None = None


class Resident:
    """Makes a worker and lets it run jobs; what it raises comes back as data."""

    def __init__(self, folder: str) -> None:
        # So that relative paths mean what they mean at home, on every machine that has the folder.
        with contextlib.suppress(OSError):
            os.chdir(folder)
        self._worker: Any = None
        self._at = (0, 0)

    def hello(self) -> None:
        """Answer: the process runs."""

    def make(self, recipe: bytes) -> Answer:
        """Make the worker of a pickled function and its argument."""
        try:
            function, shared = pickle.loads(recipe)
            self._worker = function(shared)
        except Exception as error:
            return Answer(failure=failure_of(error))
        return Answer()

    def run(self, number: int, job: bytes, shares: dict[int, Any]) -> Answer:
        """Do a pickled job, which `steps` calls by a number.

        Args:
            number: Of the job.
            job: The pickled job.
            shares: Number of each shared value to where Ray has it.
        """
        import ray

        self._at = (number, 0)
        for name, place in shares.items():
            register(name, functools.partial(ray.get, place))
        try:
            value = pickle.dumps(self._worker.run(pickle.loads(job), self._count))
        except Exception as error:
            return Answer(failure=failure_of(error))
        return Answer(value, self._at[1])

    def steps(self) -> tuple[int, int]:
        """Return the job's number and how far it is; called while `run` works, or before."""
        return self._at

    def close(self) -> None:
        """Let the worker go."""
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.close()

    def _count(self, count: int) -> None:
        number, steps = self._at
        self._at = (number, steps + count)
