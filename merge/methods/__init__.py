"""Merge arithmetic: pure functions on arrays that the caller owns.

Each function works by augmented assignment, so the same code runs on numpy arrays and on torch
tensors and allocates nothing. Arrays are float32. Every operation is separate and rounded once:
fused forms (`torch.add(alpha=)`, `addcmul`, compiled kernels) skip a rounding on some processors
and change bits.
"""

from merge.methods.add_difference import add_difference
from merge.methods.model import Array, Method

__all__ = ["METHODS", "Array", "Method", "add_difference"]

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
