"""What is moved: an output tensor, and the bytes of input files that make it up."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from merge.header.dtypes import DTYPE_BITS, element_count, tensor_bytes
from merge.reader.byte_reader import FileStamp
from merge.reader.checkpoint import Checkpoint


@dataclass(frozen=True, slots=True)
class Scale:
    """How stored numbers become values: each is multiplied by one number, or by its row's.

    Attributes:
        dtype: Of the stored numbers, a header code.
        row_elements: Elements of a row.
        numbers: Where the factors are: one, or one for each row of the piece.
        numbers_dtype: Theirs.
    """

    dtype: str
    row_elements: int
    numbers: TensorPiece
    numbers_dtype: str


@dataclass(frozen=True, slots=True)
class TensorPiece:
    """A range of an input file.

    Attributes:
        path: The file.
        stamp: What it was when the copy was planned.
        start: First byte.
        size_bytes: Length.
        scale: None for values that are copied as they are; with one they become float32.
    """

    path: Path
    stamp: FileStamp
    start: int
    size_bytes: int
    scale: Scale | None = None

    @property
    def out_bytes(self) -> int:
        """Return the length of what is written."""
        if self.scale is None:
            return self.size_bytes
        return self.size_bytes * 8 // DTYPE_BITS[self.scale.dtype] * 4

    @property
    def inputs(self) -> tuple[TensorPiece, ...]:
        """Return every range that is read."""
        return (self,) if self.scale is None else (self, self.scale.numbers)


@dataclass(frozen=True, slots=True)
class TensorCopy:
    """A tensor of the new file.

    Attributes:
        name: Its key there.
        dtype: Header code, the same as in the inputs; F32 for what has a scale there.
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
        found = sum(piece.out_bytes for piece in self.pieces)
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
    row_bytes = tensor_bytes(spec.dtype, spec.shape[1:])
    start, size = spec.start, spec.size_bytes
    if rows is not None:
        start, size = spec.start + first_row * row_bytes, rows * row_bytes
    scale = _scale_of(checkpoint, key, first_row, rows)
    return TensorPiece(file.path, file.stamp, start, size, scale)


def _scale_of(checkpoint: Checkpoint, key: str, first_row: int, rows: int | None) -> Scale | None:
    if key not in checkpoint.scales:
        return None
    spec = checkpoint.tensors[key][1]
    index, numbers = checkpoint.scales[key]
    file = checkpoint.files[index]
    start, size = numbers.start, numbers.size_bytes
    if rows is not None and numbers.element_count > 1:
        width = DTYPE_BITS[numbers.dtype] // 8
        start, size = start + first_row * width, rows * width
    where = TensorPiece(file.path, file.stamp, start, size)
    return Scale(spec.dtype, element_count(spec.shape[1:]), where, numbers.dtype)


def dtype_of(checkpoint: Checkpoint, key: str) -> str:
    """Return the dtype that a tensor has once it is copied: scaled values become float32."""
    return "F32" if key in checkpoint.scales else checkpoint.tensors[key][1].dtype


def copies_of(checkpoint: Checkpoint) -> list[TensorCopy]:
    """Return all tensors of a checkpoint as they are, under their own keys."""
    return [
        TensorCopy(name, dtype_of(checkpoint, name), spec.shape, (piece_of(checkpoint, name),))
        for name, (_, spec) in sorted(checkpoint.tensors.items())
    ]
