"""PyTorch's checkpoints in a run: checked before the merge, converted beside it."""

from __future__ import annotations

import threading
from collections.abc import Collection, Mapping, Sequence

from merge.keymap.single_file import COMPONENTS
from merge.layout import TensorCopy, copies_of, plan_single_file, write_tensor_copies
from merge.manifest import FileRecord
from merge.plan import PlanFile
from merge.reader import read_checkpoint, verify_records
from merge.sources import SourceFile
from merge.writer import OutputFolder


def check_records(files: Sequence[PlanFile]) -> None:
    """Compare the checksums inside of pickles, which torch itself does not look at.

    Raises:
        CheckpointError: a record is damaged.
        IntegrityError: a file changed since it was planned.
    """
    for file in files:
        verify_records(file.path, file.stamp)


def convert_weights(
    folder: OutputFolder, files: Sequence[SourceFile], name: str, stop: threading.Event
) -> FileRecord:
    """Write the tensors of pickles as one safetensors file of the output.

    Args:
        folder: The output.
        files: One pickle, or all shards.
        name: Path inside the folder, with `/`.
        stop: When set, the conversion is given up.

    Raises:
        CheckpointError: a pickle breaks a rule or is damaged.
        OutputError: the file cannot be written.
    """
    checkpoint = read_checkpoint([file.path for file in files], allow_pickle=True)
    for file in checkpoint.files:
        verify_records(file.path, file.stamp)
    path = folder.partial / name
    path.parent.mkdir(parents=True, exist_ok=True)
    return FileRecord(
        *write_tensor_copies(path, copies_of(checkpoint), {"format": "pt"}, stop=stop)
    )


def write_relaid(
    folder: OutputFolder, copies: Sequence[TensorCopy], name: str, stop: threading.Event
) -> FileRecord:
    """Write a component that comes out of a single file.

    Args:
        folder: The output.
        copies: Its tensors.
        name: Path inside the folder, with `/`.
        stop: When set, the copy is given up.

    Raises:
        IntegrityError: the single file changed since it was planned.
        OutputError: the file cannot be written.
    """
    path = folder.partial / name
    path.parent.mkdir(parents=True, exist_ok=True)
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
