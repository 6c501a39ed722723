"""SIGINT and SIGTERM: unwind once, and surely."""

from __future__ import annotations

import signal
import sys
from types import FrameType
from typing import Any

# How long until an interruption is raised that had to wait, or raised again when it got lost.
# Short, since there is hardly a moment between the imports of a start.
_AGAIN_S = 0.01


class Terminated(BaseException):
    """SIGTERM arrived; unwinds like Ctrl-C, so that nothing half-written stays."""


class UnwindingSignals:
    """Lets SIGINT raise KeyboardInterrupt, and SIGTERM `Terminated`, in the main thread.

    An import is finished first: numpy's extension modules swallow what is raised meanwhile, and
    torch's abort the process. While an interruption unwinds, neither it nor the clean-up is
    disturbed by a second signal. One that got lost all the same, in a finalizer or in C code that
    clears every error, is raised anew by a timer, until `end`.

    Attributes:
        received: What came first; None as long as there was no signal.
    """

    def __init__(self) -> None:
        self.received: type[BaseException] | None = None
        self._has_ended = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> UnwindingSignals:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM):
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        self.end()
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, previous in self._before.items():
            # All that is left to an interrupted process is to exit with its code.
            signal.signal(number, signal.SIG_IGN if self.received else previous)

    def end(self) -> None:
        """Raise nothing any more: the work is done, or what came has unwound it."""
        self._has_ended = True

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received = Terminated if number == signal.SIGTERM else KeyboardInterrupt
        if self._has_ended:
            return
        signal.setitimer(signal.ITIMER_REAL, _AGAIN_S)
        if not _is_importing(frame) and not _is_unwinding():
            raise self.received


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back
    return False


def _is_unwinding() -> bool:
    """Return True in a `finally`, `except` or `__exit__` that an interruption runs through."""
    error = sys.exception()
    while error is not None:
        if isinstance(error, (KeyboardInterrupt, Terminated)):
            return True
        error = error.__context__
    return False
