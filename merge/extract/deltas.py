"""The weighted delta of one row of a plan at a time, in float32."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from merge.engine.buffers import make_buffers
from merge.engine.terms import TermAdder
from merge.plan.memory import CPU_BLOCK_ELEMENTS, CUDA_BLOCK_ELEMENTS, block_elements
from merge.plan.model import MergePlan, TensorPlan
from merge.reader.checkpoint import FileReader


class DeltaReader:
    """Reads deltas as a merge does, onto zeros instead of onto the target."""

    def __init__(
        self, plan: MergePlan, readers: Sequence[FileReader], device: torch.device
    ) -> None:
        is_cuda = device.type == "cuda"
        self._plain_block = CUDA_BLOCK_ELEMENTS if is_cuda else CPU_BLOCK_ELEMENTS
        tensors = [tensor for tensor in plan.tensors if tensor.is_merged]
        block = block_elements(tensors, self._plain_block)
        self._buffers = make_buffers(readers, device, block)
        self._adder = TermAdder(self._buffers, plan.method, plan.params)

    def read(self, tensor: TensorPlan) -> torch.Tensor:
        """Return the delta in the target's shape; zero where the terms do not reach."""
        shape = tensor.target.shape
        values = torch.zeros(shape, dtype=torch.float32, device=self._buffers.device)
        flat = values.view(-1)
        factors = self._adder.read_factors(tensor)
        step = self._plain_block
        if tensor.is_by_row:
            row = tensor.row_elements
            step = max(1, self._buffers.block // row) * row
        for start in range(0, len(flat), step):
            part = flat[start : start + step]
            self._adder.prepare(tensor, factors, start, len(part))
            self._adder.add(tensor, factors, part, start)
        return values
