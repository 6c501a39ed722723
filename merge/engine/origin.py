"""Which of two models the target descends from, told from a sample of their weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch

from merge.engine.buffers import TORCH_DTYPES, Buffers
from merge.engine.device import single_threaded
from merge.plan.model import DeltaTerm, MergePlan, TensorPlan
from merge.reader.checkpoint import FileReader

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
        position: Of the target on the way from base to distilled, 0 at base and 1 at distilled,
            whatever it has besides.
        tensors: How many tensors the sample has pieces of.
    """

    role: str
    to_base: float
    to_distilled: float
    position: float
    tensors: int

    @property
    def looks_swapped(self) -> bool:
        """Return True when the target is nearer to distilled, and not far beyond it too."""
        return 0.5 < self.position < 1.5


def measure_origins(plan: MergePlan) -> tuple[Origin, ...]:
    """Compare the target with both ends of every full delta.

    A distilled model is its base plus something, and a target that descends from the same base
    went another way: its position is near 0, and near 1 where the recipe has the two the wrong
    way round. Half way both are as far from it. The demo's is at 0.34 and a larger model's at 0.20,
    since target and distilled of both were trained on the same pictures. Past 1.5 it lies beyond
    distilled, which no descent from either explains.

    It misleads where the target was itself made from the distilled model, where it comes from
    another base than the one that is named, and where it was trained towards the same thing as
    the distilled model. A LoRA has no base to swap with.

    The sample is chosen by the tensors' keys, read and summed in float64 on the CPU, so that it is
    the same everywhere.

    Args:
        plan: Of the merge; its files are there.

    Returns:
        One per distilled model, in recipe order; none where nothing can be compared.

    Raises:
        IntegrityError: an input changed since it was planned.
    """
    found = []
    roles = {term.role: term.index for tensor in plan.tensors for term in tensor.deltas}
    with ExitStack() as stack:
        stack.enter_context(single_threaded())
        readers = [stack.enter_context(FileReader(f.path, f.stamp)) for f in plan.files]
        buffers = Buffers(readers, torch.device("cpu"), _VALUES)
        for role in sorted(roles, key=lambda role: roles[role]):
            pairs = _sample(plan.tensors, role)
            sums = torch.zeros(4, dtype=torch.float64)
            for tensor, term in pairs:
                refs = (tensor.target, term.base, term.distilled)
                count = min(tensor.target.element_count, _VALUES)
                sums += _products(*(buffers.read_float(ref, 0, count, 0).double() for ref in refs))
            size, moved, distance, along = sums.tolist()
            if size > 0 and distance > 0 and math.isfinite(sum((size, moved, distance, along))):
                # The cosine rule: no second pass for the distance to distilled.
                other = max(moved + distance - 2 * along, 0.0)
                shares = (math.sqrt(moved / size), math.sqrt(other / size), along / distance)
                base, distilled, position = (round(share, 6) for share in shares)
                found.append(Origin(role, base, distilled, position, len(pairs)))
        for reader, file in zip(readers, plan.files, strict=True):
            reader.check_unchanged(file.stamp)
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


def _products(target: torch.Tensor, base: torch.Tensor, distilled: torch.Tensor) -> torch.Tensor:
    """Return the squares of target, its move and the delta, and the product of the last two."""
    move, delta = target - base, distilled - base
    return torch.stack([target @ target, move @ move, delta @ delta, move @ delta])
