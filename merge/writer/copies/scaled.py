"""Scaled values in float32: the stored number times its scale, rounded once.

Source: OCP 8-bit Floating Point Specification 1.0 for E4M3 and E5M2; Noune et al. 2022,
arXiv:2206.02915, for the FNUZ kinds.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from merge.reader.kinds.quantized import FLOAT8

if TYPE_CHECKING:
    import numpy as np

# Bits of the fraction, exponent bias; the FNUZ kinds have no infinity and no negative zero.
_FORMATS = {
    "F8_E4M3": (3, 7),
    "F8_E5M2": (2, 15),
    "F8_E4M3FNUZ": (3, 8),
    "F8_E5M2FNUZ": (2, 16),
}


def to_float32(data: memoryview, dtype: str) -> np.ndarray[Any, Any]:
    """Widen stored values exactly.

    Args:
        data: Whole elements.
        dtype: Header code: float8, F16, BF16 or F32.
    """
    import numpy as np

    if dtype in FLOAT8:
        return _table(dtype)[np.frombuffer(data, np.uint8)]
    if dtype == "BF16":
        return (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
    return np.frombuffer(data, {"F16": "<f2", "F32": "<f4"}[dtype]).astype(np.float32)


def scale_values(
    values: np.ndarray[Any, Any], scales: np.ndarray[Any, Any], first: int, row_elements: int
) -> None:
    """Multiply a range of a tensor by its scales, in place.

    Args:
        values: float32.
        scales: float32, one or one for each row of the tensor.
        first: Index of the first value in the tensor.
        row_elements: Elements of a row.
    """
    import numpy as np

    if scales.size == 1:
        values *= scales[0]
    else:
        values *= scales[(first + np.arange(values.size)) // row_elements]


@functools.cache
def _table(dtype: str) -> np.ndarray[Any, Any]:
    """Return the value of each of the 256 codes of a float8 kind."""
    import numpy as np

    return np.array([_value(code, dtype) for code in range(256)], np.float32)


def _value(code: int, dtype: str) -> float:
    fraction_bits, bias = _FORMATS[dtype]
    is_unsigned_zero = dtype.endswith("FNUZ")
    if is_unsigned_zero and code == 0x80:
        return float("nan")
    sign = -1.0 if code & 0x80 else 1.0
    exponent, fraction = (code & 0x7F) >> fraction_bits, code & ((1 << fraction_bits) - 1)
    if dtype == "F8_E4M3" and code & 0x7F == 0x7F:
        return float("nan")
    if dtype == "F8_E5M2" and exponent == 31:
        return float("nan") if fraction else sign * float("inf")
    if exponent == 0:
        return sign * fraction * 2.0 ** (1 - bias - fraction_bits)
    return sign * (1 + fraction / (1 << fraction_bits)) * 2.0 ** (exponent - bias)
