"""The usual sums in one pass over memory, by a small library that the installation compiles.

Torch needs a pass for every operation: widen three inputs, subtract, scale, add, look at the range,
round. `fused.c` does the same to registers, and multiplies a LoRA's factors into them, so that its
float64 product never goes to memory. Where it was not compiled, or the processor is not one it
knows, torch computes the same bits. It knows x86-64 with AVX2, FMA and F16C, which it asks the
processor for, and AArch64 (Apple silicon, Graviton), all of which have what it needs.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from merge.engine.buffers import TORCH_DTYPES, Buffers
from merge.engine.order_free import Factored
from merge.plan.memory import panel_elements
from merge.plan.model import TensorPlan

LIBRARY = Path(__file__).with_name("_fused.so")
_VERSION = 2
_CODES = {"F16": 0, "BF16": 1, "F32": 2}
_IS_CHANGED, _IS_OUT_OF_RANGE = 1, 2
# Slot of growing memory; other modules have those from -1 on.
_PANELS = -2

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
        pair = (ctypes.c_void_p, ctypes.c_void_p)
        library.fused_pack_panels.argtypes = (*pair, *(ctypes.c_int64,) * 2)
        library.fused_pack_panels.restype = None
        sizes = (ctypes.c_int64,) * 3
        library.fused_add_low_rank.argtypes = (*array * 2, *pair, ctypes.c_double, *sizes)
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
    wide = [rng.standard_normal(1003) * 2.0 ** rng.integers(-20, 3, 1003) for _ in range(3)]
    weight = np.float32(0.3)
    tensors, floats, args = [], [], []
    for code in ("F32", "BF16", "F16"):
        tensors = [torch.from_numpy(values).to(TORCH_DTYPES[code]) for values in wide]
        floats = [tensor.float().numpy() for tensor in tensors]
        out = torch.empty_like(tensors[0])
        args = [n for tensor in (out, *tensors) for n in (tensor.data_ptr(), _CODES[code])]
        library.fused_add_delta(*args, float(weight), len(out))
        expected = floats[0] + (floats[1] - floats[2]) * weight
        if not _same_bits(out, torch.from_numpy(expected).to(out.dtype)):
            return False
    # From here on as float16, the last of them.
    product = wide[1] * np.pi
    library.fused_add_product(*args[:4], product.ctypes.data, 0.3, len(out))
    expected = floats[0] + (product * 0.3).astype(np.float32)
    if not _same_bits(out, torch.from_numpy(expected).half()):
        return False
    # Whole numbers, so that no order of the sum matters, of a size that leaves rests of a tile.
    up = rng.integers(-9, 10, (17, 5)).astype(np.float64)
    down = rng.integers(-9, 10, (5, 59)).astype(np.float64)
    panels = np.empty((8, 5, 8))
    library.fused_pack_panels(panels.ctypes.data, down.ctypes.data, 5, 59)
    library.fused_add_low_rank(*args[:4], up.ctypes.data, panels.ctypes.data, 0.3, 5, 17, 59)
    expected = floats[0] + ((up @ down) * 0.3).astype(np.float32).reshape(-1)
    return _same_bits(out, torch.from_numpy(expected).half())


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one.view(torch.uint8), other.view(torch.uint8))


@dataclass(frozen=True)
class LowRank:
    """A lone LoRA's factors, packed for one unit.

    Attributes:
        up: `(rows, rank)` in float64, contiguous.
        panels: `down` in panels of eight columns.
        factor: What the product is still to be multiplied by.
    """

    up: torch.Tensor
    panels: torch.Tensor
    factor: float


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
        stored = [tensor.target]
        stored += [ref for term in tensor.deltas for ref in (term.distilled, term.base)]
        is_plain = all(ref.dtype in _CODES and ref.scale is None for ref in stored)
        is_special = is_both or is_partial or tensor.is_whole or bool(tensor.bakes)
        return is_one and is_plain and not is_special

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

    def pack(self, product: Factored) -> LowRank:
        """Lay out the factors of a LoRA for `add_low_rank`; they stay until the next call."""
        up, down, factor = product.up, product.down, product.scale
        rank, columns = down.shape
        count = panel_elements(rank, columns)
        panels = self._buffers.grown(torch.float64, _PANELS, count)
        self._library.fused_pack_panels(panels.data_ptr(), down.data_ptr(), rank, columns)
        return LowRank(up, panels, factor)

    def add_low_rank(
        self, tensor: TensorPlan, start: int, count: int, low_rank: LowRank
    ) -> tuple[memoryview | None, bool]:
        """Add a LoRA to a block of whole rows of a row; see `add_delta`."""
        rank, columns = low_rank.up.shape[1], tensor.row_elements
        address = self._buffers.read_stored(tensor.target, start, count, 0)
        flags = self._library.fused_add_low_rank(
            self._buffers.staging_address,
            _CODES[tensor.dtype_out],
            address,
            _CODES[tensor.target.dtype],
            low_rank.up.data_ptr() + start // columns * rank * low_rank.up.element_size(),
            low_rank.panels.data_ptr(),
            low_rank.factor,
            rank,
            count // columns,
            columns,
        )
        return self._result(tensor, count, flags)

    def _result(self, tensor: TensorPlan, count: int, flags: int) -> tuple[memoryview | None, bool]:
        if flags & _IS_OUT_OF_RANGE:
            return None, False
        return self._buffers.staged(tensor.dtype_out, count), bool(flags & _IS_CHANGED)
