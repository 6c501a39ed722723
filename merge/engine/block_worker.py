"""One worker: reads a block of every input, adds the terms, checks the range, writes.

On CUDA every worker has a stream of its own, so that workers overlap.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch

from merge.engine.buffers import TORCH_DTYPES, make_buffers
from merge.engine.device import device_stream
from merge.engine.fused import FusedAdder, LowRank, load_library
from merge.engine.terms import Factors, TermAdder
from merge.engine.units import TensorState, Unit, cut_units
from merge.errors import NonFiniteError
from merge.header.dtypes import DTYPE_BITS, DTYPE_WORDS
from merge.methods.table import METHODS
from merge.plan.memory import PRODUCT_ELEMENTS, block_elements
from merge.plan.model import ComponentPlan, MergePlan, TensorPlan, TensorRef
from merge.reader.checkpoint import FileReader
from merge.writer.tensors import TensorSink

# The smallest float32 magnitude that rounds to infinity: half a step above the largest value.
_OVERFLOW = {"F16": 65520.0, "BF16": 3.3961775292304957e38, "F32": math.inf}
_LARGEST = {code: torch.finfo(dtype).max for code, dtype in TORCH_DTYPES.items()}


class BlockWorker:
    """One worker of the merge of one component."""

    def __init__(
        self,
        plan: MergePlan,
        component: ComponentPlan,
        readers: Sequence[FileReader],
        writer: TensorSink,
        device: torch.device,
        plain_block: int,
        on_overflow: str,
        number: int = 0,
    ) -> None:
        """Allocate the worker's memory.

        Args:
            plan: What is merged.
            component: The file that is written.
            readers: Of the plan's files.
            writer: Of that file.
            device: Where it computes.
            plain_block: Elements of a block.
            on_overflow: The recipe's rule.
            number: Of this worker among those of the merge.
        """
        self._plan = plan
        self._component = component
        self._writer = writer
        self._plain_block = plain_block
        self._on_overflow = on_overflow
        self._starts = [spec.start for spec in component.out_header.tensors]
        block = block_elements(component.tensors, plain_block)
        self._buffers = make_buffers(readers, device, block)
        self._adder = TermAdder(self._buffers, plan.method, plan.params)
        is_cuda = device.type == "cuda"
        is_compiled = METHODS[plan.method].is_sum and not is_cuda
        library = load_library() if is_compiled else None
        self._fused = FusedAdder(library, self._buffers) if library is not None else None
        # The adapter of the tensor that was merged last, for the next unit of it.
        self._packed: tuple[int, LowRank] | None = None
        self._stream = device_stream(device, number) if is_cuda else None

    def run(self, unit: Unit, state: TensorState) -> None:
        """Compute and write one unit.

        Raises:
            NonFiniteError: an input or the result is not finite, or out_dtype cannot hold it.
        """
        tensor = self._component.tensors[unit.tensor]
        if self._packed is not None and self._packed[0] != unit.tensor:
            # Others use the same memory.
            self._packed = None
        with torch.inference_mode(), self._on_stream():
            if not tensor.is_merged:
                self._keep_unit(tensor, unit, state)
            elif self._fused is not None and self._fused.can_add(tensor):
                self._merge_fused(self._fused, tensor, unit, state)
            else:
                for start, values in self._merged(tensor, unit, state):
                    self._write(tensor, unit.tensor, values, start, state)

    def keep(self, index: int, state: TensorState) -> None:
        """Write a whole tensor as the target has it: its delta turned out to be zero.

        Adding zero is not the same: it turns -0.0 into 0.0.
        """
        tensor = self._component.tensors[index]
        whole = Unit(index, 0, tensor.target.element_count)
        with torch.inference_mode(), self._on_stream():
            self._keep_unit(tensor, whole, state)

    def has_delta(self, index: int) -> bool:
        """Return True when something is added to a tensor."""
        return self._component.tensors[index].is_merged

    def _on_stream(self) -> Any:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    # Units -----------------------------------------------------------------------------------

    def _merged(
        self, tensor: TensorPlan, unit: Unit, state: TensorState
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield first element and merged float32 values of each block of a unit."""
        baked = self._baked(tensor, state)
        factors = self._adder.read_factors(tensor)
        self._prefetch(tensor, unit)
        if tensor.is_whole and not METHODS[self._plan.method].is_sum:
            yield from self._merged_whole(tensor, factors, unit, state)
            return
        for start, count in self._blocks(tensor, factors, unit):
            values = self._summed(tensor, factors, start, count, state)
            if baked is not None:
                values += baked[start : start + count]
                state.changed = state.changed or bool(baked.any())
            yield start, values

    def _merge_fused(
        self, fused: FusedAdder, tensor: TensorPlan, unit: Unit, state: TensorState
    ) -> None:
        """Merge and write a unit in one pass a block; what is out of range goes the long way."""
        self._prefetch(tensor, unit)
        width = DTYPE_BITS[tensor.dtype_out] // 8
        factors: list[Factors] = []
        low_rank = self._packed[1] if self._packed is not None else None
        if low_rank is None:
            factors = self._adder.read_factors(tensor)
            low_rank = self._pack(fused, unit.tensor, factors)
        for start, count in self._blocks(tensor, factors, unit, makes_products=low_rank is None):
            if low_rank is not None:
                data, is_changed = fused.add_low_rank(tensor, start, count, low_rank)
            elif tensor.loras:
                product, factor = self._adder.product(tensor, start, count)
                data, is_changed = fused.add_product(tensor, start, product, factor)
            else:
                data, is_changed = fused.add_delta(tensor, start, count)
            if data is None:
                if low_rank is not None:
                    factors = factors or self._adder.read_factors(tensor)
                    self._adder.prepare(tensor, factors, start, count)
                values = self._summed(tensor, factors, start, count, state)
                self._write(tensor, unit.tensor, values, start, state)
                continue
            state.changed = state.changed or is_changed
            self._writer.write(data, self._starts[unit.tensor] + start * width)

    def _pack(self, fused: FusedAdder, index: int, factors: Sequence[Factors]) -> LowRank | None:
        """Lay out a tensor's adapter, if it has but one, of two matrices; keep it."""
        found = self._adder.low_rank(self._component.tensors[index], factors)
        if found is None:
            return None
        self._packed = index, fused.pack(found)
        return self._packed[1]

    def _summed(
        self,
        tensor: TensorPlan,
        factors: Sequence[Factors],
        start: int,
        count: int,
        state: TensorState,
    ) -> torch.Tensor:
        """Return a block of the target with all terms added, in float32."""
        values = self._buffers.read_float(tensor.target, start, count, 0)
        if self._adder.add(tensor, factors, values, start, is_changed=state.changed):
            state.changed = True
        return values

    def _blocks(
        self,
        tensor: TensorPlan,
        factors: Sequence[Factors],
        unit: Unit,
        *,
        makes_products: bool = True,
    ) -> Iterator[tuple[int, int]]:
        """Yield first element and length of each block of a unit, its adapters multiplied."""
        outer = step = self._plain_block
        if tensor.is_by_row:
            row = tensor.row_elements
            outer = step = max(1, self._plain_block // row) * row
            if tensor.loras and makes_products:
                # A product of many rows is faster than several of few; what follows is not.
                outer = max(step, PRODUCT_ELEMENTS // row * row)
            if tensor.is_whole:
                outer = unit.count
        end = unit.start + unit.count
        for begin in range(unit.start, end, outer):
            stop = min(begin + outer, end)
            if makes_products:
                self._adder.prepare(tensor, factors, begin, stop - begin)
            for start in range(begin, stop, step):
                yield start, min(step, stop - start)

    def _merged_whole(
        self, tensor: TensorPlan, factors: Sequence[Factors], unit: Unit, state: TensorState
    ) -> Iterator[tuple[int, torch.Tensor]]:
        values = self._buffers.read_grown(tensor.target, 0, unit.count, 0, torch.float32)
        if self._adder.add(tensor, factors, values, 0):
            state.changed = True
        for start in range(0, unit.count, self._plain_block):
            yield start, values[start : start + self._plain_block]

    def _baked(self, tensor: TensorPlan, state: TensorState) -> torch.Tensor | None:
        """Return the float32 values that guidance embeddings add to a bias."""
        if not tensor.bakes:
            return None
        linear = tensor.bakes[0].linear
        count = linear.target.element_count
        merged = torch.empty(count, dtype=torch.float64, device=self._buffers.device)
        whole = Unit(-1, 0, count)
        rounded_to = TORCH_DTYPES[linear.dtype_out]
        if linear.is_merged:
            for start, values in self._merged(linear, whole, TensorState(1)):
                # The network will run with the rounded weight.
                merged[start : start + len(values)] = values.to(rounded_to)
        else:
            for start in range(0, count, self._plain_block):
                part = min(self._plain_block, count - start)
                values = self._buffers.read_float(linear.target, start, part, 0)
                merged[start : start + part] = values.to(rounded_to)
        merged = merged.view(linear.target.shape)
        total = sum(self._adder.baked(term, merged) for term in tensor.bakes)
        assert isinstance(total, torch.Tensor)
        return total.to(torch.float32)

    def _keep_unit(self, tensor: TensorPlan, unit: Unit, state: TensorState) -> None:
        ref = tensor.target
        width = DTYPE_BITS[ref.dtype] // 8
        is_float = ref.dtype in TORCH_DTYPES
        step = self._plain_block if is_float else max(1, self._buffers.block * 4 // width)
        for start in range(unit.start, unit.start + unit.count, step):
            count = min(step, unit.start + unit.count - start)
            if is_float and (ref.dtype != tensor.dtype_out or ref.scale is not None):
                values = self._buffers.read_float(ref, start, count, 0)
                self._write(tensor, unit.tensor, values, start, state)
                continue
            if is_float:
                values, data = self._buffers.read_both(ref, start, count, 0)
                self._check_finite(tensor, values)
            else:
                data = self._buffers.read(ref, start, count)
            self._writer.write(data, self._starts[unit.tensor] + start * width)

    @staticmethod
    def _check_finite(tensor: TensorPlan, values: torch.Tensor) -> None:
        if not _bound_of_squares(values) < math.inf and not bool(torch.isfinite(values).all()):
            raise OutOfRangeError(tensor.key)

    def _prefetch(self, tensor: TensorPlan, unit: Unit) -> None:
        refs = [tensor.target]
        refs += [ref for term in tensor.deltas for ref in (term.distilled, term.base)]
        for ref in refs:
            self._buffers.will_need(ref, unit.start, unit.count)

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
        # NaN fails every comparison.
        if not _bound_of_squares(values) < limit * limit:
            self._resolve_overflow(tensor, values, start, state)
        data = self._buffers.round(values, code)
        self._writer.write(data, self._starts[index] + start * DTYPE_BITS[code] // 8)

    # Trouble ---------------------------------------------------------------------------------

    def diagnose(self, index: int) -> NonFiniteError:
        """Look at a whole tensor again and say what is wrong with it, with counts."""
        tensor = self._component.tensors[index]
        with torch.inference_mode(), self._on_stream():
            for ref in tensor.refs:
                if count := self._count_non_finite(ref):
                    file = self._plan.files[ref.file]
                    return NonFiniteError(
                        f"{tensor.key}: {count:,} of {ref.element_count:,} values are NaN or "
                        f"infinite in {file.role} ({file.name})",
                        hint="the file is damaged or its training diverged; use another one",
                    )
            hint = "set out_dtype=bfloat16 or float32, or on_overflow=clamp"
            if self._on_overflow != "error":
                hint = "sums of its terms are undefined in float32: use smaller weights"
            self._on_overflow = "count"
            state = TensorState(1)
            for unit in cut_units(self._component.tensors):
                if unit.tensor == index:
                    self.run(unit, state)
        word = DTYPE_WORDS[tensor.dtype_out]
        return NonFiniteError(
            f"{tensor.key}: {state.overflows:,} of {tensor.target.element_count:,} values are too "
            f"large for {word}",
            hint=hint,
        )

    def _count_non_finite(self, ref: TensorRef, first: int = 0, end: int | None = None) -> int:
        """Count NaN and infinity in elements of an input, in the memory of slot 1."""
        count = 0
        end = ref.element_count if end is None else end
        for start in range(first, end, self._plain_block):
            part = min(self._plain_block, end - start)
            values = self._buffers.read_float(ref, start, part, 1)
            count += part - int(torch.isfinite(values).sum())
        return count

    def _has_bad_input(self, tensor: TensorPlan, start: int, count: int) -> bool:
        """Return True when an input of a block is not finite."""
        block = [tensor.target]
        if tensor.delta_row_elements == tensor.row_elements:
            block += [ref for term in tensor.deltas for ref in (term.distilled, term.base)]
        # Others do not lie as the block does: a LoRA's factors, the first channels of filters.
        rest = [ref for ref in tensor.refs if ref not in block]
        return any(self._count_non_finite(ref, start, start + count) for ref in block) or any(
            self._count_non_finite(ref) for ref in rest
        )

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
        if self._on_overflow == "error" or values.isnan().any():
            raise OutOfRangeError(tensor.key)
        if not bool(finite.all()) and self._has_bad_input(tensor, start, len(values)):
            raise OutOfRangeError(tensor.key)
        largest = _LARGEST[tensor.dtype_out]
        if self._on_overflow == "clamp":
            values.clamp_(-largest, largest)
            return
        original = self._buffers.read_float(tensor.target, start, len(values), 1)
        values[too_large] = original[too_large]
        if bool((values.abs() >= _OVERFLOW[tensor.dtype_out]).any()):
            raise OutOfRangeError(tensor.key)


def _bound_of_squares(values: torch.Tensor) -> float:
    """Return a number that the square of no value exceeds; NaN where a value is NaN.

    On a CPU the sum of squares, the fastest pass over memory; it may overflow by itself. On CUDA
    the largest square: a dot product there is cuBLAS', which takes 32 MiB for each stream that it
    was ever called on.
    """
    if values.device.type != "cuda":
        return float(torch.dot(values, values))
    low, high = torch.aminmax(values)
    largest = float(torch.maximum(-low, high))
    return largest * largest


class OutOfRangeError(NonFiniteError):
    """A block is out of range; `BlockWorker.diagnose` finds out the rest."""
