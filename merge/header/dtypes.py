"""The dtypes of a header: their sizes, their order in a file, and other names for them."""

from __future__ import annotations

from collections.abc import Sequence

from merge.errors import CheckpointError

# Names in the reference library's order, narrow to wide: files are laid out from the end of this
# list to its start. Bits per element.
DTYPE_BITS: dict[str, int] = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}
DTYPE_RANK = {name: rank for rank, name in enumerate(DTYPE_BITS)}

# The words of recipes, plans and reports for a header's dtype.
DTYPE_WORDS: dict[str, str] = {
    "BOOL": "bool",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
    "I8": "int8",
    "I16": "int16",
    "I32": "int32",
    "I64": "int64",
    "U8": "uint8",
    "U16": "uint16",
    "U32": "uint32",
    "U64": "uint64",
    "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
}
DTYPE_CODES: dict[str, str] = {word: code for code, word in DTYPE_WORDS.items()}


def element_count(shape: Sequence[int]) -> int:
    """Return the product of `shape`; 1 for `()`."""
    count = 1
    for dimension in shape:
        count *= dimension
    return count


def tensor_bytes(dtype: str, shape: Sequence[int]) -> int:
    """Return the bytes a tensor takes.

    Raises:
        CheckpointError: the elements do not fill whole bytes.
    """
    bits = element_count(shape) * DTYPE_BITS[dtype]
    if bits % 8:
        raise CheckpointError(f"shape {list(shape)} of {dtype} does not fill whole bytes")
    return bits // 8
