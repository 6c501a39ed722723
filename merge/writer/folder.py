"""A folder that appears under its name complete, or not at all."""

from __future__ import annotations

import errno
import glob
import hashlib
import os
import shutil
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from merge.errors import MergeError, OutputError, OutputExistsError, ResumeError
from merge.reader.checkpoint import FileReader
from merge.writer.journal import JOURNAL_NAME, overtaken
from merge.writer.overlap import identity
from merge.writer.partial import PartialOutput, sync_folder
from merge.writer.renames import swap_names
from merge.writer.tensors import write_all, write_error, write_errors, write_new

# What tells a folder of ours from one that must not be replaced.
MARKER = "merge_manifest.json"
CHUNK_BYTES = 1024 * 1024


class OutputFolder(PartialOutput):
    """Builds a folder beside its final name and renames it once everything is on the disk.

    Attributes:
        marker: A folder without this file is not replaced.
    """

    def __init__(
        self, final: Path, *, overwrite: bool, marker: str = MARKER, resume: bool = False
    ) -> None:
        super().__init__(final, overwrite=overwrite)
        self.marker = marker
        self._identity: tuple[int, int] | None = None
        begun = [path for path in self.leftovers() if (path / JOURNAL_NAME).is_file()]
        self.is_resumed = resume and bool(begun)
        if self.is_resumed:
            self.partial = max(begun, key=lambda path: (path / JOURNAL_NAME).stat().st_mtime_ns)

    def check(self) -> None:
        """Refuse early what `publish` could not do.

        Raises:
            OutputExistsError: something is there already.
            OutputError: the name can hold no folder.
        """
        if self.final.name in ("", ".."):
            raise OutputError(f"{self.final} cannot be an output folder")
        if not os.path.lexists(self.final) or _is_empty_folder(self.final):
            return
        self._require_overwrite("folder")
        if self.final.is_symlink() or not (self.final / self.marker).is_file():
            raise OutputExistsError(
                f"{self.final} is not an output of this tool (it has no {self.marker}), "
                "so it is not overwritten",
                hint="choose another folder, or remove it yourself",
            )

    def leftovers(self) -> list[Path]:
        """Return folders that earlier, killed runs left beside the final name; never touched.

        Unfinished ones, and whole ones of runs that were killed while they replaced an output.
        """
        name = glob.escape(self.final.name)
        found = [
            path
            for word in ("partial", "whole", "old")
            for path in self.final.parent.glob(f"{name}.{word}-*")
        ]
        return sorted(path for path in found if path != self.partial)

    @property
    def journal_path(self) -> Path:
        """Return where the journal of this output is while it is not finished."""
        return self.partial / JOURNAL_NAME

    def take_over(self, kept: Collection[str]) -> None:
        """Make what an earlier run left this run's own, and remove what it does not go on with.

        The new name is what makes it this run's: of two runs that resume at once only one can
        rename the folder, also where locks do nothing.

        Args:
            kept: Names of files to go on with.

        Raises:
            ResumeError: another run took it.
            OutputError: it cannot be renamed, or a file in it cannot be removed.
        """
        claimed = self._new_partial()
        try:
            self.partial.rename(claimed)
        except FileNotFoundError:
            raise overtaken(self.partial) from None
        except OSError as error:
            raise write_error(self.partial, error) from error
        self.partial = claimed
        self._clear(kept)

    def _clear(self, kept: Collection[str]) -> None:
        """Remove all but the journal and the files to go on with.

        Raises:
            OutputError: a file cannot be removed.
        """
        keep = {self.journal_path, *(self.partial / name for name in kept)}
        with write_errors(self.partial):
            for path in self.partial.rglob("*"):
                if not path.is_dir() and path not in keep:
                    path.unlink()

    def _written_bytes(self) -> int:
        if not self.is_resumed:
            return 0
        # Blocks and not sizes: a file that was begun has its full size and holes.
        paths = [path for path in self.partial.rglob("*") if path.is_file()]
        return sum(path.stat().st_blocks * 512 for path in paths)

    def _begin(self) -> None:
        if not self.is_resumed:
            self.partial.mkdir()
        self._identity = identity(self.partial)

    def _is_kept(self, error: BaseException | None) -> bool:
        # A signal, and not a failure that would come again.
        is_signal = error is not None and not isinstance(error, Exception)
        return isinstance(error, ResumeError) or (is_signal and self.journal_path.is_file())

    def _discard(self) -> None:
        shutil.rmtree(self.partial, ignore_errors=True)

    def place(self, name: str) -> Path:
        """Return where a file is built, its folder made.

        Raises:
            OutputError: the folder cannot be made.
        """
        path = self.partial / name
        with write_errors(path):
            for parent in reversed(path.relative_to(self.partial).parents[:-1]):
                # Never the folder itself: were it gone, a part of the output would take its name.
                (self.partial / parent).mkdir(exist_ok=True)
        return path

    @property
    def is_overtaken(self) -> bool:
        """Return True when another run goes on with what was begun here."""
        return self._identity is not None and identity(self.partial) != self._identity

    @contextmanager
    def told_of_others(self) -> Iterator[None]:
        """Name what is behind failures once another run has taken the folder.

        Raises:
            ResumeError: it has.
        """
        try:
            yield
        except MergeError as error:
            if self.is_overtaken and not self._published:
                raise overtaken(self.partial) from error
            raise

    def write_file(self, name: str, data: bytes) -> None:
        """Write a small file and make it durable."""
        path = self.place(name)
        with write_errors(path):
            write_new(path, data)

    def copy_file(self, source: Path, name: str, stop: threading.Event) -> str:
        """Copy a file byte for byte, make it durable, and return its SHA-256.

        Args:
            source: Read once, while it is hashed.
            name: Path inside the folder, with `/`.
            stop: When set, the copy is given up and an empty string returned.

        Raises:
            SourceNotFoundError: the source cannot be read.
            OutputError: the copy cannot be written.
        """
        path = self.place(name)
        digest = hashlib.sha256()
        buffer = memoryview(bytearray(CHUNK_BYTES))
        with write_errors(path):
            output = path.open("xb", buffering=0)
        with output, FileReader(source) as reader:
            offset = 0
            for chunk in reader.parts(0, reader.stamp.size_bytes, buffer):
                if stop.is_set():
                    return ""
                digest.update(chunk)
                with write_errors(path):
                    write_all(output.fileno(), chunk, offset)
                offset += len(chunk)
            reader.check_unchanged(reader.stamp)
            with write_errors(path):
                os.fsync(output.fileno())
        return digest.hexdigest()

    def publish(self) -> None:
        """Give the folder its final name.

        Raises:
            OutputExistsError: another run took the name meanwhile.
            ResumeError: another run took the folder meanwhile.
            OutputError: the folder cannot be renamed; what had the name has it still.
        """
        if self.is_overtaken:
            raise overtaken(self.partial)
        with write_errors(self.final):
            self.journal_path.unlink(missing_ok=True)
            for folder, _, _ in os.walk(self.partial):
                sync_folder(Path(folder))
            self.check()
            old = self._swap()
            try:
                sync_folder(self.final.parent)
            except OSError:
                # Whether the names reached the disk is not known: the old output is the safe one.
                self._swap_back(old)
                raise
            self._published = True
        if old is not None:
            shutil.rmtree(old, ignore_errors=True)

    def _swap(self) -> Path | None:
        """Give the folder its name; return where the output is that had it."""
        try:
            # The system refuses it when a folder with files has the name by now.
            self.partial.rename(self.final)
            return None
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
        # Of another run, perhaps, that ended since `publish` looked.
        self.check()
        # It is whole: were the run killed now, no partial folder may hold one, new or old.
        whole = self._beside("whole")
        self.partial.rename(whole)
        try:
            if swap_names(whole, self.final):
                return whole
            return self._swap_in_two_steps(whole)
        except BaseException:
            whole.rename(self.partial)
            raise

    def _swap_in_two_steps(self, whole: Path) -> Path:
        old = self._beside("old")
        self.final.rename(old)
        try:
            whole.rename(self.final)
        except BaseException:
            old.rename(self.final)
            raise
        return old

    def _swap_back(self, old: Path | None) -> None:
        """Undo `_swap`."""
        if old is not None and swap_names(old, self.final):
            old.rename(self.partial)
            return
        self.final.rename(self.partial)
        if old is not None:
            old.rename(self.final)

    def _beside(self, word: str) -> Path:
        return self.final.parent / f"{self.final.name}.{word}-{self.partial.name[-8:]}"


def _is_empty_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink() and not any(path.iterdir())
