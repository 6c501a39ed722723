"""From a PyTorch checkpoint to the table of tensors that a safetensors header would give."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from merge.errors import CheckpointError, list_first
from merge.header.dtypes import DTYPE_BITS, element_count
from merge.header.model import TensorSpec
from merge.header.parse import MAX_DIMENSION, MAX_ELEMENTS, MAX_RANK, check_name
from merge.reader.byte_reader import ByteReader
from merge.reader.pickles.archive import Record, check_crc32, read_archive
from merge.reader.pickles.machine import MAX_PICKLE_BYTES, Unpickled, unpickle
from merge.reader.pickles.values import (
    DTYPES,
    STORAGE_DTYPES,
    Global,
    Opaque,
    Pairs,
    Storage,
    Tensor,
    describe,
    shown,
)

_STATE_DICT = "state_dict"
_SHOWN_NAMES = 8
_SAVE_HINT = (
    "load it with torch.load(..., weights_only=True) where it can do no harm, and save "
    "{key: value.contiguous()} with safetensors.torch.save_file"
)


@dataclass(frozen=True, slots=True)
class PickleTable:
    """The tensors of a checkpoint, and what else is in it.

    Attributes:
        tensors: In file order; `start` counts from the start of the file.
        left_out: What is no tensor of the state dict, each with the reason.
    """

    tensors: tuple[TensorSpec, ...]
    left_out: tuple[tuple[str, str], ...]


def read_table(source: ByteReader, file_bytes: int) -> PickleTable:
    """List the tensors of a file that `torch.save` wrote, running nothing of it.

    Only the archive's headers and its pickle are read. The state dict is the outermost dictionary
    or, as in checkpoints of a training, what that has under `state_dict`.

    Args:
        source: The file.
        file_bytes: Its size.

    Raises:
        CheckpointError: the archive or the pickle breaks a rule, or a tensor is not dense, in row
            order and inside of its record; the message names it.
    """
    records = read_archive(source, file_bytes)
    pickle = records["data.pkl"]
    if pickle.size_bytes > MAX_PICKLE_BYTES:
        raise CheckpointError(
            f"data.pkl has {pickle.size_bytes:,} bytes, more than the {MAX_PICKLE_BYTES:,} allowed"
        )
    check_crc32(source, pickle)
    content = unpickle(source.read(pickle.start, pickle.size_bytes))
    state, left_out = _choose_state_dict(content.value)
    specs: dict[str, TensorSpec] = {}
    for key, value in state.items:
        if not isinstance(key, str):
            raise CheckpointError(f"its state dict has {describe(key)} as a key, not a text")
        if isinstance(value, Tensor):
            check_name(key)
            if key in specs:
                raise CheckpointError(f"{key} is there twice")
            specs[key] = _place(key, value, records)
        elif isinstance(value, Opaque | Global):
            raise CheckpointError(
                f"{shown(key)} is {describe(value)}: only dense tensors can be read",
                hint=_SAVE_HINT,
            )
        else:
            left_out.append((shown(key), f"{describe(value)}, no tensor"))
    if not specs:
        raise _no_tensors(content.value)
    left_out += _unused(content, records)
    tensors = tuple(sorted(specs.values(), key=lambda spec: (spec.start, spec.name)))
    return PickleTable(tensors, tuple(left_out))


def _choose_state_dict(value: Any) -> tuple[Pairs, list[tuple[str, str]]]:
    """Return the dictionary of tensors, and what lies beside it."""
    if not isinstance(value, Pairs):
        raise CheckpointError(
            f"it holds {describe(value)}, not a state dict",
            hint="save model.state_dict(), not the model",
        )
    found = [inner for key, inner in value.items if isinstance(key, str) and key == _STATE_DICT]
    if not found:
        return value, []
    if len(found) > 1 or not isinstance(found[0], Pairs):
        raise CheckpointError("its state_dict is not one dictionary of tensors")
    left_out = [
        (_key_name(key), f"{describe(inner)}, outside of state_dict")
        for key, inner in value.items
        if inner is not found[0]
    ]
    return found[0], left_out


def _key_name(key: Any) -> str:
    return shown(key) if isinstance(key, str) else describe(key)


def _place(key: str, tensor: Tensor, records: Mapping[str, Record]) -> TensorSpec:
    """Return where a tensor's bytes are, or raise with the reason why it has no such place."""
    storage, offset, shape, stride = tensor.storage, tensor.offset, tensor.shape, tensor.stride
    if not isinstance(storage, Storage) or type(offset) is not int:
        raise CheckpointError(f"{key}: its parts are not those of a tensor")
    if not (_is_size(shape) and _is_size(stride) and len(shape) == len(stride) <= MAX_RANK):
        raise CheckpointError(f"{key}: its shape or strides are no tuples of integers")
    if not isinstance(tensor.hooks, Pairs) or tensor.hooks.items:
        raise CheckpointError(f"{key}: it has hooks, which are code", hint=_SAVE_HINT)
    if not isinstance(tensor.metadata, Pairs) or tensor.metadata.items:
        raise CheckpointError(f"{key}: it is negated or conjugated", hint=_SAVE_HINT)
    dtype, record = _dtype(key, tensor), records.get(f"data/{storage.key}")
    width = DTYPE_BITS[dtype] // 8
    count = element_count(shape)
    if max(shape, default=0) >= MAX_DIMENSION or count >= MAX_ELEMENTS:
        raise CheckpointError(f"{key}: shape {_numbers(shape)} is impossible")
    if not _is_row_major(shape, stride):
        what = "repeats elements" if 0 in stride else "is not in row order"
        raise CheckpointError(
            f"{key}: it {what} (shape {_numbers(shape)}, strides {_numbers(stride)})",
            hint=_SAVE_HINT,
        )
    if record is None:
        raise CheckpointError(f"{key}: its record data/{shown(storage.key)} is missing")
    stated = storage.element_count * (width if tensor.dtype is None else 1)
    if record.size_bytes != stated:
        raise CheckpointError(
            f"{key}: record {record.name} has {record.size_bytes:,} bytes, and {stated:,} "
            "are stated"
        )
    if count == 0:
        # Of a tensor without elements torch writes any offset.
        return TensorSpec(key, dtype, tuple(shape), record.start, 0)
    if offset < 0 or (offset + count) * width > stated:
        raise CheckpointError(f"{key}: it lies outside of its record {record.name}")
    return TensorSpec(key, dtype, tuple(shape), record.start + offset * width, count * width)


def _dtype(key: str, tensor: Tensor) -> str:
    """Return the header code of a tensor's dtype."""
    kind: Global = tensor.storage.kind
    if tensor.dtype is None and kind.module == "torch":
        code = STORAGE_DTYPES.get(kind.attribute)
    elif (kind.module, kind.attribute) == ("torch.storage", "UntypedStorage"):
        kind = tensor.dtype if isinstance(tensor.dtype, Global) else kind
        code = DTYPES.get(kind.attribute) if kind.module == "torch" else None
    else:
        code = None
    if code is None:
        raise CheckpointError(f"{key}: {kind.name} cannot be read", hint=_SAVE_HINT)
    return code


def _is_size(value: Any) -> bool:
    # bool is a subclass of int.
    return isinstance(value, tuple) and all(type(item) is int and item >= 0 for item in value)


def _is_row_major(shape: Sequence[int], stride: Sequence[int]) -> bool:
    """Return True when elements follow each other in row order without a gap."""
    if 0 in shape:
        return True
    expected = 1
    for size, step in zip(reversed(shape), reversed(stride), strict=True):
        # The stride of a dimension of one element is never used, and torch writes any.
        if size != 1 and step != expected:
            return False
        expected *= size
    return True


def _unused(content: Unpickled, records: Mapping[str, Record]) -> list[tuple[str, str]]:
    """List what no tensor tells of: classes that are named, records that nothing refers to."""
    unused = []
    if content.unknown:
        names = list_first(content.unknown, _SHOWN_NAMES)
        unused.append(("data.pkl", f"names {names} (not imported)"))
    unused += [
        (shown(name), "a record that nothing refers to")
        for name in records
        if name.startswith("data/") and name.removeprefix("data/") not in content.storage_keys
    ]
    return unused


def _no_tensors(value: Pairs) -> CheckpointError:
    names = [shown(key) for key, inner in value.items if isinstance(key, str)]
    listed = ", ".join(names[:_SHOWN_NAMES]) + (" ..." if len(names) > _SHOWN_NAMES else "")
    return CheckpointError(
        "it has no tensors, neither in its outermost dictionary nor under state_dict"
        + (f" (there is {listed})" if listed else ""),
        hint="save the state dict alone as .safetensors",
    )


def _numbers(values: Sequence[int]) -> str:
    # str() of an integer of thousands of digits is an error of its own.
    return str([value if value < 2**64 else "huge" for value in values])
