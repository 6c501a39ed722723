"""The files of an export against its manifest."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from merge.background.closable import Closable
from merge.background.digest_process import DigestProcess
from merge.errors import SourceNotFoundError, VerificationError
from merge.records.folder import OutputRecords
from merge.records.provenance import check_provenance


def verify_files(folder: str | Path, on_bytes: Callable[[int, int], None] | None = None) -> int:
    """Recompute the SHA-256 of every file in the folder's manifest, and of the manifest.

    The manifest's own digest is in the provenance statement, which follows from manifest and lock
    byte for byte: a bit that flips anywhere in the reproducible set is found.

    Args:
        folder: An output of `run`.
        on_bytes: Called with the number of bytes that were hashed, and of all.

    Returns:
        The number of files.

    Raises:
        SourceNotFoundError: the folder has no manifest.
        VerificationError: a file is missing or differs; all are named.
    """
    folder = Path(folder)
    manifest = OutputRecords(folder).manifest
    if manifest is None:
        raise SourceNotFoundError(
            f"{folder} has no merge_manifest.json", hint="only outputs of `run` have one"
        )
    with FilesCheck(folder, manifest["files"]) as check:
        wrong = check.result(on_bytes)
    wrong += check_provenance(folder)
    if wrong:
        raise VerificationError(
            f"{len(wrong)} file(s) of {folder} differ from its manifest: {'; '.join(wrong)}",
            hint="download the folder again, or run the recipe again",
        )
    return len(manifest["files"])


class FilesCheck(Closable):
    """Hashes the files of a manifest in a process of its own from the moment it is made."""

    def __init__(self, folder: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
        """Look at names and sizes, and start to hash what is left.

        Args:
            folder: That the names are relative to.
            files: Name to `size` and `sha256`.
        """
        self._files = files
        self._wrong: dict[str, str] = {}
        for name, record in sorted(files.items()):
            path = folder / name
            if not path.is_file():
                self._wrong[name] = "is missing"
            elif path.stat().st_size != record["size"]:
                self._wrong[name] = f"has {path.stat().st_size} bytes, not {record['size']}"
        self._names = [name for name in sorted(files) if name not in self._wrong]
        self._process = DigestProcess([folder / name for name in self._names])

    def result(self, on_bytes: Callable[[int, int], None] | None = None) -> list[str]:
        """Wait, and return a line for each file that is not as recorded, sorted by name."""
        total = sum(int(self._files[name]["size"]) for name in self._names)
        done = 0

        def count(size: int) -> None:
            nonlocal done
            done += size
            if on_bytes is not None:
                on_bytes(done, total)

        for name, actual in zip(self._names, self._process.result(count), strict=True):
            if actual != self._files[name]["sha256"]:
                self._wrong[name] = f"has SHA-256 {actual}, not {self._files[name]['sha256']}"
        return [f"{name} {what}" for name, what in sorted(self._wrong.items())]

    def close(self) -> None:
        """End the process if it still runs."""
        self._process.close()
