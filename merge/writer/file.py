"""A file that appears under its name complete, or not at all."""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from types import TracebackType

from merge.errors import OutputExistsError
from merge.writer.folder import OutputFolder
from merge.writer.tensors import write_error


class OutputFile:
    """Gives a file its final name once it is on the disk.

    Attributes:
        final: The name that it gets.
        partial: Where it is written: `<final>.partial-<id>`, on the same file system.
    """

    def __init__(self, final: Path, *, overwrite: bool) -> None:
        self.final = final
        self.overwrite = overwrite
        self.partial = final.parent / f"{final.name}.partial-{secrets.token_hex(4)}"
        self._created: list[Path] = []
        self._published = False

    def check(self) -> None:
        """Refuse early what `publish` could not do.

        Raises:
            OutputExistsError: something is there already.
        """
        if not os.path.lexists(self.final):
            return
        if not self.overwrite:
            raise OutputExistsError(
                f"the output file {self.final} exists already",
                hint="add --overwrite to replace it, or choose another name",
            )
        if self.final.is_symlink() or not self.final.is_file():
            raise OutputExistsError(
                f"{self.final} is no regular file, so it is not overwritten",
                hint="choose another name, or remove it yourself",
            )

    def check_space(self, needed_bytes: int) -> None:
        """Compare the size of the output with the free space.

        Raises:
            NoSpaceError: the disk is too small.
        """
        OutputFolder(self.final, overwrite=False).check_space(needed_bytes)

    def __enter__(self) -> OutputFile:
        self.check()
        try:
            missing = self.final.parent
            while not missing.exists():
                self._created.append(missing)
                missing = missing.parent
            self.final.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            self._remove_created()
            raise write_error(self.final.parent, error) from error
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self._published:
            self.partial.unlink(missing_ok=True)
            self._remove_created()

    def publish(self) -> None:
        """Give the file its final name.

        Raises:
            OutputExistsError: another run took the name meanwhile.
            OutputError: the file cannot be renamed.
        """
        self.check()
        try:
            self.partial.replace(self.final)
            self._published = True
            descriptor = os.open(self.final.parent, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise write_error(self.final, error) from error

    def _remove_created(self) -> None:
        for folder in self._created:
            try:
                folder.rmdir()
            except OSError:
                # Somebody else uses it by now.
                return
