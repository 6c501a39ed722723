"""What a job, a worker and a pool of workers are."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

from merge.background.closable import Closable
from merge.background.pool.shared import Kept, Shared


class Job(Protocol):
    """One piece of work. It is pickled, so it should be small and name files by absolute paths.

    Attributes:
        key: Its own, among all jobs of a call.
        group: Jobs of one group are cheaper on the worker that did the group's last job.
    """

    @property
    def key(self) -> str:
        """Return its name."""

    @property
    def group(self) -> str:
        """Return the name of what a worker has to hold for it."""


AnyJob = TypeVar("AnyJob", bound=Job)
AnyJob_contra = TypeVar("AnyJob_contra", bound=Job, contravariant=True)


class Worker(Protocol[AnyJob_contra]):
    """Does jobs one after another, and keeps between them what is dear to load."""

    def run(self, job: AnyJob_contra, on_progress: Callable[[int], None]) -> Any:
        """Do a job and return what came out, which has to be picklable.

        Args:
            job: What to do.
            on_progress: To be called with the number of steps done since the last call.
        """

    def close(self) -> None:
        """Let go of what it holds."""


# Called once where a worker is to live, with the value that all workers share. It is pickled by
# its name: a function of an importable module.
Make = Callable[[Any], Worker[AnyJob]]


def ignore_progress(count: int) -> None:
    """Do nothing with a number of steps."""


class Pool(Closable):
    """Runs jobs on resident workers, in a `with` block."""

    def share(self, value: Any) -> Shared:
        """Return what jobs may hold in place of a large value, for as long as the pool lives."""
        return Kept(value)

    @abstractmethod
    def run_jobs(
        self,
        make: Make[AnyJob],
        shared: Any,
        jobs: Sequence[AnyJob],
        *,
        on_result: Callable[[AnyJob, Any], None],
        on_progress: Callable[[int], None] = ignore_progress,
    ) -> None:
        """Run jobs, and return when all are done.

        The workers stay for the next call, as long as `make` and `shared` are the same two
        objects. The pool is closed by an error, be it a job's, a callback's or an interruption.

        Args:
            make: Makes a worker of `shared`.
            shared: For every worker; not to be changed between two calls.
            jobs: In any order, with keys that differ.
            on_result: Called here, once for each job, as soon as its result is there.
            on_progress: Called here with the number of steps done since the last call.

        Raises:
            MergeError: a job or `make` raised it; class, message and hint are the worker's.
            ExecutorError: the workers are gone, or there are none.
        """


def check_keys(jobs: Sequence[Job]) -> None:
    """Raise ValueError where two jobs have one key."""
    keys = [job.key for job in jobs]
    if len(set(keys)) < len(keys):
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"two jobs have the key {twice!r}")
