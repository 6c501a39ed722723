"""SHA-256 of whole files, here or beside other work."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from merge.background import digest_worker as worker
from merge.errors import SourceError, SourceNotFoundError


class DigestProcess:
    """Hashes files in a child process from the moment it is made.

    A process and not threads, since importing torch holds the interpreter lock: threads that hash
    meanwhile got a third of a core each, and 5 GB took 3.3 s instead of 2.4 on two cores.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = paths
        # Isolated and without site-packages, it starts in 20 ms.
        command = [sys.executable, "-I", "-S", worker.__file__, *map(str, paths)]
        # A session of its own, so that Ctrl-C reaches us alone and we end it.
        self._child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
            errors="surrogateescape",
            start_new_session=True,
        )

    def result(self, on_bytes: Callable[[int], None]) -> list[str]:
        """Wait for the digests, in the order of the files.

        Args:
            on_bytes: Called with the number of bytes that were hashed since the last call.

        Raises:
            SourceNotFoundError: a file cannot be read.
        """
        digests = [""] * len(self._paths)
        assert self._child.stdout is not None
        for line in self._child.stdout:
            index, kind, value = line.rstrip("\n").split(" ", 2)
            if kind == "bytes":
                on_bytes(int(value))
            elif kind == "sha256":
                digests[int(index)] = value
            else:
                raise SourceNotFoundError(f"cannot read {self._paths[int(index)]}: {value}")
        if self._child.wait() or not all(digests):
            raise SourceError("the process that hashes the inputs was killed")
        return digests

    def close(self) -> None:
        """End the process if it still runs."""
        self._child.kill()
        self._child.wait()
        if self._child.stdout is not None:
            self._child.stdout.close()
