"""The bytes of a header to a table of tensors; everything ambiguous is refused by name."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from merge.errors import CheckpointError
from merge.header.dtypes import DTYPE_BITS, element_count, tensor_bytes
from merge.header.model import LENGTH_BYTES, Header, TensorSpec

# The reference library reads headers of up to 100 MB. Published models stay under a few hundred
# kilobytes, so a much smaller cap bounds what a lying length can make us allocate.
MAX_HEADER_BYTES = 32 * 1024 * 1024
MAX_NAME_BYTES = 1024
MAX_RANK = 16
MAX_DIMENSION = 2**48
MAX_ELEMENTS = 2**63
# Unicode's category Cc.
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")

# First bytes of files that people rename to .safetensors, and what to call them.
_SIGNATURES: tuple[tuple[bytes, str], ...] = (
    (b"version https://git-lfs", "a Git LFS pointer, not the model (run `git lfs pull`)"),
    (b"PK\x03\x04", "a zip archive, probably a PyTorch pickle"),
    (b"PK\x05\x06", "an empty zip archive"),
    (b"\x80\x02", "a Python pickle"),
    (b"\x80\x03", "a Python pickle"),
    (b"\x80\x04", "a Python pickle"),
    (b"\x80\x05", "a Python pickle"),
    (b"GGUF", "a GGUF file"),
    (b"<!doctype", "an HTML page, probably a failed download"),
    (b"<html", "an HTML page, probably a failed download"),
    (b'{"', "bare JSON without the length in front"),
    (b"\x89PNG", "a PNG picture"),
)


def sniff(head: bytes) -> str:
    """Name what a file really is from its first bytes; empty when nothing is recognised."""
    if head and not any(head):
        return "all zeros, probably an unfinished download"
    # Pages begin with blank lines at times, and write their tags in either case.
    page = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    for signature, what in _SIGNATURES:
        if head.startswith(signature) or (signature[:1] == b"<" and page.startswith(signature)):
            return what
    return ""


def parse_length(head: bytes, file_bytes: int) -> int:
    """Return the header's length from the first bytes of a file.

    Args:
        head: At least the first eight bytes; up to 64 help to say what a wrong file is.
        file_bytes: Size of the whole file.

    Raises:
        CheckpointError: the file is too short, or the length cannot be true.
    """
    if file_bytes < LENGTH_BYTES + 2 or len(head) < LENGTH_BYTES:
        what = sniff(head)
        detail = f": it is {what}" if what else ""
        raise CheckpointError(f"the file has only {file_bytes} bytes{detail}")
    length = int.from_bytes(head[:LENGTH_BYTES], "little")
    available = file_bytes - LENGTH_BYTES
    if 2 <= length <= min(available, MAX_HEADER_BYTES):
        return length
    if what := sniff(head):
        raise CheckpointError(f"this is no safetensors file: it is {what}")
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"the header claims {length:,} bytes, more than the {MAX_HEADER_BYTES:,} allowed"
        )
    if length > available:
        raise CheckpointError(
            f"the header claims {length:,} bytes and the file has {available:,} after its length: "
            "the file is truncated or no safetensors file"
        )
    raise CheckpointError(f"the header claims {length} bytes")


def parse_header(data: bytes, file_bytes: int) -> Header:
    """Parse and check the JSON part of a header.

    Args:
        data: The N bytes after the length.
        file_bytes: Size of the whole file, which the tensors must fill exactly.

    Raises:
        CheckpointError: a rule of the format is broken; the message names rule and tensor.
    """
    tree = _load_json(data)
    metadata = _parse_metadata(tree.pop("__metadata__", {}))
    data_start = LENGTH_BYTES + len(data)
    tensors = [_parse_entry(name, entry, data_start) for name, entry in tree.items()]
    tensors.sort(key=lambda spec: (spec.start, spec.start + spec.size_bytes))
    _check_contiguous(tensors, data_start, file_bytes)
    return Header(tuple(tensors), metadata, data_start, file_bytes)


def _load_json(data: bytes) -> dict[str, Any]:
    try:
        text = data.decode("utf-8", "strict")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"the header is not UTF-8 (byte {error.start})") from None
    if not text.startswith("{"):
        raise CheckpointError("the header does not begin with `{`")
    try:
        tree = json.loads(
            text,
            object_pairs_hook=_reject_duplicates,
            parse_float=_reject_number,
            parse_constant=_reject_number,
            parse_int=_bounded_int,
        )
    except RecursionError:
        raise CheckpointError("the header is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise CheckpointError(
            f"the header is no JSON: {error.msg} at character {error.pos}"
        ) from None
    if not isinstance(tree, dict):
        raise CheckpointError("the header is not a JSON object")
    return tree


def _reject_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    tree = dict(pairs)
    if len(tree) != len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise CheckpointError(f"the header has the key {name[:40]!r} twice")
            seen.add(name)
    return tree


def _reject_number(text: str) -> None:
    raise CheckpointError(f"the header has the number {text[:40]}, and only integers are allowed")


def _bounded_int(text: str) -> int:
    # int() refuses thousands of digits with a ValueError of its own; say what is wrong instead.
    if len(text) > 20 or text.startswith("-"):
        raise CheckpointError(f"the header has the number {text[:40]}, outside of 0 to 2^64")
    return int(text)


def _parse_metadata(value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
        raise CheckpointError("__metadata__ is not a map from strings to strings")
    try:
        "".join((*value, *value.values())).encode()
    except UnicodeEncodeError:
        raise CheckpointError("__metadata__ has a lone surrogate") from None
    return value


def _parse_entry(name: str, entry: Any, data_start: int) -> TensorSpec:
    check_name(name)
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{name}: an entry must have dtype, shape and data_offsets only")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise CheckpointError(f"{name}: unknown dtype {repr(dtype)[:40]}")
    if not _is_int_list(shape) or len(shape) > MAX_RANK:
        raise CheckpointError(f"{name}: shape must be at most {MAX_RANK} integers")
    if any(dimension >= MAX_DIMENSION for dimension in shape):
        raise CheckpointError(f"{name}: a dimension of {max(shape)} is impossible")
    # Other readers multiply from the left and overflow before they come to a zero.
    if element_count([size for size in shape if size]) >= MAX_ELEMENTS:
        raise CheckpointError(f"{name}: the elements of shape {shape} overflow")
    if not _is_int_list(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{name}: data_offsets must be a begin and an end")
    try:
        expected = tensor_bytes(dtype, shape)
    except CheckpointError as error:
        raise CheckpointError(f"{name}: {error.message}") from None
    begin, end = offsets
    if end - begin != expected:
        raise CheckpointError(
            f"{name}: {dtype} of shape {shape} takes {expected} bytes, data_offsets span "
            f"{end - begin}"
        )
    return TensorSpec(name, dtype, tuple(shape), data_start + begin, expected)


def check_name(name: str) -> None:
    """Refuse a tensor's name that other tools could not read, show or unpack.

    Raises:
        CheckpointError: it is empty, too long, or has characters that no key has.
    """
    try:
        size = len(name.encode())
    except UnicodeEncodeError:
        raise CheckpointError(f"tensor name {name[:40]!r} has a lone surrogate") from None
    if not 0 < size <= MAX_NAME_BYTES:
        raise CheckpointError(f"tensor name {name[:40]!r} has {size} bytes")
    if _CONTROL.search(name):
        raise CheckpointError(f"tensor name {name!r} has a control character")
    # No path is ever made from a name here, but other tools unpack files by their keys.
    if ".." in name.replace("\\", "/").split("/"):
        raise CheckpointError(f"tensor name {name!r} climbs out of its folder")


def _is_int_list(value: Any) -> bool:
    # bool is a subclass of int, and JSON's true is no dimension.
    return isinstance(value, list) and all(type(item) is int for item in value)


def _check_contiguous(tensors: Sequence[TensorSpec], data_start: int, file_bytes: int) -> None:
    position = data_start
    for spec in tensors:
        if spec.start < position:
            raise CheckpointError(f"{spec.name}: its data overlaps the tensor before it")
        if spec.start > position:
            raise CheckpointError(f"{spec.name}: {spec.start - position} unused bytes before it")
        position = spec.start + spec.size_bytes
    if position > file_bytes:
        raise CheckpointError(
            f"the file is truncated: {file_bytes:,} bytes of {position:,} "
            f"(the last tensor is {tensors[-1].name})"
        )
    if position < file_bytes:
        raise CheckpointError(f"{file_bytes - position} bytes follow the last tensor")
