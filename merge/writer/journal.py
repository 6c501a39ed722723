"""What an unfinished output holds, line by line, so that a later run can go on with it.

The first line says of which run it is; each further one that a part of a file is final, with the
SHA-256 of everything before. Lines are appended after the data is written and need no flush to the
disk: what a crash of the machine loses, the digest tells.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from merge.background.closable import Closable
from merge.errors import ResumeError
from merge.writer.tensors import write_error, write_errors

JOURNAL_NAME = ".journal.jsonl"
JOURNAL_VERSION = 1


@dataclass(frozen=True, slots=True)
class JournalMark:
    """A part of a tensor file that is final.

    Attributes:
        file: Name in the output.
        tensors: How many, in file order.
        position: The first byte after them.
        sha256: Of the header and all data before `position`.
        unchanged: Keys whose delta turned out to be zero, among those since the one before.
        overflows: Key to replaced values, likewise.
    """

    file: str
    tensors: int
    position: int
    sha256: str
    unchanged: tuple[str, ...] = ()
    overflows: Mapping[str, int] = field(default_factory=dict)


class Journal(Closable):
    """The journal of one unfinished output, locked while it is open."""

    def __init__(self, path: Path, descriptor: int, checkpoints: tuple[JournalMark, ...]) -> None:
        self.path = path
        self.checkpoints = checkpoints
        self._fd = descriptor

    @staticmethod
    def open(path: Path, facts: Mapping[str, str], *, is_resumed: bool = False) -> Journal:
        """Begin a journal, or go on with the one that is there.

        Args:
            path: In the unfinished output.
            facts: What must be the same for the bytes to be: in words, and its value.
            is_resumed: It must be there.

        Raises:
            ResumeError: the one that is there is of another run, or in use, or gone by now.
            OutputError: it cannot be written.
        """
        flags = os.O_RDWR | os.O_APPEND | os.O_CLOEXEC | (0 if is_resumed else os.O_CREAT)
        try:
            descriptor = os.open(path, flags, 0o666)
        except FileNotFoundError:
            raise overtaken(path.parent) from None
        except OSError as error:
            raise write_error(path, error) from error
        try:
            _lock(descriptor, path)
            lines = _parse(path)
            if not lines:
                with write_errors(path):
                    os.ftruncate(descriptor, 0)
                head = {"journal_version": JOURNAL_VERSION, "facts": dict(facts)}
                _append(descriptor, path, head)
                return Journal(path, descriptor, ())
            _check_facts(lines[0], facts, path)
            return Journal(path, descriptor, _marks(lines[1:]))
        except BaseException:
            os.close(descriptor)
            raise

    def close(self) -> None:
        """Let others go on with the output."""
        os.close(self._fd)

    def add(self, checkpoint: JournalMark) -> None:
        """Append a line.

        Raises:
            OutputError: it cannot be written.
        """
        _append(self._fd, self.path, asdict(checkpoint))


def overtaken(folder: Path) -> ResumeError:
    """Return the error to raise when somebody else goes on with an unfinished output."""
    return ResumeError(
        f"{folder} was taken over by another run",
        hint="wait for it, or choose another output folder",
    )


def _lock(descriptor: int, path: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ResumeError(
            f"{path.parent} is still being written by another run",
            hint="wait for it, or choose another output folder",
        ) from None
    except OSError:
        # Some network file systems have no locks; the digests still tell what is written.
        return


def _parse(path: Path) -> list[dict[str, Any]]:
    """Return the whole lines; a kill can tear the last one."""
    with write_errors(path):
        data = path.read_bytes()
    lines = []
    for line in data.splitlines(keepends=True):
        try:
            tree = json.loads(line) if line.endswith(b"\n") else None
        except ValueError:
            tree = None
        if not isinstance(tree, dict):
            break
        lines.append(tree)
    return lines


def _check_facts(head: Mapping[str, Any], facts: Mapping[str, str], path: Path) -> None:
    known = head.get("facts")
    if head.get("journal_version") != JOURNAL_VERSION or not isinstance(known, dict):
        known = {}
    changed = [name for name, value in facts.items() if known.get(name) != value]
    if changed:
        raise ResumeError(
            f"{path.parent} cannot be resumed: {', '.join(changed)} changed since it was begun",
            hint="run without --resume to begin anew; the leftover folder can be removed",
        )


def _marks(lines: list[dict[str, Any]]) -> tuple[JournalMark, ...]:
    found = []
    for line in lines:
        try:
            found.append(JournalMark(**{**line, "unchanged": tuple(line["unchanged"])}))
        except (KeyError, TypeError):
            break
    return tuple(found)


def _append(descriptor: int, path: Path, tree: Mapping[str, Any]) -> None:
    data = json.dumps(tree).encode() + b"\n"
    with write_errors(path):
        while data:
            data = data[os.write(descriptor, data) :]
