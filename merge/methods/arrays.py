"""What numpy and torch spell differently, and sums whose order no library decides."""

from __future__ import annotations

import importlib
import math
import struct
from collections.abc import Iterator, Sequence
from typing import Any

from merge.methods.model import Array

# Elements of one piece: bounds the temporaries of methods that see whole tensors.
PIECE_ELEMENTS = 256 * 1024


def library(array: Array) -> Any:
    """Return the module, numpy or torch, that an array belongs to."""
    return importlib.import_module(type(array).__module__.partition(".")[0])


def round_float32(value: float) -> float:
    """Round once to float32; what does not fit becomes infinite."""
    try:
        return float(struct.unpack("<f", struct.pack("<f", value))[0])
    except OverflowError:
        return math.copysign(math.inf, value)


def pieces(*arrays: Array) -> Iterator[tuple[Array, ...]]:
    """Yield the same rows of arrays of one shape, in order, as views.

    Args:
        *arrays: Any shape; one without dimensions is a piece of its own.
    """
    shape = arrays[0].shape
    if not shape:
        yield arrays
        return
    row = math.prod(shape[1:])
    step = max(1, PIECE_ELEMENTS // max(1, row))
    for begin in range(0, shape[0], step):
        yield tuple(array[begin : begin + step] for array in arrays)


def weighted_sum(deltas: Sequence[Array], weights: Sequence[float]) -> Array:
    """Return the sum of weighted deltas, in the first one's memory.

    Every product and every sum is a float32 operation of its own, in the order given.
    """
    total = deltas[0]
    total *= weights[0]
    for delta, weight in zip(deltas[1:], weights[1:], strict=True):
        delta *= weight
        total += delta
    return total


def dot(left: Array, right: Array) -> float:
    """Return the inner product in float64, added in one fixed order.

    The libraries' own reductions depend on vector width, threads and device. Here each piece is
    folded in halves, and the pieces' sums are added in order. Products of float32 numbers are
    exact in float64.

    Args:
        left: Any shape, float32.
        right: Same shape.
    """
    xp = library(left)
    total = 0.0
    for a, b in pieces(left.reshape(-1), right.reshape(-1)):
        products = xp.asarray(a, dtype=xp.float64) * xp.asarray(b, dtype=xp.float64)
        count = len(products)
        while count > 1:
            half = (count + 1) // 2
            products[: count - half] += products[half:count]
            count = half
        total += float(products[0])
    return total


def norm(array: Array) -> float:
    """Return the Euclidean norm, see `dot`."""
    return math.sqrt(dot(array, array))


def kth_smallest(values: Array, place: int) -> float:
    """Return an exact order statistic.

    Args:
        values: `(elements,)`, float32; its memory is reordered.
        place: 0 for the smallest.
    """
    if getattr(values, "is_cuda", False):
        return float(values.kthvalue(place + 1).values)
    # In place in the same memory; torch's own sort would add 12 bytes an element.
    plain = values.numpy() if hasattr(values, "numpy") else values
    plain.partition(place)
    return float(plain[place])
