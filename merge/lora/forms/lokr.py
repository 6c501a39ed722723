"""LoKr, the Kronecker product of `w1` `(l, m)` and `w2` `(k, n[, kh, kw])`.

`w1` may be `w1_a @ w1_b` and `w2` may be `w2_a @ w2_b`, or `w2_a` `(r, k)` and `w2_b` `(r, n)`
around the core `t2` `(r, r, kh, kw)`.

Source: Yeh et al. 2024, arXiv:2309.14859 (LyCORIS).
"""

from __future__ import annotations

from merge.lora.forms.model import (
    Array,
    Factors,
    Form,
    Product,
    Shape,
    Shapes,
    demand,
    matrix,
    pair_shape,
    through_core,
)

_HALVES = {"w1": ("w1_a", "w1_b"), "w2": ("w2_a", "w2_b")}


def _product(factors: Shapes) -> Product:
    for whole, halves in _HALVES.items():
        has_halves = any(half in factors for half in halves)
        if whole in factors and (has_halves or (whole == "w2" and "t2" in factors)):
            raise ValueError(f"it has {whole} both whole and in factors")
        if whole not in factors:
            demand(factors, *halves)
    ranks = []
    parts: list[Shape] = []
    for whole in _HALVES:
        if whole in factors:
            parts.append(factors[whole])
        else:
            rank, shape = pair_shape(factors, whole, "t2" if whole == "w2" else "")
            ranks.append(rank)
            parts.append(shape)
    coarse, fine = parts
    if len(coarse) != 2 or len(fine) < 2 or 0 in (*coarse, *fine):
        raise ValueError(f"factors {list(coarse)} and {list(fine)} have no Kronecker product")
    if len(set(ranks)) > 1:
        raise ValueError(f"its factors have ranks {ranks[0]} and {ranks[1]}, so its scale is open")
    shape = (coarse[0] * fine[0], coarse[1] * fine[1], *fine[2:])
    # LyCORIS gives a module without low-rank factors the scale 1, whatever its alpha.
    return Product("lokr", ranks[0] if ranks else 0, shape)


def _rows(factors: Factors, start: int, stop: int) -> Array:
    coarse = factors["w1"] if "w1" in factors else factors["w1_a"] @ factors["w1_b"]
    fine_rows = _fine_rows(factors)
    first, last = start // fine_rows, (stop - 1) // fine_rows
    # Within one row of the coarse factor only some rows of the fine one are needed.
    begin, end = (0, fine_rows)
    if first == last:
        begin, end = start - first * fine_rows, stop - first * fine_rows
    fine = _fine(factors, begin, end)
    part = coarse[first : last + 1]
    blocks = part.reshape(*part.shape, 1, 1).swapaxes(1, 2) * fine.reshape(1, end - begin, 1, -1)
    rows = blocks.reshape(part.shape[0] * (end - begin), -1)
    skipped = start - first * fine_rows - begin
    return rows[skipped : skipped + stop - start]


def _fine(factors: Factors, start: int, stop: int) -> Array:
    if "w2" in factors:
        return matrix(factors["w2"])[start:stop]
    left, right = factors["w2_a"], factors["w2_b"]
    if "t2" in factors:
        return through_core(left.T[start:stop], factors["t2"], right)
    return left[start:stop] @ matrix(right)


def _fine_rows(factors: Factors) -> int:
    """Return how many rows of the delta share a row of the coarse factor."""
    if "w2" in factors:
        return int(factors["w2"].shape[0])
    return int(factors["w2_a"].shape[1 if "t2" in factors else 0])


LOKR = Form("lokr", _product, _rows, "lokr_", _fine_rows)
