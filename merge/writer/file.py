"""A file that appears under its name complete, or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from merge.errors import OutputExistsError
from merge.writer.partial import PartialOutput, sync_folder
from merge.writer.renames import rename_to_new
from merge.writer.tensors import write_error, write_errors, write_new


class OutputFile(PartialOutput):
    """Gives a file, written at `partial`, its final name once it is on the disk."""

    def check(self) -> None:
        """Refuse early what `publish` could not do.

        Raises:
            OutputExistsError: something is there already.
        """
        if not os.path.lexists(self.final):
            return
        self._require_overwrite("file")
        if self.final.is_symlink() or not self.final.is_file():
            raise OutputExistsError(
                f"{self.final} is no regular file, so it is not overwritten",
                hint="choose another name, or remove it yourself",
            )

    def _begin(self) -> None:
        """The user of the class creates the file."""

    def _discard(self) -> None:
        self.partial.unlink(missing_ok=True)

    def publish(self) -> None:
        """Give the file its final name.

        Raises:
            OutputExistsError: another run took the name meanwhile.
            OutputError: the file cannot be renamed.
        """
        self.check()
        try:
            if self.overwrite:
                self.partial.replace(self.final)
            else:
                rename_to_new(self.partial, self.final)
            self._published = True
            sync_folder(self.final.parent)
        except FileExistsError as error:
            # Another run's, that ended since `check` looked.
            self.check()
            raise write_error(self.final, error) from error
        except OSError as error:
            raise write_error(self.final, error) from error


def write_atomically(path: Path, data: bytes) -> None:
    """Write a small file so that its name stands for the old bytes or the new, never for a part.

    Raises:
        OutputError: it cannot be written; what was there stays.
    """
    with OutputFile(path, overwrite=True) as output:
        output.check()
        with write_errors(path):
            write_new(output.partial, data)
        output.publish()


@contextlib.contextmanager
def replacement(path: Path) -> Iterator[Path]:
    """Give the place of a file that takes a path's name once the block has written it.

    It is beside that path, so that the rename stays on one file system, and gone if anything fails.
    """
    partial = path.with_name(f".{path.name}.partial-{secrets.token_hex(4)}")
    try:
        yield partial
        partial.replace(path)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
