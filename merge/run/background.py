"""Files that are copied or rewritten beside the merge."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from merge.workers import Workers

Result = TypeVar("Result")


class Background:
    """Threads that copy files beside the merge; all are gone when the block ends."""

    def __init__(self) -> None:
        self.stop = threading.Event()
        # Two at a time: more would only take cores from the merge.
        self._workers = Workers(2, "files")

    def __enter__(self) -> Background:
        return self

    def __exit__(self, *exception: object) -> None:
        self.cancel()

    def submit(self, function: Callable[..., Result], *arguments: Any) -> Future[Result]:
        """Run a function in the background."""
        return self._workers.submit(function, *arguments)

    def cancel(self) -> None:
        """Tell running work to stop, and wait until it has."""
        self.stop.set()
        self._workers.end()
