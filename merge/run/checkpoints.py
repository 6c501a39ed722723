"""Weight files of a run around the merge: checked before, rewritten beside it."""

from __future__ import annotations

import threading
from collections.abc import Collection, Mapping, Sequence

from merge.keymap.single_file import COMPONENTS
from merge.layout import TensorCopy, plan_single_file, write_tensor_copies
from merge.manifest import FileRecord
from merge.plan import MergePlan
from merge.reader import read_checkpoint, verify_records
from merge.writer import OutputFolder


def check_records(plan: MergePlan) -> None:
    """Compare the checksums inside of pickles, which torch itself does not look at.

    Args:
        plan: Of its inputs, those that are pickles are read once.

    Raises:
        CheckpointError: a record is damaged.
        IntegrityError: a file changed since it was planned.
    """
    relaid = (copy for copies in plan.relaid.values() for copy in copies)
    inputs = (part for copy in relaid for piece in copy.pieces for part in piece.inputs)
    stamps = {part.path: part.stamp for part in inputs}
    for path, stamp in (stamps | {file.path: file.stamp for file in plan.files}).items():
        verify_records(path, stamp)


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
    folder: OutputFolder, name: str, weights: Collection[str], metadata: Mapping[str, str]
) -> FileRecord:
    """Write all of an output's weights as one LDM/SGM file beside them.

    Args:
        folder: The output, its weight files complete.
        name: Of the single file.
        weights: Names of the output's files.
        metadata: Strings of its header.

    Raises:
        CheckpointError: a key has no name in a single file.
        OutputError: the file cannot be written.
    """
    parts = {}
    for component in COMPONENTS:
        names = sorted(
            file
            for file in weights
            if file.startswith(f"{component}/") and file.endswith(".safetensors")
        )
        if names:
            parts[component] = read_checkpoint([folder.partial / file for file in names])
    copies = plan_single_file(parts).copies[""]
    return FileRecord(*write_tensor_copies(folder.partial / name, copies, metadata))
