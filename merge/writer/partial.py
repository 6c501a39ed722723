"""What files and folders that appear whole or not at all have in common."""

from __future__ import annotations

import os
import secrets
import shutil
from abc import ABC, abstractmethod
from pathlib import Path
from types import TracebackType
from typing import Self

from merge.errors import NoSpaceError, OutputExistsError
from merge.writer.tensors import MORE_SPACE_HINT, write_error


class PartialOutput(ABC):
    """Something built beside its final name and renamed once everything is on the disk.

    Attributes:
        final: The name that it gets.
        partial: Where it is built: `<final>.partial-<id>`, on the same file system.
    """

    def __init__(self, final: Path, *, overwrite: bool) -> None:
        self.final = final
        self.overwrite = overwrite
        self.partial = self._new_partial()
        self._created: list[Path] = []
        self._needed_bytes = 0
        self._published = False

    def _new_partial(self) -> Path:
        return self.final.parent / f"{self.final.name}.partial-{secrets.token_hex(4)}"

    @abstractmethod
    def check(self) -> None:
        """Refuse early what publishing could not do."""

    def _require_overwrite(self, what: str) -> None:
        """Refuse what has the final name, unless it may be replaced."""
        if not self.overwrite:
            raise OutputExistsError(
                f"the output {what} {self.final} exists already",
                hint="add --overwrite to replace it, or choose another name",
            )

    @abstractmethod
    def _begin(self) -> None:
        """Make what is needed before anything can be written."""

    @abstractmethod
    def _discard(self) -> None:
        """Remove what was written, as far as there is any."""

    def check_space(self, needed_bytes: int) -> None:
        """Compare the exact size of the output with the free space.

        Raises:
            NoSpaceError: the disk is too small.
        """
        self._needed_bytes = needed_bytes
        folder, free_bytes = self._free()
        if needed_bytes - self._written_bytes() > free_bytes:
            raise NoSpaceError(
                f"the output needs {needed_bytes:,} bytes and {folder} has {free_bytes:,} free",
                hint=MORE_SPACE_HINT,
            )

    def _free(self) -> tuple[Path, int]:
        """Return a folder of the output's file system, and how many bytes are free there."""
        folder = self.final.parent
        while not folder.exists():
            folder = folder.parent
        return folder, shutil.disk_usage(folder).free

    def _written_bytes(self) -> int:
        """Return what the disk holds of the output already."""
        return 0

    def __enter__(self) -> Self:
        self.check()
        try:
            missing = self.final.parent
            while not missing.exists():
                self._created.append(missing)
                missing = missing.parent
            self.final.parent.mkdir(parents=True, exist_ok=True)
            self._begin()
        except OSError as error:
            self._remove_created()
            raise write_error(self.partial, error) from error
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if isinstance(error, NoSpaceError) and self._needed_bytes:
            folder, free_bytes = self._free()
            error.message += (
                f" (the output needs {self._needed_bytes:,} bytes in all, and {folder} has "
                f"{free_bytes:,} free)"
            )
        if not self._published and not self._is_kept(error):
            self._discard()
            self._remove_created()

    def _is_kept(self, error: BaseException | None) -> bool:
        """Return True for what a later run can go on with."""
        return False

    def _remove_created(self) -> None:
        for folder in self._created:
            try:
                folder.rmdir()
            except OSError:
                # Somebody else uses it by now.
                return


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
