"""PyTorch's checkpoints in a run: checked before the merge, converted beside it."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from merge.layout import copies_of, write_tensor_copies
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
