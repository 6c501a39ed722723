"""Which job a free worker takes next."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable
from typing import Generic

from merge.background.pool.model import AnyJob


class Schedule(Generic[AnyJob]):
    """The jobs that wait, by group."""

    def __init__(self, jobs: Iterable[AnyJob]) -> None:
        self._groups: dict[str, deque[AnyJob]] = {}
        for job in jobs:
            self._groups.setdefault(job.group, deque()).append(job)

    def __len__(self) -> int:
        return sum(map(len, self._groups.values()))

    def take(self, last: str | None, taken: Collection[str] = ()) -> AnyJob | None:
        """Return the next job for a worker, or None if none waits.

        Args:
            last: The group of the worker's last job: it holds what that group needs.
            taken: The groups that other workers are at.
        """
        free = [group for group in self._groups if group not in taken]
        if last in self._groups:
            return self._pop(last)
        if free:
            return self._pop(free[0])
        if self._groups:
            # From the end, which the group's own worker comes to last.
            return self._pop(max(self._groups, key=lambda g: len(self._groups[g])), at_end=True)
        return None

    def put_back(self, job: AnyJob) -> None:
        """Let a job that was taken wait again, before the others of its group."""
        self._groups.setdefault(job.group, deque()).appendleft(job)

    def _pop(self, group: str, at_end: bool = False) -> AnyJob:
        waiting = self._groups[group]
        job = waiting.pop() if at_end else waiting.popleft()
        if not waiting:
            del self._groups[group]
        return job
