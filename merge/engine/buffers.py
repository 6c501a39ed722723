"""One worker's memory, allocated once, and the ways of bytes into it and out of it.

Where the system refuses pinned memory, plain memory is taken: CUDA then copies once more on the
way, and the bytes are the same.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from typing import Any

import torch

from merge.header.dtypes import DTYPE_BITS
from merge.plan.model import TensorRef
from merge.reader.checkpoint import FileReader

TORCH_DTYPES = {
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}
_SCRATCH = 3
# Of a device with memory of its own: one for each input, one for the output.
_SLOTS = 4
_OUTPUT = 3

_LOG = logging.getLogger(__name__)


class Buffers:
    """Memory of one worker on the CPU.

    One staging buffer takes the bytes of every input in turn, and those of the output: it stays in
    the core's own cache, where a buffer for each would push the others out (a third of the time of
    a merge).

    Attributes:
        block: Elements that a slot holds at most; four bytes each.
        device: Where it computes.
        staging_address: Of the staging buffer.
    """

    def __init__(self, readers: Sequence[FileReader], device: torch.device, block: int) -> None:
        self.block = block
        self.device = device
        self._readers = readers
        # Four bytes an element hold every dtype that is computed with; wider ones are only copied.
        self._staging = torch.empty(block * 4, dtype=torch.uint8)
        self._staging_bytes = memoryview(self._staging.numpy().data)
        self.staging_address = self._staging.data_ptr()
        self._scratch = [torch.empty(block, device=device) for _ in range(_SCRATCH)]
        self._scratch_bytes: dict[int, memoryview] = {}
        self._grown: dict[tuple[torch.dtype, int], torch.Tensor] = {}
        self._scale: tuple[TensorRef, torch.Tensor] | None = None
        # Making a view takes as long as adding some thousand elements.
        self._views: dict[tuple[int | str, int], torch.Tensor] = {}

    def scratch(self, slot: int, count: int) -> torch.Tensor:
        """Return float32 memory of a slot."""
        view = self._views.get((slot, count))
        if view is None:
            view = self._views[slot, count] = self._scratch[slot][:count]
        return view

    def _stored(self, dtype: str, count: int) -> torch.Tensor:
        """Return elements of the staging buffer, as a header's dtype."""
        view = self._views.get((dtype, count))
        if view is None:
            size = count * DTYPE_BITS[dtype] // 8
            view = self._staging[:size].view(TORCH_DTYPES[dtype])
            self._views[dtype, count] = view
        return view

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

    def read(self, ref: TensorRef, start: int, count: int) -> memoryview:
        """Return the bytes of elements of an input; they stay until anything else is read."""
        width = DTYPE_BITS[ref.dtype] // 8
        data = self._staging_bytes[: count * width]
        self._readers[ref.file].read_into(data, ref.start + start * width)
        return data

    def read_stored(self, ref: TensorRef, start: int, count: int, slot: int) -> int:
        """Read elements of an input as they are stored into a slot's memory; return its address.

        On the CPU alone.
        """
        values = self._scratch[slot]
        bytes_ = self._scratch_bytes.get(slot)
        if bytes_ is None:
            bytes_ = self._scratch_bytes[slot] = _bytes_of(values)
        width = DTYPE_BITS[ref.dtype] // 8
        self._readers[ref.file].read_into(bytes_[: count * width], ref.start + start * width)
        return values.data_ptr()

    def staged(self, dtype: str, count: int) -> memoryview:
        """Return the bytes of elements in the staging buffer; they stay until anything is read."""
        return self._staging_bytes[: count * DTYPE_BITS[dtype] // 8]

    def read_float(self, ref: TensorRef, start: int, count: int, slot: int) -> torch.Tensor:
        """Return elements of an input as float32 on the device, in memory of this slot."""
        return self.read_both(ref, start, count, slot)[0]

    def read_both(
        self, ref: TensorRef, start: int, count: int, slot: int
    ) -> tuple[torch.Tensor, memoryview]:
        """Return elements as `read_float` does, and the bytes that they are stored as."""
        values = self.scratch(slot, count)
        if ref.dtype == "F32":
            data = _bytes_of(values)
            self._readers[ref.file].read_into(data, ref.start + start * 4)
        else:
            data = self.read(ref, start, count)
            values.copy_(self._stored(ref.dtype, count))
        if ref.scale is not None:
            self._multiply(values, ref, start)
        return values, data

    def read_grown(
        self, ref: TensorRef, start: int, count: int, slot: int, dtype: torch.dtype
    ) -> torch.Tensor:
        """Return any number of elements of an input in growing memory of a dtype."""
        values = self.grown(dtype, slot, count)
        step = self.block * 4 // (DTYPE_BITS[ref.dtype] // 8)
        for begin in range(0, count, step):
            part = min(step, count - begin)
            self.read(ref, start + begin, part)
            # Blocking, since the next part reuses the memory.
            stored = self._stored(ref.dtype, part)
            if ref.scale is not None:
                stored = stored.to(self.device, torch.float32, copy=True)
                self._multiply(stored, ref, start + begin)
            values[begin : begin + part].copy_(stored)
        return values

    def _multiply(self, values: torch.Tensor, ref: TensorRef, start: int) -> None:
        """Multiply elements of an input by its scale, in place.

        Args:
            values: float32, from element `start` on.
            ref: The input.
            start: Index of the first element.
        """
        assert ref.scale is not None
        scales = self._read_scale(ref.scale)
        if len(scales) == 1:
            values *= scales
            return
        row, end = ref.row_elements, start + len(values)
        # Whole rows at once, and the parts of rows at both ends.
        first = min(-(-start // row) * row, end)
        last = max(end // row * row, first)
        for begin, stop in ((start, first), (first, last), (last, end)):
            if begin < stop:
                part = values[begin - start : stop - start].view(-1, min(row, stop - begin))
                part *= scales[begin // row : -(-stop // row)].view(-1, 1)

    def _read_scale(self, scale: TensorRef) -> torch.Tensor:
        """Return a scale as float32; that of a tensor whose blocks are read stays."""
        if self._scale is None or self._scale[0] != scale:
            data = self._readers[scale.file].read(scale.start, scale.size_bytes)
            stored = torch.frombuffer(bytearray(data), dtype=TORCH_DTYPES[scale.dtype])
            self._scale = scale, stored.to(self.device, torch.float32)
        return self._scale[1]

    def round(self, values: torch.Tensor, dtype: str) -> memoryview:
        """Return float32 values as bytes of a dtype; they stay until anything is read."""
        if dtype == "F32":
            return _bytes_of(values)
        count = values.numel()
        self._stored(dtype, count).copy_(values)
        return self.staged(dtype, count)


class StagedBuffers(Buffers):
    """Memory of one worker on a device that has memory of its own.

    Transfers run while the host goes on, so each slot has a host buffer of its own, which is
    refilled only after its last transfer is done.
    """

    def __init__(self, readers: Sequence[FileReader], device: torch.device, block: int) -> None:
        super().__init__(readers, device, block)
        size = block * 4
        self._host = [_host_memory(size, is_pinned=True) for _ in range(_SLOTS)]
        self._host_bytes = [memoryview(buffer.numpy().data) for buffer in self._host]
        self._raw = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(_SLOTS)]
        self._sent: list[Any] = [
            torch.cuda.Event()  # type: ignore[no-untyped-call]
            for _ in self._host
        ]

    def read_both(
        self, ref: TensorRef, start: int, count: int, slot: int
    ) -> tuple[torch.Tensor, memoryview]:
        """Return elements as `read_float` does, and the bytes that they are stored as."""
        width = DTYPE_BITS[ref.dtype] // 8
        size = count * width
        self._sent[slot].synchronize()
        data = self._host_bytes[slot][:size]
        self._readers[ref.file].read_into(data, ref.start + start * width)
        raw = self._raw[slot][:size]
        raw.copy_(self._host[slot][:size], non_blocking=True)
        self._sent[slot].record()
        values = stored = raw.view(TORCH_DTYPES[ref.dtype])
        if ref.dtype != "F32":
            values = self.scratch(slot, count)
            values.copy_(stored)
        if ref.scale is not None:
            self._multiply(values, ref, start)
        return values, data

    def round(self, values: torch.Tensor, dtype: str) -> memoryview:
        """Return float32 values as bytes of a dtype; they stay until the next call."""
        size = values.numel() * DTYPE_BITS[dtype] // 8
        raw = self._raw[_OUTPUT][:size]
        raw.view(TORCH_DTYPES[dtype]).copy_(values)
        self._host[_OUTPUT][:size].copy_(raw, non_blocking=True)
        self._wait()
        return self._host_bytes[_OUTPUT][:size]

    def _wait(self) -> None:
        torch.cuda.current_stream(self.device).synchronize()


def make_buffers(readers: Sequence[FileReader], device: torch.device, block: int) -> Buffers:
    """Return a worker's memory for a device."""
    kind = StagedBuffers if device.type == "cuda" else Buffers
    return kind(readers, device, block)


def _bytes_of(values: torch.Tensor) -> memoryview:
    return memoryview(values.numpy().data).cast("B")


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
