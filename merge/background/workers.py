"""Threads that are all gone when they are told to end, whenever a signal came."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

Result = TypeVar("Result")


class Workers:
    """A pool of threads whose end waits for what runs, also where a signal broke its start.

    Futures, not threads: a signal that interrupts Thread.join makes Python 3.11 take the thread for
    finished. And not the executor alone: one that interrupts Thread.start leaves a thread that
    works, and that the executor does not know.
    """

    def __init__(self, count: int, name: str) -> None:
        """Prepare up to `count` threads; each begins with `name`.

        None runs before `submit`, and one that a signal interrupts may have started its work, so
        `end` has to follow even then.
        """
        self._pool = ThreadPoolExecutor(max_workers=count, thread_name_prefix=name)
        self._running: list[threading.Lock] = []

    def submit(self, function: Callable[..., Result], *arguments: Any) -> Future[Result]:
        """Run a function in a thread, when one is free."""
        is_running = threading.Lock()
        self._running.append(is_running)
        return self._pool.submit(_run, is_running, function, *arguments)

    def end(self) -> None:
        """Begin nothing more, and wait for what runs; telling it to stop is the caller's part."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        for is_running in self._running:
            with is_running:
                pass


def _run(is_running: threading.Lock, function: Callable[..., Result], *arguments: Any) -> Result:
    with is_running:
        return function(*arguments)
