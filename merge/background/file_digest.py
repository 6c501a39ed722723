"""The SHA-256 of a file that is still being written."""

from __future__ import annotations

import hashlib
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future

from merge.background.workers import Workers

CHUNK_BYTES = 1024 * 1024


class FileDigest:
    """The SHA-256 of a tensor file while its data is written in order.

    The thread follows `advance`, reading back from the page cache what was written a moment ago.
    """

    def __init__(
        self,
        read_into: Callable[[memoryview, int], None],
        header: bytes,
        size_bytes: int,
        on_mark: Callable[[int, str], None] | None = None,
    ) -> None:
        """Prepare; `start` starts the thread.

        Args:
            read_into: Reads the file's data at a position.
            header: The file's first bytes, which are written last.
            size_bytes: Header and data together.
            on_mark: Told a marked position and the digest of everything before it.
        """
        self._read_into = read_into
        self._header = header
        self._size = size_bytes
        self._on_mark = on_mark
        self._marks: deque[int] = deque()
        self._written = 0
        self._stopped = False
        self._changed = threading.Condition()
        self._workers = Workers(1, "digest")
        self._future: Future[str] | None = None

    def start(self) -> None:
        """Start the thread.

        A signal may interrupt this once the thread runs, so `stop` has to follow even then.
        """
        self._future = self._workers.submit(self._run)

    def advance(self, written_bytes: int, *, is_marked: bool = False) -> None:
        """Say that every byte before this position is written.

        Args:
            written_bytes: The position.
            is_marked: The digest up to there is wanted.
        """
        with self._changed:
            self._written = written_bytes
            if is_marked:
                self._marks.append(written_bytes)
            self._changed.notify()

    def result(self) -> str:
        """Wait for the digest of the whole file.

        Raises:
            OutputError: the file could not be read back.
        """
        assert self._future is not None, "not started"
        try:
            return self._future.result()
        finally:
            self.stop()

    def stop(self) -> None:
        """End the thread without a result."""
        with self._changed:
            self._stopped = True
            self._changed.notify()
        self._workers.end()

    def _run(self) -> str:
        digest = hashlib.sha256(self._header)
        position = len(self._header)
        buffer = memoryview(bytearray(CHUNK_BYTES))
        while position < self._size:
            with self._changed:
                while self._written <= position and not self._stopped:
                    self._changed.wait()
                if self._stopped:
                    return ""
                available = self._written - position
                mark = self._marks[0] if self._marks else self._size
            count = min(available, CHUNK_BYTES, mark - position)
            self._read_into(buffer[:count], position)
            digest.update(buffer[:count])
            position += count
            if position == mark and self._marks:
                self._marks.popleft()
                if self._on_mark is not None:
                    self._on_mark(position, digest.copy().hexdigest())
        return digest.hexdigest()
