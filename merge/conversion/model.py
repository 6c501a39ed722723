"""What a conversion returns, and how it tells how far it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

# Stage, bytes done, bytes in all.
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class WrittenFile:
    """A weight file that was written.

    Attributes:
        size_bytes: Its size.
        sha256: Of the whole file.
    """

    size_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class ConvertResult:
    """A finished conversion.

    Attributes:
        path: The folder or the single file.
        layout: `diffusers` or `single-file`.
        files: The weight files by their names; those of a folder relative to it.
        left_out: Key or part of the input to the reason why the output lacks it.
        notes: What else the user should know, a line each.
    """

    path: Path
    layout: str
    files: Mapping[str, WrittenFile]
    left_out: Mapping[str, str]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Options:
    """How a conversion is done, whichever way it goes.

    Attributes:
        overwrite: Replace an earlier output.
        allow_pickle: Also read pickles.
        ema: Whether a moving average beside plain weights is taken: True, False or `auto`.
        exclude: Globs of keys of a single file that belong to no part of it and are left out.
        on_progress: Told how far it is.
    """

    overwrite: bool = False
    allow_pickle: bool = False
    ema: str | bool = "auto"
    exclude: Sequence[str] = ()
    on_progress: Progress | None = None


class ByteCount:
    """Adds up chunks and tells their sum."""

    def __init__(self, on_progress: Progress | None, total: int) -> None:
        self._on_progress = on_progress
        self._total = total
        self._done = 0

    def __call__(self, count: int) -> None:
        """Add a chunk of so many bytes."""
        self._done += count
        if self._on_progress is not None:
            self._on_progress("convert", self._done, self._total)
