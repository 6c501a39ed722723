"""DoRA: what an adapter that also states lengths adds to the weight that it was trained on."""

from __future__ import annotations

from merge.lora.forms.model import Array


def dora_delta_rows(base: Array, delta: Array, magnitude: Array) -> Array:
    """Return what DoRA adds to the weight that it was trained on.

    Each row of `base + delta` is given the length that `magnitude` states. This is not linear in
    the delta, so it holds for this base only. A row of zeros stays one.

    Args:
        base: `(rows, columns)` of the weight without the adapter, float64.
        delta: `(rows, columns)` of the adapter with its alpha, without the user's weight.
        magnitude: `(rows,)`.

    Returns:
        `(rows, columns)`: the difference between the adapted weight and `base`.

    Source: Liu et al. 2024, arXiv:2402.09353, equation 5.
    """
    adapted = base + delta
    length = (adapted * adapted).sum(1) ** 0.5
    factor = magnitude / (length + (length == 0))
    return adapted * factor.reshape(-1, 1) - base


def dora_delta_columns(base: Array, delta: Array, magnitude: Array) -> Array:
    """Return what DoRA adds where it has a length for each input, as LyCORIS trains it by default.

    The numbers that an input is multiplied by, in all rows and places of the kernel, are given the
    length that `magnitude` states. An input of zeros stays one.

    Args:
        base: `(out, in*kh*kw)` of the whole weight without the adapter, float64.
        delta: `(out, in*kh*kw)` of the adapter with its alpha, without the user's weight.
        magnitude: `(in,)`.

    Returns:
        `(out, in*kh*kw)`: the difference between the adapted weight and `base`.

    Source: `weight_decompose` in LyCORIS, `wd_on_out` False.
    """
    inputs = magnitude.shape[0]
    adapted = (base + delta).reshape(base.shape[0], inputs, -1)
    length = (adapted * adapted).sum(2).sum(0) ** 0.5
    factor = magnitude / (length + (length == 0))
    return (adapted * factor.reshape(1, -1, 1)).reshape(base.shape) - base
