"""What a process does to the machine, seen through Python's audit events."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Events that change names on a disk, and how many of their first arguments are paths.
_CHANGES = {
    **dict.fromkeys(("os.mkdir", "os.chmod", "os.truncate", "shutil.rmtree"), 1),
    **dict.fromkeys(("os.rmdir", "os.remove"), 1),
    **dict.fromkeys(("os.rename", "os.link", "os.symlink"), 2),
}
_NETWORK = ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "urllib.Request")
_PROGRAMS = ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen")
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
CANARY = "canary_"


class Watch:
    """Notes what a process should not do. It cannot be taken off again: use it in a child.

    Attributes:
        seen: One line for each thing that happened.
    """

    def __init__(self, writable: Sequence[Path]) -> None:
        self.seen: list[str] = []
        self._writable = [str(folder) for folder in writable]
        sys.addaudithook(self._note)

    def _note(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if isinstance(path, (str, bytes)) and flags & _WRITING:
                self._note_path(event, path)
        elif event in ("os.rmdir", "os.remove") and arguments[1] != -1:
            # Inside of a folder that is removed as a whole.
            return
        elif event in _CHANGES:
            for path in arguments[: _CHANGES[event]]:
                self._note_path(event, path)
        elif event in _NETWORK:
            self.seen.append(f"{event} {arguments[1:]}")
        elif event in _PROGRAMS:
            # Our own interpreter hashes beside the merge.
            if event != "subprocess.Popen" or arguments[0] != sys.executable:
                self.seen.append(f"{event} {arguments[0]}")
        elif event == "import" and arguments[0].startswith(CANARY):
            self.seen.append(f"import {arguments[0]}")
        elif event == "pickle.find_class":
            self.seen.append(f"unpickles {arguments}")

    def _note_path(self, event: str, path: Any) -> None:
        if not isinstance(path, (str, bytes, os.PathLike)):
            return
        # Not resolved: what a link is called counts, and the disk decides the rest.
        name = os.path.normpath(Path.cwd() / os.fsdecode(path))
        is_device = name.startswith(("/dev/null", "/proc/self/"))
        if not is_device and not any(
            name == folder or name.startswith(f"{folder}/") for folder in self._writable
        ):
            self.seen.append(f"{event} {name}")
