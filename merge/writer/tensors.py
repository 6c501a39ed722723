"""A safetensors file written at known positions, in any order, by several threads."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from merge.background.closable import Closable
from merge.errors import NoSpaceError, OutputError

MORE_SPACE_HINT = "free some space, or choose another disk for the output"
_HINTS = {
    errno.ENOSPC: MORE_SPACE_HINT,
    errno.EDQUOT: MORE_SPACE_HINT,
    errno.EFBIG: "the file system or `ulimit -f` forbids files of this size",
}


class TensorSink(Protocol):
    """Takes the bytes of a tensor file at known positions, from several threads."""

    def write(self, data: memoryview, offset: int) -> None:
        """Take all of a buffer."""
        ...


class MemoryFile:
    """A tensor file in memory.

    Attributes:
        data: Header and data.
    """

    def __init__(self, size_bytes: int) -> None:
        self.data = memoryview(bytearray(size_bytes))

    def write(self, data: memoryview, offset: int) -> None:
        """Take all of a buffer."""
        self.data[offset : offset + data.nbytes] = data.cast("B")

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Give back what was written, for its digest."""
        buffer[:] = self.data[offset : offset + buffer.nbytes]


class TensorFileWriter(Closable):
    """One output file: data first, header last.

    Until `finish` the first bytes are zero, a header length that every reader refuses, so a file
    that was not finished never loads.
    """

    def __init__(self, path: Path, size_bytes: int, *, is_resumed: bool = False) -> None:
        """Create the file at its full size.

        Args:
            path: Must not exist, unless it is resumed.
            size_bytes: Header and data together.
            is_resumed: Go on with the file that is there, if there is one.

        Raises:
            OutputError: it exists or cannot be created.
        """
        self.path = path
        self.size_bytes = size_bytes
        self._fd = -1
        try:
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | (0 if is_resumed else os.O_EXCL)
            self._fd = os.open(path, flags, 0o666)
            if is_resumed:
                # It may be whole already: as long as it changes, it must not open.
                write_all(self._fd, memoryview(bytes(min(8, size_bytes))), 0)
            os.ftruncate(self._fd, size_bytes)
        except OSError as error:
            self.close()
            raise write_error(path, error) from error

    def close(self) -> None:
        """Close the file; without `finish` it stays unreadable."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def write(self, data: memoryview, offset: int) -> None:
        """Write all of a buffer at a position of the file.

        Raises:
            NoSpaceError: the disk or a quota is full.
            OutputError: any other failure.
        """
        with write_errors(self.path):
            write_all(self._fd, data, offset)

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Read back what was written, for its digest.

        Raises:
            OutputError: it is not there any more, or the disk fails.
        """
        done = 0
        while done < len(buffer):
            try:
                count = os.preadv(self._fd, [buffer[done:]], offset + done)
            except OSError as error:
                raise OutputError(f"cannot read back {self.path}: {error.strerror}") from error
            if count == 0:
                raise OutputError(f"{self.path} was cut short while it was written")
            done += count

    def flush(self) -> None:
        """Bring what was written so far to the disk.

        Raises:
            OutputError: the system could not; this is final, since it forgets the lost pages.
        """
        with write_errors(self.path):
            os.fsync(self._fd)

    def finish(self, header: bytes) -> None:
        """Write the header and make the whole file durable.

        The data is made durable before the header, so that no crash leaves a file that opens and
        lacks data.
        """
        self.flush()
        self.write(memoryview(header), 0)
        self.flush()
        self.close()


def write_all(descriptor: int, data: memoryview, offset: int) -> None:
    """Write a whole buffer; one call may write less than asked."""
    done = 0
    while done < len(data):
        done += os.pwrite(descriptor, data[done:], offset + done)


def write_new(path: Path, data: bytes) -> None:
    """Write a small file that must not be there yet, and make it durable."""
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """Say of failures inside the block that this file or folder cannot be written.

    Raises:
        NoSpaceError: the disk or a quota is full.
        OutputError: any other failure.
    """
    try:
        yield
    except OSError as error:
        raise write_error(path, error) from error


def write_error(path: Path, error: OSError) -> OutputError:
    """Return the error to raise for a failed write, with what the user can do about it."""
    message = f"cannot write {path}: {error.strerror or error}"
    if error.errno in _HINTS:
        return NoSpaceError(message, hint=_HINTS[error.errno])
    return OutputError(message)
