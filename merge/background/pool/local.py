"""A pool of one worker, in this process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from merge.background.pool.model import AnyJob, Make, Pool, Worker, check_keys, ignore_progress
from merge.background.pool.schedule import Schedule


class LocalPool(Pool):
    """Runs all jobs of a group one after another, groups in the order of their first job."""

    def __init__(self) -> None:
        self._made_of: tuple[Any, Any] | None = None
        self._worker: Worker[Any] | None = None
        self._is_closed = False

    def run_jobs(
        self,
        make: Make[AnyJob],
        shared: Any,
        jobs: Sequence[AnyJob],
        *,
        on_result: Callable[[AnyJob, Any], None],
        on_progress: Callable[[int], None] = ignore_progress,
    ) -> None:
        """Run jobs here, and return when all are done; an error is the worker's own."""
        if self._is_closed:
            raise RuntimeError("the pool is closed")
        check_keys(jobs)
        waiting = Schedule(jobs)
        job = waiting.take(None)
        try:
            while job is not None:
                on_result(job, self._hired(make, shared).run(job, on_progress))
                job = waiting.take(job.group)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the worker."""
        self._is_closed = True
        self._dismiss()

    def _hired(self, make: Make[AnyJob], shared: Any) -> Worker[AnyJob]:
        made_of = self._made_of
        if self._worker is None or made_of is None or not _are_same(made_of, (make, shared)):
            self._dismiss()
            self._worker, self._made_of = make(shared), (make, shared)
        return self._worker

    def _dismiss(self) -> None:
        worker, self._worker, self._made_of = self._worker, None, None
        if worker is not None:
            worker.close()


def _are_same(one: tuple[Any, Any], other: tuple[Any, Any]) -> bool:
    return one[0] is other[0] and one[1] is other[1]
