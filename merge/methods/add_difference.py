"""Add the weighted difference of two models: the method that the tool is named for."""

from __future__ import annotations

from merge.methods.model import Array, Arrays, Weights


def add_difference(target: Array, deltas: Arrays, weights: Weights) -> None:
    """Add weighted deltas of distilled models over their base to `target`, in place.

    Computes `target + (distilled - base) * weight` for each, the product and the sum as float32
    operations of their own.

    Args:
        target: Any shape, float32; overwritten with the result.
        deltas: `distilled - base`, same shape each; overwritten with the weighted deltas.
        weights: Dimensionless, one a delta, each exactly representable in float32.

    Source:
        Task arithmetic, Ilharco et al. 2022, arXiv:2212.04089 (task vector); "Add difference"
        A + M (B - C) in AUTOMATIC1111; InstructPix2Pix with distilled models, README of
        https://github.com/quickjkee/instruct-pix2pix-distill.
    """
    for delta, weight in zip(deltas, weights, strict=True):
        # A pass over memory less, with the same bits.
        if weight != 1.0:
            delta *= weight
        target += delta
