"""Write copies as one safetensors file: constant memory, hashed beside the copy."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from merge.background.file_digest import FileDigest
from merge.errors import CheckpointError
from merge.header.dtypes import DTYPE_BITS
from merge.header.encode import encode_header
from merge.header.model import Header
from merge.reader.checkpoint import FileReader
from merge.writer.copies.model import Scale, TensorCopy, TensorPiece
from merge.writer.copies.scaled import scale_values, to_float32
from merge.writer.tensors import TensorFileWriter

# Small enough to stay in a core's cache between the read and the write.
CHUNK_BYTES = 1024 * 1024


class StoppedError(Exception):
    """The copy was told to stop; the file is not finished."""


def plan_header(copies: Sequence[TensorCopy], metadata: Mapping[str, str]) -> tuple[bytes, Header]:
    """Return the first bytes of the file that these copies make, and their parsed form.

    Raises:
        CheckpointError: two copies have the same name.
    """
    specs: dict[str, tuple[str, Sequence[int]]] = {}
    for copy in copies:
        if copy.name in specs:
            raise CheckpointError(f"{copy.name}: two tensors would get this name")
        specs[copy.name] = (copy.dtype, copy.shape)
    return encode_header(specs, metadata)


def write_tensor_copies(
    path: Path,
    copies: Sequence[TensorCopy],
    metadata: Mapping[str, str],
    *,
    on_bytes: Callable[[int], None] | None = None,
    stop: threading.Event | None = None,
) -> tuple[int, str]:
    """Write a safetensors file of tensors that lie in other files.

    The data is written first and the header last, so that an unfinished file never opens.

    Args:
        path: The new file; must not exist.
        copies: In any order; the file has the reference library's.
        metadata: Strings of its header.
        on_bytes: Told the size of each chunk that was written.
        stop: When set, the copy is given up.

    Returns:
        Size in bytes and SHA-256 of the file.

    Raises:
        CheckpointError: two copies have the same name.
        IntegrityError: an input changed since it was planned, or while it was read.
        OutputError: the file cannot be written.
        StoppedError: `stop` was set.
    """
    head, header = plan_header(copies, metadata)
    by_name = {copy.name: copy for copy in copies}
    with ExitStack() as stack:
        readers: dict[Path, FileReader] = {}
        inputs = (part for copy in copies for piece in copy.pieces for part in piece.inputs)
        stamps = {part.path: part.stamp for part in inputs}
        for source, stamp in stamps.items():
            readers[source] = stack.enter_context(FileReader(source, stamp))
        writer = stack.enter_context(TensorFileWriter(path, header.file_bytes))
        digest = FileDigest(writer.read_into, head, header.file_bytes)
        stack.callback(digest.stop)
        digest.start()
        buffer = memoryview(bytearray(CHUNK_BYTES))
        for spec in header.tensors:
            offset = spec.start
            for chunk in _chunks(by_name[spec.name], readers, buffer):
                if stop is not None and stop.is_set():
                    raise StoppedError
                writer.write(chunk, offset)
                offset += len(chunk)
                digest.advance(offset)
                if on_bytes is not None:
                    on_bytes(len(chunk))
        for source, reader in readers.items():
            reader.check_unchanged(stamps[source])
        sha256 = digest.result()
        writer.finish(head)
    return header.file_bytes, sha256


def _chunks(
    copy: TensorCopy, readers: Mapping[Path, FileReader], buffer: memoryview
) -> Iterator[memoryview]:
    """Return the bytes of a new tensor in order, each part before the buffer is filled again."""
    if copy.transposed:
        yield _transposed(copy, readers)
        return
    for piece in copy.pieces:
        scales = _read_scales(piece, readers)
        begin = 0
        for chunk in readers[piece.path].parts(piece.start, piece.size_bytes, buffer):
            yield chunk if piece.scale is None else _scaled(chunk, piece.scale, scales, begin)
            begin += len(chunk)


def _read_scales(piece: TensorPiece, readers: Mapping[Path, FileReader]) -> Any:
    """Return the factors of a piece as float32; None where there are none."""
    if piece.scale is None:
        return None
    numbers = piece.scale.numbers
    data = readers[numbers.path].read(numbers.start, numbers.size_bytes)
    return to_float32(memoryview(data), piece.scale.numbers_dtype)


def _scaled(data: memoryview, scale: Scale, scales: Any, begin: int) -> memoryview:
    """Return stored numbers from byte `begin` of a piece on as values in float32."""
    values = to_float32(data, scale.dtype)
    scale_values(values, scales, begin * 8 // DTYPE_BITS[scale.dtype], scale.row_elements)
    return memoryview(values.data).cast("B")


def _transposed(copy: TensorCopy, readers: Mapping[Path, FileReader]) -> memoryview:
    """Return a matrix read whole and turned; the largest is a text projection of 7 MB."""
    # Here, since planning needs this package and not numpy, which takes 0.1 s to import.
    import numpy as np

    (piece,) = copy.pieces
    rows, columns = copy.shape
    data = memoryview(bytearray(piece.size_bytes))
    readers[piece.path].read_into(data, piece.start)
    if piece.scale is not None:
        data = _scaled(data, piece.scale, _read_scales(piece, readers), 0)
    width = DTYPE_BITS[copy.dtype] // 8
    matrix = np.frombuffer(data, dtype=f"u{width}").reshape(columns, rows)
    return memoryview(matrix.T.tobytes())
