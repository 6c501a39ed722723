"""LoCon with a core: `down` `(q, in[, 1, 1])`, `mid` `(p, q, kh, kw)`, `up` `(out, p)`.

Source: Yeh et al. 2024, arXiv:2309.14859 (LyCORIS).
"""

from __future__ import annotations

from merge.lora.forms.lora import check_ends, is_flat
from merge.lora.forms.model import Array, Factors, Form, Product, Shapes, matrix, through_core


def _product(factors: Shapes) -> Product:
    down, core, up = factors["down"], factors["mid"], factors["up"]
    fits = check_ends(factors, core[0] if core else 0)
    if not fits or len(core) < 3 or core[1] != down[0] or not down[0] or not is_flat(down):
        raise ValueError(f"factors {list(up)}, {list(core)} and {list(down)} do not multiply")
    return Product("locon", down[0], (up[0], down[1], *core[2:]))


def _rows(factors: Factors, start: int, stop: int) -> Array:
    left = matrix(factors["up"])[start:stop]
    return through_core(left, factors["mid"], matrix(factors["down"]))


LOCON = Form("locon", _product, _rows)
