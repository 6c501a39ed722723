"""Files of an output that are copied or rewritten beside the merge."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

from merge.background.closable import Closable
from merge.background.workers import Workers
from merge.family.model import Family
from merge.reader.checkpoint import read_checkpoint
from merge.records.manifest import FileRecord
from merge.writer.copies.model import TensorCopy
from merge.writer.copies.single_file import plan_single_file
from merge.writer.copies.write import write_tensor_copies
from merge.writer.folder import OutputFolder

Result = TypeVar("Result")


class FileCopies(Closable):
    """Threads that copy files beside the merge; all are gone when the block ends."""

    def __init__(self) -> None:
        self.stop = threading.Event()
        # Two at a time: more would only take cores from the merge.
        self._workers = Workers(2, "files")

    def submit(self, function: Callable[..., Result], *arguments: Any) -> Future[Result]:
        """Run a function in the background."""
        return self._workers.submit(function, *arguments)

    def close(self) -> None:
        """Tell running work to stop, and wait until it has."""
        self.stop.set()
        self._workers.end()


def write_relaid(
    folder: OutputFolder, copies: Sequence[TensorCopy], name: str, stop: threading.Event
) -> FileRecord:
    """Write a component that comes out of a single file or of pickles.

    Args:
        folder: The output.
        copies: Its tensors.
        name: Path inside the folder, with `/`.
        stop: When set, the copy is given up.

    Raises:
        IntegrityError: an input changed since it was planned.
        OutputError: the file cannot be written.
    """
    path = folder.place(name)
    return FileRecord(*write_tensor_copies(path, copies, {"format": "pt"}, stop=stop))


def write_single_file(
    folder: OutputFolder,
    name: str,
    weights: Collection[str],
    family: Family,
    metadata: Mapping[str, str],
) -> FileRecord:
    """Write all of an output's weights as one LDM/SGM file beside them.

    Args:
        folder: The output, its weight files complete.
        name: Of the single file.
        weights: Names of the output's files.
        family: The architecture.
        metadata: Strings of its header.

    Raises:
        CheckpointError: a key has no name in a single file.
        OutputError: the file cannot be written.
    """
    parts = {}
    for component in family.components:
        names = sorted(
            file
            for file in weights
            if file.startswith(f"{component.name}/") and file.endswith(".safetensors")
        )
        if names:
            parts[component.name] = read_checkpoint([folder.partial / file for file in names])
    copies = plan_single_file(parts).copies[""]
    return FileRecord(*write_tensor_copies(folder.partial / name, copies, metadata))
