"""Merge arithmetic: pure functions on arrays that the caller owns.

Each function works by augmented assignment, so the same code runs on numpy arrays and on torch
tensors and allocates nothing. Arrays are float32. Every operation is separate and rounded once:
fused forms (`torch.add(alpha=)`, `addcmul`, compiled kernels) skip a rounding on some processors
and change bits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

# numpy.ndarray or torch.Tensor; neither is imported here, so that plans need no torch.
Array = Any


def add_difference(target: Array, distilled: Array, base: Array, weight: float) -> None:
    """Add the weighted delta of `distilled` over `base` to `target`, in place.

    Computes `target + (distilled - base) * weight` as three float32 operations.

    Args:
        target: Any shape; overwritten with the result.
        distilled: Same shape; overwritten with the weighted delta.
        base: Same shape; left as it is.
        weight: Dimensionless; must be exactly representable in float32, see `round_weight`.

    Source:
        Task arithmetic, Ilharco et al. 2022, arXiv:2212.04089 (task vector); "Add difference"
        A + M (B - C) in AUTOMATIC1111; InstructPix2Pix with distilled models, README of
        https://github.com/quickjkee/instruct-pix2pix-distill.
    """
    distilled -= base
    distilled *= weight
    target += distilled


@dataclass(frozen=True, slots=True)
class Method:
    """A way to merge.

    Attributes:
        name: As written in recipes.
        function: The arithmetic on one block of a tensor.
        params: Names that the recipe's `params` may hold.
        formula: One line for plans and cards.
    """

    name: str
    function: Callable[[Array, Array, Array, float], None]
    params: tuple[str, ...]
    formula: str


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method(
            "add_difference",
            add_difference,
            (),
            "target + weight * (distilled - base)",
        ),
    )
}
