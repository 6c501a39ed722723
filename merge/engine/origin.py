"""Which of two models the target descends from, told from a sample of their weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch

from merge.engine.buffers import TORCH_DTYPES
from merge.plan.model import DeltaTerm, MergePlan, TensorPlan, TensorRef
from merge.reader import FileReader

# 64 pieces of 65,536 values: at most 48 MiB of three float32 models, and one piece at a time.
_TENSORS = 64
_VALUES = 65_536


@dataclass(frozen=True, slots=True)
class Origin:
    """How far the target is from base and from a distilled model, over a sample.

    Attributes:
        role: The distilled model.
        to_base: Norm of target minus base, over the norm of the target.
        to_distilled: Likewise.
        tensors: How many tensors the sample has pieces of.
    """

    role: str
    to_base: float
    to_distilled: float
    tensors: int

    @property
    def looks_swapped(self) -> bool:
        """Return True when the target is nearer to distilled."""
        return self.to_distilled < self.to_base


def measure_origins(plan: MergePlan) -> tuple[Origin, ...]:
    """Compare the target with both ends of every full delta.

    A distilled model is its base plus something, and a target that descends from the same base
    went another way: the squares of both ways add up to its distance from distilled. A target
    nearer to distilled than to base tells that the recipe has the two the wrong way round.

    It misleads where the target was itself made from the distilled model, where it comes from
    another base than the one that is named, and where it was trained towards the same thing as
    the distilled model. A LoRA has no base to swap with.

    The sample is chosen by the tensors' keys, read and summed in float64 on the CPU, so that it is
    the same everywhere.

    Args:
        plan: Of the merge; its files are there.

    Returns:
        One per distilled model, in recipe order; none where nothing can be compared.
    """
    found = []
    roles = {term.role: term.index for tensor in plan.tensors for term in tensor.deltas}
    with ExitStack() as stack:
        readers: dict[int, FileReader] = {}

        def read(ref: TensorRef) -> torch.Tensor:
            if ref.file not in readers:
                file = plan.files[ref.file]
                readers[ref.file] = stack.enter_context(FileReader(file.path, file.stamp))
            return _read(readers[ref.file], ref)

        for role in sorted(roles, key=lambda role: roles[role]):
            pairs = _sample(plan.tensors, role)
            size = to_base = to_distilled = 0.0
            for tensor, term in pairs:
                target = read(tensor.target)
                size += _squared_norm(target)
                to_base += _squared_norm(target - read(term.base))
                to_distilled += _squared_norm(target - read(term.distilled))
            if size > 0 and all(map(math.isfinite, (size, to_base, to_distilled))):
                base, distilled = (
                    round(math.sqrt(square / size), 6) for square in (to_base, to_distilled)
                )
                found.append(Origin(role, base, distilled, len(pairs)))
    return tuple(found)


def _sample(tensors: Sequence[TensorPlan], role: str) -> list[tuple[TensorPlan, DeltaTerm]]:
    """Return matrices and convolutions of one shape in all three, spread over the keys."""
    pairs = [
        (tensor, term)
        for tensor in sorted(tensors, key=lambda tensor: (tensor.component, tensor.key))
        for term in tensor.deltas
        if term.role == role
        and len(tensor.target.shape) > 1
        and tensor.target.shape == term.base.shape
        and all(ref.dtype in TORCH_DTYPES for ref in (tensor.target, term.base, term.distilled))
    ]
    count = min(_TENSORS, len(pairs))
    return [pairs[index * len(pairs) // count] for index in range(count)]


def _read(reader: FileReader, ref: TensorRef) -> torch.Tensor:
    """Return a tensor's first values in float64."""
    count = min(ref.element_count, _VALUES)
    buffer = bytearray(ref.size_bytes // max(ref.element_count, 1) * count)
    if not buffer:
        return torch.zeros(0, dtype=torch.float64)
    reader.read_into(memoryview(buffer), ref.start)
    return torch.frombuffer(buffer, dtype=TORCH_DTYPES[ref.dtype]).double()


def _squared_norm(values: torch.Tensor) -> float:
    return float(values.square().sum())
