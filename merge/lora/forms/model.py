"""What a form of LoRA is, and what several of them have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from merge.header.dtypes import element_count

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]
# numpy's or torch's; both know every operation used here.
Array = Any
Factors = Mapping[str, Array]


@dataclass(frozen=True, slots=True)
class Product:
    """The delta that factors multiply to.

    Attributes:
        form: Name of the form.
        rank: What alpha is divided by; 0 where alpha has no effect.
        shape: `(out, in)` or `(out, in, kh, kw)`; `(out, in*kh*kw)` where the factors hide it.
    """

    form: str
    rank: int
    shape: Shape


@dataclass(frozen=True, slots=True)
class Form:
    """A form of LoRA.

    Attributes:
        name: In plans.
        product: Shapes of the factors to that of the delta; a ValueError says what does not fit.
        rows: Factors in float64, the first row and one past the last one to `(rows, columns)`.
            Convolutions are matrices of `(out, in*kh*kw)`; a factor of a linear layer may have
            trailing dimensions of 1.
        prefix: Of the roles of its factors in files.
        period: Factors to the number of rows that are made at once most cheaply.
    """

    name: str
    product: Callable[[Shapes], Product]
    rows: Callable[[Factors, int, int], Array]
    prefix: str = ""
    period: Callable[[Factors], int] = lambda factors: 1


def matrix(factor: Array) -> Array:
    """Return a factor as a matrix."""
    return factor.reshape(factor.shape[0], -1)


def through_core(left: Array, core: Array, right: Array) -> Array:
    """Contract `(rows, p)`, `(p, q, kh, kw)` and `(q, in)` to `(rows, in*kh*kw)`."""
    kernel = element_count(core.shape[2:])
    half = (left @ matrix(core)).reshape(left.shape[0], core.shape[1], kernel)
    # (in, q) @ (rows, q, kernel), for each row.
    return (right.T @ half).reshape(left.shape[0], right.shape[1] * kernel)


def pair_shape(factors: Shapes, name: str, core_name: str) -> tuple[int, Shape]:
    """Return rank and shape of `a @ b`, or of the two around a core."""
    left, right = factors[f"{name}_a"], factors[f"{name}_b"]
    core = factors.get(core_name)
    shown = " and ".join(str(list(s)) for s in (left, core, right) if s is not None)
    fits = len(left) == 2 and len(right) >= 2 and 0 not in (*left, *right)
    if core is None:
        if not fits or left[1] != right[0]:
            raise ValueError(f"factors {shown} do not multiply")
        return right[0], (left[0], *right[1:])
    if not fits or len(core) < 3 or len(right) != 2 or core[:2] != (left[0], right[0]):
        raise ValueError(f"factors {shown} do not multiply")
    return right[0], (left[1], right[1], *core[2:])


def demand(factors: Shapes, *roles: str) -> None:
    """Refuse factors some of which are missing."""
    missing = [role for role in roles if role not in factors]
    if missing:
        raise ValueError(f"it lacks its factor {' and '.join(missing)}")
