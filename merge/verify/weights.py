"""What the merged weights are: finite, and how far from the target's.

Tensors are streamed in chunks from both files at once, so that this costs one read of each and a
few megabytes of memory, and no model.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from merge.family.model import Blocks
from merge.family.registry import main_names, recognise
from merge.header.model import TensorSpec
from merge.reader.checkpoint import Checkpoint, FileReader, read_checkpoint
from merge.sources.select import select_weights
from merge.verify.model import BlockNorm

_CHUNK_ELEMENTS = 2 * 1024 * 1024
_DTYPES = {
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


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
    known = main_names()
    part = folder / next((name for name in known if (folder / name).is_dir()), known[0])
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
    squares: dict[str, list[float]] = {}
    with ExitStack() as stack:
        our_readers = [stack.enter_context(FileReader(file.path)) for file in ours.files]
        their_files = theirs.files if theirs is not None else ()
        their_readers = [stack.enter_context(FileReader(file.path)) for file in their_files]
        for key, (index, spec) in ours.tensors.items():
            if stop is not None and stop.is_set():
                break
            if spec.dtype not in _DTYPES:
                continue
            other = None
            if theirs is not None:
                their_index, their_spec = theirs.tensors[key]
                other = (their_readers[their_index], their_spec)
            count, moved, size = _measure_tensor(our_readers[index], spec, other)
            if count:
                non_finite[key] = count
            total = squares.setdefault(groups.group(key), [0.0, 0.0, 0])
            total[0] += moved
            total[1] += size
            total[2] += spec.element_count
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
    with ExitStack() as stack, torch.no_grad():
        readers = [stack.enter_context(FileReader(file.path)) for file in checkpoint.files]
        for key, (index, spec) in checkpoint.tensors.items():
            values = _read(readers[index], spec, 0, spec.element_count)
            state[key].copy_(values.view(spec.shape))
    return True


def _is_comparable(ours: Checkpoint, theirs: Checkpoint) -> bool:
    return ours.shapes == theirs.shapes and all(
        theirs.tensors[key][1].dtype in _DTYPES
        for key, (_, spec) in ours.tensors.items()
        if spec.dtype in _DTYPES
    )


def _measure_tensor(
    reader: FileReader, spec: TensorSpec, other: tuple[FileReader, TensorSpec] | None
) -> tuple[int, float, float]:
    """Return the number of non-finite values, and the squared norms of the move and the target.

    The differences are float32, their squares are summed in float64.
    """
    count, moved, size = 0, 0.0, 0.0
    for first in range(0, spec.element_count, _CHUNK_ELEMENTS):
        length = min(_CHUNK_ELEMENTS, spec.element_count - first)
        values = _read(reader, spec, first, length)
        finite = torch.isfinite(values)
        if not bool(finite.all()):
            count += length - int(finite.sum())
        if other is not None:
            before = _read(*other, first, length)
            moved += _squared_norm(values - before)
            size += _squared_norm(before)
    return count, moved, size


def _squared_norm(values: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(values, dtype=torch.float64)) ** 2


def _read(reader: FileReader, spec: TensorSpec, first: int, length: int) -> torch.Tensor:
    width = spec.size_bytes // spec.element_count
    buffer = bytearray(length * width)
    reader.read_into(memoryview(buffer), spec.start + first * width)
    values = torch.frombuffer(buffer, dtype=_DTYPES[spec.dtype])
    # What is finite in float64 need not be so in float32.
    return values if spec.dtype == "F64" else values.to(torch.float32)


def _blocks(squares: Mapping[str, Sequence[float]], groups: Blocks) -> tuple[BlockNorm, ...]:
    return tuple(
        BlockNorm(
            name,
            (squares[name][0] / squares[name][1]) ** 0.5 if squares[name][1] else 0.0,
            int(squares[name][2]),
        )
        for name in sorted(squares, key=groups.group_rank)
    )
