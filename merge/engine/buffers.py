"""One worker's memory, allocated once, and the ways of bytes into it.

On the CPU host and device buffers are the same memory; on CUDA the host buffers are pinned, and a
host buffer is refilled only after its last transfer is done. Where the system refuses pinned
memory, plain memory is taken: CUDA then copies once more on the way, and the bytes are the same.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from typing import Any

import torch

from merge.header import DTYPE_BITS
from merge.plan.model import TensorRef
from merge.reader import FileReader

TORCH_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
_SLOTS = 4
_SCRATCH = 3

_LOG = logging.getLogger(__name__)


class Buffers:
    """Host and device memory of one worker.

    Attributes:
        block: Elements that a slot holds at most; four bytes each.
        device: Where it computes.
    """

    def __init__(self, readers: Sequence[FileReader], device: torch.device, block: int) -> None:
        self.block = block
        self.device = device
        self._readers = readers
        pinned = device.type == "cuda"
        # Four bytes an element hold every dtype that is computed with; wider ones are only copied.
        self.host = [_host_memory(block * 4, is_pinned=pinned) for _ in range(_SLOTS)]
        self.host_bytes = [memoryview(buffer.numpy().data) for buffer in self.host]
        self.raw = (
            [torch.empty(block * 4, dtype=torch.uint8, device=device) for _ in range(_SLOTS)]
            if pinned
            else self.host
        )
        self._scratch = [torch.empty(block, device=device) for _ in range(_SCRATCH)]
        self._grown: dict[tuple[torch.dtype, int], torch.Tensor] = {}
        self._sent: list[Any] = [
            torch.cuda.Event() if pinned else None  # type: ignore[no-untyped-call]
            for _ in self.host
        ]

    @property
    def is_staged(self) -> bool:
        """Return True when the device has memory of its own."""
        return self.raw is not self.host

    def scratch(self, slot: int, count: int) -> torch.Tensor:
        """Return float32 memory of a slot."""
        return self._scratch[slot][:count]

    def grown(self, dtype: torch.dtype, slot: int, count: int) -> torch.Tensor:
        """Return memory that grows to the largest size asked for and stays."""
        memory = self._grown.get((dtype, slot))
        if memory is None or len(memory) < count:
            memory = torch.empty(count, dtype=dtype, device=self.device)
            self._grown[dtype, slot] = memory
        return memory[:count]

    def will_need(self, ref: TensorRef, start: int, count: int) -> None:
        """Tell the system which elements of an input are read next."""
        width = DTYPE_BITS[ref.dtype] // 8
        begin = min(start * width, ref.size_bytes)
        size = min(count * width, ref.size_bytes - begin)
        self._readers[ref.file].will_need(ref.start + begin, size)

    def read(self, ref: TensorRef, start: int, count: int, slot: int) -> int:
        """Fill a host slot with elements of an input; return their bytes."""
        width = DTYPE_BITS[ref.dtype] // 8
        size = count * width
        if self._sent[slot] is not None:
            self._sent[slot].synchronize()
        self._readers[ref.file].read_into(self.host_bytes[slot][:size], ref.start + start * width)
        return size

    def read_float(self, ref: TensorRef, start: int, count: int, slot: int) -> torch.Tensor:
        """Return elements of an input as float32 on the device, in memory of this slot."""
        size = self.read(ref, start, count, slot)
        raw = self.raw[slot]
        if self.is_staged:
            raw[:size].copy_(self.host[slot][:size], non_blocking=True)
            self._sent[slot].record()
        stored = raw[:size].view(TORCH_DTYPES[ref.dtype])
        if ref.dtype == "F32":
            return stored
        values = self.scratch(slot, count)
        values.copy_(stored)
        return values

    def read_grown(
        self, ref: TensorRef, start: int, count: int, slot: int, dtype: torch.dtype
    ) -> torch.Tensor:
        """Return any number of elements of an input in growing memory of a dtype."""
        values = self.grown(dtype, slot, count)
        step = self.block * 4 // (DTYPE_BITS[ref.dtype] // 8)
        for begin in range(0, count, step):
            part = min(step, count - begin)
            size = self.read(ref, start + begin, part, 1)
            stored = self.host[1][:size].view(TORCH_DTYPES[ref.dtype])
            # Blocking, since the next part reuses the host slot.
            values[begin : begin + part].copy_(stored)
        return values


def _host_memory(size_bytes: int, *, is_pinned: bool) -> torch.Tensor:
    if is_pinned:
        try:
            return torch.empty(size_bytes, dtype=torch.uint8, pin_memory=True)
        except RuntimeError as error:
            _say_unpinned(str(error).splitlines()[0])
    return torch.empty(size_bytes, dtype=torch.uint8)


@functools.cache
def _say_unpinned(reason: str) -> None:
    """Say it once, and not for every buffer."""
    _LOG.warning("no pinned memory for transfers, which makes them slower: %s", reason)
