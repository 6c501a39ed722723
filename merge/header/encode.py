"""A table of tensors to the bytes of a header, as the reference library writes them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from merge.header.dtypes import DTYPE_RANK, tensor_bytes
from merge.header.model import ALIGNMENT_BYTES, LENGTH_BYTES, Header, TensorSpec


def file_order(tensors: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Sort `(name, dtype)` pairs as the reference library lays files out.

    Wide dtypes come first, so that every tensor is aligned to its element size; names break ties
    in the byte order of their UTF-8 form.
    """
    return sorted(tensors, key=lambda item: (-DTYPE_RANK[item[1]], item[0].encode()))


def encode_header(
    tensors: Mapping[str, tuple[str, Sequence[int]]], metadata: Mapping[str, str]
) -> tuple[bytes, Header]:
    """Lay a file out and return its first bytes.

    Args:
        tensors: Name to `(dtype code, shape)`, in any order.
        metadata: Strings for `__metadata__`; written sorted by key, left out when empty.

    Returns:
        The length and the padded JSON, and the parsed form of the same header.
    """
    tree: dict[str, Any] = {}
    if metadata:
        tree["__metadata__"] = dict(sorted(metadata.items()))
    order = file_order((name, dtype) for name, (dtype, _) in tensors.items())
    offset = 0
    layout: list[tuple[str, str, tuple[int, ...], int, int]] = []
    for name, dtype in order:
        shape = tuple(tensors[name][1])
        size = tensor_bytes(dtype, shape)
        tree[name] = {
            "dtype": dtype,
            "shape": list(shape),
            "data_offsets": [offset, offset + size],
        }
        layout.append((name, dtype, shape, offset, size))
        offset += size
    text = json.dumps(tree, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-(LENGTH_BYTES + len(text)) % ALIGNMENT_BYTES)
    start = LENGTH_BYTES + len(text)
    specs = tuple(
        TensorSpec(name, dtype, shape, start + begin, size)
        for name, dtype, shape, begin, size in layout
    )
    header = Header(specs, dict(sorted(metadata.items())), start, start + offset)
    return len(text).to_bytes(LENGTH_BYTES, "little") + text, header
