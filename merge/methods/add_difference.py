"""Add the weighted difference of two models: the method that the tool is named for."""

from __future__ import annotations

from merge.methods.model import Array


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
    # A pass over memory less, with the same bits.
    if weight != 1.0:
        distilled *= weight
    target += distilled
