"""Positioned reads of a file, wherever it is, and what tells that it is still the same."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from merge.background.closable import Closable


@dataclass(frozen=True, slots=True)
class FileStamp:
    """What tells that a file is still the same: compared before and after a run.

    Attributes:
        device: Of the file system.
        inode: On that device.
        size_bytes: Size.
        modified_ns: Last change of the data.
    """

    device: int
    inode: int
    size_bytes: int
    modified_ns: int

    @staticmethod
    def of(status: os.stat_result) -> FileStamp:
        """Take the stamp from a stat result."""
        return FileStamp(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


class ByteReader(Closable):
    """Positioned reads of one file, wherever it is.

    Attributes:
        path: The file.
        stamp: What it was when it was opened.
    """

    path: Path
    stamp: FileStamp

    @abstractmethod
    def read(self, offset: int, size: int) -> bytes:
        """Return bytes from a position."""

    @abstractmethod
    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill a buffer from a position."""

    def parts(self, start: int, size: int, buffer: memoryview) -> Iterator[memoryview]:
        """Read bytes from a position on through a buffer; each part is gone with the next."""
        for offset in range(0, size, len(buffer)):
            part = buffer[: min(len(buffer), size - offset)]
            self.read_into(part, start + offset)
            yield part

    @abstractmethod
    def will_need(self, offset: int, size: int) -> None:
        """Say what is read next, so that it can be fetched meanwhile."""


class Opener(Protocol):
    """Opens a file by its path, and checks that it is the one that was planned."""

    def __call__(self, path: Path, expected: FileStamp | None = None) -> ByteReader:
        """Open a file for reading."""
        ...
