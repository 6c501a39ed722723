"""LoRA: `up @ down`, with `down` `(r, in[, kh, kw])` and `up` `(out, r[, 1, 1])`.

Source: Hu et al. 2021, arXiv:2106.09685; for convolutions the kohya convention.
"""

from __future__ import annotations

from merge.header.dtypes import element_count
from merge.lora.forms.model import Array, Factors, Form, Product, Shape, Shapes, matrix


def check_ends(factors: Shapes, inner: int) -> bool:
    """Return True where `up` and `down` are matrices around that many ranks.

    Raises:
        ValueError: they have rank 0.
    """
    down, up = factors["down"], factors["up"]
    if 0 in (*down[:1], *up[1:2]):
        raise ValueError("it is empty: its factors have rank 0")
    return len(down) >= 2 and len(up) >= 2 and 0 < inner == up[1] and is_flat(up)


def is_flat(shape: Shape) -> bool:
    """Return True for a matrix, perhaps with trailing dimensions of 1."""
    return element_count(shape[2:]) == 1


def _product(factors: Shapes) -> Product:
    down, up = factors["down"], factors["up"]
    if not check_ends(factors, down[0] if down else 0):
        raise ValueError(f"factors {list(up)} and {list(down)} do not multiply")
    return Product("lora", down[0], (up[0], *down[1:]))


def _rows(factors: Factors, start: int, stop: int) -> Array:
    return matrix(factors["up"])[start:stop] @ matrix(factors["down"])


LORA = Form("lora", _product, _rows)
