"""What the merged weights are: finite, and how far from the target's.

Tensors are streamed in chunks from both files at once, so that this costs one read of each and a
few megabytes of memory, and no model.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from merge.engine.buffers import TORCH_DTYPES
from merge.family.model import Blocks
from merge.family.registry import main_among, main_names, recognise
from merge.reader.checkpoint import Checkpoint, FileReader, read_checkpoint
from merge.sources.select import select_weights
from merge.verify.metrics import Values
from merge.verify.model import BlockNorm

_CHUNK_ELEMENTS = 2 * 1024 * 1024
_DTYPES = {**TORCH_DTYPES, "F64": torch.float64}

# Returns some elements of a tensor, by its key, the first one's index and their number.
Read = Callable[[str, int, int], torch.Tensor]


@dataclass(frozen=True, slots=True)
class WeightsMeasured:
    """What was found in the merged model's files.

    Attributes:
        non_finite: Key to the number of NaN or infinite values, where there are any.
        blocks: Relative size of the delta per block, in the order of the model; empty without a
            target, or when the target's keys or shapes are others.
    """

    non_finite: Mapping[str, int]
    blocks: tuple[BlockNorm, ...]


def main_weights(folder: Path) -> tuple[Path, ...]:
    """Return the weight files of a pipeline folder's main component.

    Raises:
        SourceNotFoundError: it has none.
    """
    part = folder / (main_among(lambda name: (folder / name).is_dir()) or main_names()[0])
    names = {path.name for path in part.iterdir()} if part.is_dir() else set()
    return tuple(part / name for name in select_weights(names, None, str(part)).names)


def measure_weights(
    merged: Sequence[Path], target: Sequence[Path] = (), stop: threading.Event | None = None
) -> WeightsMeasured:
    """Count non-finite values, and measure each block's distance to the target.

    Args:
        merged: The merged model's files.
        target: The unmerged model's files under the same keys; empty measures no distance.
        stop: Set to leave off; what was measured until then is returned.

    Raises:
        CheckpointError: a file breaks its format.
    """
    ours = read_checkpoint(merged)
    theirs = read_checkpoint(target, allow_pickle=True) if target else None
    if theirs is not None and not _is_comparable(ours, theirs):
        theirs = None
    found = recognise(ours.shapes)
    groups = found.family.blocks if found is not None else Blocks()
    non_finite: dict[str, int] = {}
    squares: dict[str, Values] = {}
    with ExitStack() as stack:
        ours_of = stack.enter_context(_opened(ours))
        theirs_of = stack.enter_context(_opened(theirs)) if theirs is not None else None
        for key, (_, spec) in ours.tensors.items():
            if stop is not None and stop.is_set():
                break
            if spec.dtype not in _DTYPES:
                continue
            count, moved, size = _measure_tensor(key, spec.element_count, ours_of, theirs_of)
            if count:
                non_finite[key] = count
            total = squares.setdefault(groups.group(key), np.zeros(3))
            total += (moved, size, spec.element_count)
    return WeightsMeasured(non_finite, _blocks(squares, groups) if theirs is not None else ())


def load_weights(module: torch.nn.Module, files: Sequence[Path]) -> bool:
    """Put the tensors of files in place of a module's own, one at a time.

    Another model of the same shapes then needs no memory of its own.

    Args:
        module: A loaded UNet.
        files: Weight files.

    Returns:
        False, and the module is as it was, when keys or shapes are others.

    Raises:
        CheckpointError: a file breaks its format.
    """
    checkpoint = read_checkpoint(files, allow_pickle=True)
    state = module.state_dict()
    fits = checkpoint.shapes == {key: tuple(value.shape) for key, value in state.items()} and all(
        spec.dtype in _DTYPES for _, spec in checkpoint.tensors.values()
    )
    if not fits:
        return False
    with _opened(checkpoint) as read, torch.no_grad():
        for key, (_, spec) in checkpoint.tensors.items():
            state[key].copy_(read(key, 0, spec.element_count).view(spec.shape))
    return True


def _is_comparable(ours: Checkpoint, theirs: Checkpoint) -> bool:
    return ours.shapes == theirs.shapes and all(
        theirs.tensors[key][1].dtype in _DTYPES
        for key, (_, spec) in ours.tensors.items()
        if spec.dtype in _DTYPES
    )


def _measure_tensor(
    key: str, elements: int, read: Read, read_other: Read | None
) -> tuple[int, float, float]:
    """Return the number of non-finite values, and the squared norms of the move and the target.

    The differences are float32, their squares are summed in float64.
    """
    count, moved, size = 0, 0.0, 0.0
    for first in range(0, elements, _CHUNK_ELEMENTS):
        length = min(_CHUNK_ELEMENTS, elements - first)
        values = read(key, first, length)
        count += length - int(torch.isfinite(values).sum())
        if read_other is not None:
            before = read_other(key, first, length)
            moved += _squared_norm(values - before)
            size += _squared_norm(before)
    return count, moved, size


def _squared_norm(values: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(values, dtype=torch.float64)) ** 2


@contextmanager
def _opened(checkpoint: Checkpoint) -> Iterator[Read]:
    """Open the files of a checkpoint, and give what reads their tensors."""
    with ExitStack() as stack:
        readers = [stack.enter_context(FileReader(file.path)) for file in checkpoint.files]

        def read(key: str, first: int, length: int) -> torch.Tensor:
            index, spec = checkpoint.tensors[key]
            width = spec.size_bytes // spec.element_count
            buffer = bytearray(length * width)
            readers[index].read_into(memoryview(buffer), spec.start + first * width)
            values = torch.frombuffer(buffer, dtype=_DTYPES[spec.dtype])
            # What is finite in float64 need not be so in float32.
            return values if spec.dtype == "F64" else values.to(torch.float32)

        yield read


def _blocks(squares: Mapping[str, Values], groups: Blocks) -> tuple[BlockNorm, ...]:
    blocks = []
    for name in sorted(squares, key=groups.group_rank):
        moved, size, count = squares[name].tolist()
        blocks.append(BlockNorm(name, (moved / size) ** 0.5 if size else 0.0, int(count)))
    return tuple(blocks)
