"""LoHa, `(w1_a @ w1_b) * (w2_a @ w2_b)` with `a` `(out, r)` and `b` `(r, in*kh*kw)`.

With the cores `t1` and `t2` `(r, r, kh, kw)`, `a` is `(r, out)` and `b` `(r, in)`.

Source: Hyeon-Woo et al. 2022, arXiv:2108.06098; Yeh et al. 2024, arXiv:2309.14859 (LyCORIS).
"""

from __future__ import annotations

from merge.lora.forms.model import (
    Array,
    Factors,
    Form,
    Product,
    Shapes,
    demand,
    matrix,
    pair_shape,
    through_core,
)


def _product(factors: Shapes) -> Product:
    demand(factors, "w1_a", "w1_b", "w2_a", "w2_b")
    if ("t1" in factors) != ("t2" in factors):
        raise ValueError("it has only one of its two cores t1 and t2")
    (rank, shape), (other, second) = (pair_shape(factors, f"w{n}", f"t{n}") for n in "12")
    if (rank, shape) != (other, second):
        raise ValueError(
            f"its halves have shapes {list(shape)} and {list(second)}, of rank {rank} and {other}"
        )
    return Product("loha", rank, shape)


def _rows(factors: Factors, start: int, stop: int) -> Array:
    halves = []
    for number in "12":
        left, right = factors[f"w{number}_a"], factors[f"w{number}_b"]
        core = factors.get(f"t{number}")
        if core is None:
            halves.append(left[start:stop] @ matrix(right))
        else:
            halves.append(through_core(left.T[start:stop], core, right))
    return halves[0] * halves[1]


LOHA = Form("loha", _product, _rows, "hada_")
