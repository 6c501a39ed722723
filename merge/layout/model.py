"""What is moved: an output tensor, and the bytes of input files that make it up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from merge.header import tensor_bytes
from merge.reader import Checkpoint, FileStamp


@dataclass(frozen=True, slots=True)
class TensorPiece:
    """A range of an input file.

    Attributes:
        path: The file.
        stamp: What it was when the copy was planned.
        start: First byte.
        size_bytes: Length.
    """

    path: Path
    stamp: FileStamp
    start: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class TensorCopy:
    """A tensor of the new file.

    Attributes:
        name: Its key there.
        dtype: Header code, the same as in the inputs.
        shape: Its dimensions there; the elements' order is the pieces' one after the other, so that
            a linear layer may become a 1x1 convolution.
        pieces: Whole tensors, or rows of them.
        transposed: True when the one piece holds `(columns, rows)` and `(rows, columns)` is wanted.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    pieces: tuple[TensorPiece, ...]
    transposed: bool = False

    def __post_init__(self) -> None:
        found = sum(piece.size_bytes for piece in self.pieces)
        if found != tensor_bytes(self.dtype, self.shape):
            raise ValueError(f"{self.name}: its pieces have {found} bytes, not those of its shape")
        if self.transposed and (len(self.shape) != 2 or len(self.pieces) != 1):
            raise ValueError(f"{self.name}: only a matrix in one piece can be transposed")


def piece_of(
    checkpoint: Checkpoint, key: str, first_row: int = 0, rows: int | None = None
) -> TensorPiece:
    """Return where a tensor of a checkpoint, or some rows of it, is.

    Args:
        checkpoint: Read headers.
        key: One of its keys.
        first_row: Of the first dimension.
        rows: None for all.
    """
    index, spec = checkpoint.tensors[key]
    file = checkpoint.files[index]
    if rows is None:
        return TensorPiece(file.path, file.stamp, spec.start, spec.size_bytes)
    row_bytes = tensor_bytes(spec.dtype, spec.shape[1:])
    return TensorPiece(file.path, file.stamp, spec.start + first_row * row_bytes, rows * row_bytes)


def copies_of(checkpoint: Checkpoint, keys: Sequence[str] | None = None) -> list[TensorCopy]:
    """Return tensors of a checkpoint as they are, under their own keys; None for all."""
    names = sorted(checkpoint.tensors) if keys is None else keys
    found = []
    for name in names:
        spec = checkpoint.tensors[name][1]
        found.append(TensorCopy(name, spec.dtype, spec.shape, (piece_of(checkpoint, name),)))
    return found
