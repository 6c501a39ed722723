"""The usual sums in one pass over memory, by a small library that the installation compiles.

Torch needs a pass for every operation: widen three inputs, subtract, scale, add, look at the range,
round. `fused.c` does the same to registers. Where it was not compiled, or the processor is not one
it knows, torch computes the same bits.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from pathlib import Path

import numpy as np
import torch

from merge.engine.buffers import Buffers
from merge.plan.model import TensorPlan

LIBRARY = Path(__file__).with_name("_fused.so")
_VERSION = 1
_CODES = {"F16": 0, "BF16": 1, "F32": 2}
_IS_CHANGED, _IS_OUT_OF_RANGE = 1, 2

_LOG = logging.getLogger(__name__)


@functools.cache
def load_library(path: Path = LIBRARY) -> ctypes.CDLL | None:
    """Return the library, or None where there is none that computes right on this machine."""
    array = (ctypes.c_void_p, ctypes.c_int)
    last = (ctypes.c_double, ctypes.c_int64)
    try:
        library = ctypes.CDLL(str(path))
        if library.fused_version() != _VERSION:
            return None
        library.fused_add_delta.argtypes = (*array * 4, ctypes.c_float, ctypes.c_int64)
        library.fused_add_product.argtypes = (*array * 2, ctypes.c_void_p, *last)
    except (OSError, AttributeError) as error:
        _LOG.debug("merging with torch alone: %s", error)
        return None
    if not _is_exact(library):
        _LOG.warning("%s rounds otherwise than it should: merging with torch alone", path)
        return None
    return library


def _is_exact(library: ctypes.CDLL) -> bool:
    """Compare with numpy where a fused multiply-add or another rounding would show."""
    rng = np.random.default_rng(0)
    # With subnormals, and a length that is not a multiple of a register's.
    target, distilled, base = (
        (rng.standard_normal(1003) * 2.0 ** rng.integers(-20, 3, 1003)).astype(np.float16)
        for _ in range(3)
    )
    weight = np.float32(0.3)
    out = np.empty_like(target)
    args = [value for array in (out, target, distilled, base) for value in (array.ctypes.data, 0)]
    library.fused_add_delta(*args, float(weight), out.size)
    delta = (distilled.astype(np.float32) - base.astype(np.float32)) * weight
    expected = (target.astype(np.float32) + delta).astype(np.float16)
    if not np.array_equal(out.view(np.uint16), expected.view(np.uint16)):
        return False
    product = delta.astype(np.float64) * np.pi
    library.fused_add_product(*args[:4], product.ctypes.data, 0.3, out.size)
    expected = (target.astype(np.float32) + (product * 0.3).astype(np.float32)).astype(np.float16)
    return np.array_equal(out.view(np.uint16), expected.view(np.uint16))


class FusedAdder:
    """Adds one delta, or a product of adapters, to blocks of a row in one worker's memory."""

    def __init__(self, library: ctypes.CDLL, buffers: Buffers) -> None:
        self._library = library
        self._buffers = buffers

    @staticmethod
    def can_add(tensor: TensorPlan) -> bool:
        """Return True for rows whose sum is one of the usual two: a delta, or adapters alone.

        The caller sees to it that the method is a plain sum.
        """
        is_one = bool(tensor.loras) if not tensor.deltas else len(tensor.deltas) == 1
        is_both = bool(tensor.loras and tensor.deltas)
        is_partial = tensor.delta_row_elements != tensor.row_elements
        return is_one and not (is_both or is_partial or tensor.is_whole or tensor.bakes)

    def add_delta(
        self, tensor: TensorPlan, start: int, count: int
    ) -> tuple[memoryview | None, bool]:
        """Add a row's only delta to a block of it.

        Args:
            tensor: The row.
            start: The block's first element.
            count: Its elements.

        Returns:
            The sum's bytes in dtype_out, which stay until anything is read, or None when an element
            is not finite there; and True when an element of the delta differs from zero.
        """
        (term,) = tensor.deltas
        args: list[int] = [self._buffers.staging_address, _CODES[tensor.dtype_out]]
        for slot, ref in enumerate((tensor.target, term.distilled, term.base)):
            args += [self._buffers.read_stored(ref, start, count, slot), _CODES[ref.dtype]]
        flags = self._library.fused_add_delta(*args, term.weight, count)
        return self._result(tensor, count, flags)

    def add_product(
        self, tensor: TensorPlan, start: int, product: torch.Tensor, factor: float
    ) -> tuple[memoryview | None, bool]:
        """Add a product of adapters to a block of a row; see `add_delta`.

        Args:
            tensor: The row.
            start: The block's first element.
            product: Its delta, float64, contiguous.
            factor: What the product is still to be multiplied by.
        """
        count = product.numel()
        address = self._buffers.read_stored(tensor.target, start, count, 0)
        flags = self._library.fused_add_product(
            self._buffers.staging_address,
            _CODES[tensor.dtype_out],
            address,
            _CODES[tensor.target.dtype],
            product.data_ptr(),
            factor,
            count,
        )
        return self._result(tensor, count, flags)

    def _result(self, tensor: TensorPlan, count: int, flags: int) -> tuple[memoryview | None, bool]:
        if flags & _IS_OUT_OF_RANGE:
            return None, False
        return self._buffers.staged(tensor.dtype_out, count), bool(flags & _IS_CHANGED)
