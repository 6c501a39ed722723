"""One worker's buffers and the arithmetic on one block.

A lane reads a block of every input into its host buffers, computes on its device and writes the
result. On the CPU host and device buffers are the same memory; on CUDA the host buffers are
pinned and every lane has a stream of its own, so that lanes overlap.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch

from merge.engine.units import TensorState, Unit, cut_units
from merge.errors import NonFiniteError
from merge.header import DTYPE_BITS, DTYPE_WORDS
from merge.methods import METHODS
from merge.plan.memory import block_elements
from merge.plan.model import DeltaTerm, LoraTerm, MergePlan, TensorPlan, TensorRef
from merge.reader import FileReader
from merge.writer import TensorFileWriter

TORCH_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
# The smallest float32 magnitude that rounds to infinity: half a step above the largest value.
_OVERFLOW = {"F16": 65520.0, "BF16": 3.3961775292304957e38, "F32": math.inf}
_LARGEST = {code: torch.finfo(dtype).max for code, dtype in TORCH_DTYPES.items()}


class Lane:
    """Buffers of one worker, allocated once."""

    def __init__(
        self,
        plan: MergePlan,
        readers: Sequence[FileReader],
        writer: TensorFileWriter,
        device: torch.device,
        plain_block: int,
        on_overflow: str,
    ) -> None:
        self._plan = plan
        self._readers = readers
        self._writer = writer
        self._device = device
        self._plain_block = plain_block
        self._on_overflow = on_overflow
        self._method = METHODS[plan.method].function
        self._starts = [spec.start for spec in plan.out_header.tensors]
        block = block_elements(plan.tensors, plain_block)
        self._block = block
        pinned = device.type == "cuda"
        # Four bytes an element hold every dtype that is computed with; wider ones are only copied.
        self._host = [
            torch.empty(block * 4, dtype=torch.uint8, pin_memory=pinned) for _ in range(4)
        ]
        self._bytes = [memoryview(buffer.numpy().data) for buffer in self._host]
        self._scratch = [torch.empty(block, device=device) for _ in range(3)]
        self._raw = (
            [torch.empty(block * 4, dtype=torch.uint8, device=device) for _ in range(4)]
            if pinned
            else self._host
        )
        self._wide: list[torch.Tensor] = []
        self._stream = torch.cuda.Stream(device) if pinned else None  # type: ignore[no-untyped-call]
        # Recorded after each transfer out of a host buffer, which may be refilled only then.
        self._sent: list[Any] = [
            torch.cuda.Event() if pinned else None  # type: ignore[no-untyped-call]
            for _ in self._host
        ]

    def run(self, unit: Unit, state: TensorState) -> None:
        """Compute and write one unit.

        Raises:
            NonFiniteError: an input or the result is not finite, or out_dtype cannot hold it.
        """
        tensor = self._plan.tensors[unit.tensor]
        with torch.inference_mode(), self._on_stream():
            if tensor.deltas or tensor.loras:
                self._merge_unit(tensor, unit, state)
            else:
                self._keep_unit(tensor, unit, state)

    def keep(self, index: int, state: TensorState) -> None:
        """Write a whole tensor as the target has it: its delta turned out to be zero.

        Adding zero is not the same: it turns -0.0 into 0.0.
        """
        tensor = self._plan.tensors[index]
        whole = Unit(index, 0, tensor.target.element_count)
        with torch.inference_mode(), self._on_stream():
            self._keep_unit(tensor, whole, state)

    def has_delta(self, index: int) -> bool:
        """Return True when something is added to a tensor."""
        tensor = self._plan.tensors[index]
        return bool(tensor.deltas or tensor.loras)

    def _on_stream(self) -> Any:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    # Units -----------------------------------------------------------------------------------

    def _merge_unit(self, tensor: TensorPlan, unit: Unit, state: TensorState) -> None:
        step = self._plain_block
        factors: list[tuple[torch.Tensor, torch.Tensor]] = []
        if tensor.is_by_row:
            row = tensor.row_elements
            step = max(1, self._block // row) * row
            factors = [
                self._read_factors(index, term, unit.start // row, unit.count // row)
                for index, term in enumerate(tensor.loras)
            ]
        self._prefetch(tensor, unit)
        for start in range(unit.start, unit.start + unit.count, step):
            count = min(step, unit.start + unit.count - start)
            values = self._read_float(tensor.target, start, count, 0)
            for term in tensor.deltas:
                self._add_delta(tensor, term, values, start, state)
            if tensor.loras:
                offset = (start - unit.start) // tensor.row_elements
                self._add_loras(tensor, factors, values, offset, state)
            self._write(tensor, unit.tensor, values, start, state)

    def _keep_unit(self, tensor: TensorPlan, unit: Unit, state: TensorState) -> None:
        ref = tensor.target
        width = DTYPE_BITS[ref.dtype] // 8
        is_float = ref.dtype in TORCH_DTYPES
        step = self._plain_block if is_float else max(1, self._block * 4 // width)
        for start in range(unit.start, unit.start + unit.count, step):
            count = min(step, unit.start + unit.count - start)
            if is_float:
                values = self._read_float(ref, start, count, 0)
                if ref.dtype != tensor.dtype_out:
                    self._write(tensor, unit.tensor, values, start, state)
                    continue
                # A sum of squares is finite only if every value is; it may overflow by itself.
                product = float(torch.dot(values, values))
                if not math.isfinite(product) and not bool(torch.isfinite(values).all()):
                    raise RangeError(tensor.key)
            else:
                self._read(ref, start, count, 0)
            size = count * width
            self._writer.write(self._bytes[0][:size], self._starts[unit.tensor] + start * width)

    # Terms -----------------------------------------------------------------------------------

    def _add_delta(
        self,
        tensor: TensorPlan,
        term: DeltaTerm,
        values: torch.Tensor,
        start: int,
        state: TensorState,
    ) -> None:
        row, covered = tensor.row_elements, tensor.delta_row_elements
        count = len(values)
        if covered != row:
            # Only the first input channels of each filter receive a delta.
            start, count = start // row * covered, count // row * covered
            values = values.view(-1, row)[:, :covered]
        distilled = self._read_float(term.distilled, start, count, 1)
        base = self._read_float(term.base, start, count, 2)
        if covered != row:
            distilled, base = distilled.view(-1, covered), base.view(-1, covered)
        self._method(values, distilled, base, term.weight)
        # The method leaves the weighted delta in `distilled`.
        if not state.changed and bool(distilled.any()):
            state.changed = True

    def _add_loras(
        self,
        tensor: TensorPlan,
        factors: Sequence[tuple[torch.Tensor, torch.Tensor]],
        values: torch.Tensor,
        offset: int,
        state: TensorState,
    ) -> None:
        rows = len(values) // tensor.row_elements
        covered = factors[0][1].shape[1]
        total = self._wide_buffer(0, rows * covered).view(rows, covered)
        for index, (term, (up, down)) in enumerate(zip(tensor.loras, factors, strict=True)):
            product = total
            if index:
                product = self._wide_buffer(1, rows * covered).view(rows, covered)
            torch.mm(up[offset : offset + rows], down, out=product)
            product *= term.scale
            if index:
                total += product
        delta = self._scratch[1][: rows * covered].view(rows, covered)
        delta.copy_(total)
        view = values.view(rows, -1)[:, :covered]
        view += delta
        if not state.changed and bool(delta.any()):
            state.changed = True

    def _read_factors(
        self, index: int, term: LoraTerm, row: int, rows: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return `(rows, rank)` and `(rank, in)` in float64."""
        columns = term.down.element_count // term.rank
        up = self._read_wide(term.up, row * term.rank, rows * term.rank, 2 + 2 * index)
        down = self._read_wide(term.down, 0, term.down.element_count, 3 + 2 * index)
        return up.view(rows, term.rank), down.view(term.rank, columns)

    # Transfers -------------------------------------------------------------------------------

    def _prefetch(self, tensor: TensorPlan, unit: Unit) -> None:
        refs = [tensor.target]
        refs += [ref for term in tensor.deltas for ref in (term.distilled, term.base)]
        for ref in refs:
            width = DTYPE_BITS[ref.dtype] // 8
            start = min(unit.start * width, ref.size_bytes)
            size = min(unit.count * width, ref.size_bytes - start)
            self._readers[ref.file].will_need(ref.start + start, size)

    def _read(self, ref: TensorRef, start: int, count: int, slot: int) -> int:
        width = DTYPE_BITS[ref.dtype] // 8
        size = count * width
        if self._sent[slot] is not None:
            self._sent[slot].synchronize()
        self._readers[ref.file].read_into(self._bytes[slot][:size], ref.start + start * width)
        return size

    def _read_float(self, ref: TensorRef, start: int, count: int, slot: int) -> torch.Tensor:
        """Return elements of an input as float32 on the device, in memory of this lane."""
        size = self._read(ref, start, count, slot)
        raw = self._raw[slot]
        if raw is not self._host[slot]:
            raw[:size].copy_(self._host[slot][:size], non_blocking=True)
            self._sent[slot].record()
        stored = raw[:size].view(TORCH_DTYPES[ref.dtype])
        if ref.dtype == "F32":
            return stored
        values = self._scratch[slot][:count]
        values.copy_(stored)
        return values

    def _read_wide(self, ref: TensorRef, start: int, count: int, slot: int) -> torch.Tensor:
        """Return elements of an input as float64 on the device."""
        wide = self._wide_buffer(slot, count)
        width = DTYPE_BITS[ref.dtype] // 8
        step = self._block * 4 // width
        for begin in range(0, count, step):
            part = min(step, count - begin)
            size = self._read(ref, start + begin, part, 1)
            stored = self._host[1][:size].view(TORCH_DTYPES[ref.dtype])
            # Blocking, since the next part reuses the host buffer.
            wide[begin : begin + part].copy_(stored)
        return wide

    def _wide_buffer(self, slot: int, count: int) -> torch.Tensor:
        """Return float64 memory that grows to the largest size asked for and stays."""
        while len(self._wide) <= slot:
            self._wide.append(torch.empty(0, dtype=torch.float64, device=self._device))
        if len(self._wide[slot]) < count:
            self._wide[slot] = torch.empty(count, dtype=torch.float64, device=self._device)
        return self._wide[slot][:count]

    def _write(
        self,
        tensor: TensorPlan,
        index: int,
        values: torch.Tensor,
        start: int,
        state: TensorState,
    ) -> None:
        """Round to out_dtype, check the range, write."""
        code = tensor.dtype_out
        limit = _OVERFLOW[code]
        # One product tells that no value is too large: a sum of squares bounds each of them, and
        # NaN fails every comparison.
        if not float(torch.dot(values, values)) < limit * limit:
            self._resolve_overflow(tensor, values, start, state)
        width = DTYPE_BITS[code] // 8
        size = len(values) * width
        if self._raw is self._host:
            rounded = self._host[3][:size].view(TORCH_DTYPES[code])
            rounded.copy_(values)
        else:
            rounded = self._raw[3][:size].view(TORCH_DTYPES[code])
            rounded.copy_(values)
            self._host[3][:size].copy_(self._raw[3][:size], non_blocking=True)
            assert self._stream is not None
            self._stream.synchronize()
        self._writer.write(self._bytes[3][:size], self._starts[index] + start * width)

    # Trouble ---------------------------------------------------------------------------------

    def diagnose(self, index: int) -> NonFiniteError:
        """Look at a whole tensor again and say what is wrong with it, with counts."""
        tensor = self._plan.tensors[index]
        refs = [("target", tensor.target)]
        refs += [(term.role, term.distilled) for term in tensor.deltas]
        refs += [("base", term.base) for term in tensor.deltas]
        refs += [(term.role, ref) for term in tensor.loras for ref in (term.down, term.up)]
        with torch.inference_mode(), self._on_stream():
            for role, ref in refs:
                if count := self._count_non_finite(ref):
                    name = self._plan.files[ref.file].name
                    return NonFiniteError(
                        f"{tensor.key}: {count:,} of {ref.element_count:,} values are NaN or "
                        f"infinite in {role} ({name})",
                        hint="the file is damaged or its training diverged; use another one",
                    )
            self._on_overflow = "count"
            state = TensorState(1)
            for unit in cut_units(self._plan.tensors):
                if unit.tensor == index:
                    self.run(unit, state)
        word = DTYPE_WORDS[tensor.dtype_out]
        return NonFiniteError(
            f"{tensor.key}: {state.overflows:,} of {tensor.target.element_count:,} values are too "
            f"large for {word}",
            hint="set out_dtype=bfloat16 or float32, or on_overflow=clamp",
        )

    def _count_non_finite(self, ref: TensorRef) -> int:
        count = 0
        for start in range(0, ref.element_count, self._plain_block):
            part = min(self._plain_block, ref.element_count - start)
            count += int((~torch.isfinite(self._read_float(ref, start, part, 0))).sum())
        return count

    def _resolve_overflow(
        self, tensor: TensorPlan, values: torch.Tensor, start: int, state: TensorState
    ) -> None:
        """Apply the recipe's rule to values that out_dtype cannot hold."""
        finite = torch.isfinite(values)
        too_large = ~finite | (values.abs() >= _OVERFLOW[tensor.dtype_out])
        count = int(too_large.sum())
        if not count:
            return
        state.overflows += count
        if self._on_overflow == "count":
            return
        if self._on_overflow == "error" or not bool(finite.all()):
            raise RangeError(tensor.key)
        largest = _LARGEST[tensor.dtype_out]
        if self._on_overflow == "clamp":
            values.clamp_(-largest, largest)
            return
        original = self._read_float(tensor.target, start, len(values), 1)
        values[too_large] = original[too_large]
        if bool((values.abs() >= _OVERFLOW[tensor.dtype_out]).any()):
            raise RangeError(tensor.key)


class RangeError(NonFiniteError):
    """A block is out of range; `Lane.diagnose` finds out the rest."""
