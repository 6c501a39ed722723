"""What the factors of a module amount to, told by their shapes alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from merge.header import element_count

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]

_LOKR_HALVES = {"w1": ("w1_a", "w1_b"), "w2": ("w2_a", "w2_b")}


@dataclass(frozen=True, slots=True)
class Product:
    """The delta that factors multiply to.

    Attributes:
        form: As in `delta_rows`.
        rank: What alpha is divided by; 0 where alpha has no effect.
        shape: `(out, in)` or `(out, in, kh, kw)`; `(out, in*kh*kw)` where the factors hide it.
    """

    form: str
    rank: int
    shape: Shape


def product_of(factors: Shapes) -> Product:
    """Find the form of factors and multiply their shapes.

    Args:
        factors: Role, as in `split_role`, to shape.

    Raises:
        ValueError: a factor is missing or too much, or they do not multiply.
    """
    if not factors:
        raise ValueError("it has no factors")
    if set(factors) == {"diff"}:
        return Product("diff", 0, factors["diff"])
    if "diff" in factors:
        raise ValueError("it has a whole difference and factors of one too")
    kinds = {role.partition("_")[0] if "_" in role else "lora" for role in factors}
    if len(kinds) > 1:
        raise ValueError(f"it mixes the factors {', '.join(sorted(factors))} of several forms")
    if kinds == {"hada"}:
        return _loha({role.removeprefix("hada_"): shape for role, shape in factors.items()})
    if kinds == {"lokr"}:
        return _lokr({role.removeprefix("lokr_"): shape for role, shape in factors.items()})
    return _lora(factors)


def _lora(factors: Shapes) -> Product:
    if not {"down", "up"} <= factors.keys():
        raise ValueError("it has only one of its two factors")
    down, up = factors["down"], factors["up"]
    if 0 in (*down[:1], *up[1:2]):
        raise ValueError("it is empty: its factors have rank 0")
    core = factors.get("mid")
    inner = core[0] if core else (down[0] if down else 0)
    fits = len(down) >= 2 and len(up) >= 2 and 0 < inner == up[1] and _is_flat(up)
    if core is None:
        if not fits:
            raise ValueError(f"factors {list(up)} and {list(down)} do not multiply")
        return Product("lora", down[0], (up[0], *down[1:]))
    if not fits or len(core) < 3 or core[1] != down[0] or not down[0] or not _is_flat(down):
        raise ValueError(f"factors {list(up)}, {list(core)} and {list(down)} do not multiply")
    return Product("locon", down[0], (up[0], down[1], *core[2:]))


def _loha(factors: Shapes) -> Product:
    _demand(factors, ("w1_a", "w1_b", "w2_a", "w2_b"))
    if ("t1" in factors) != ("t2" in factors):
        raise ValueError("it has only one of its two cores t1 and t2")
    products = [_pair(factors, f"w{number}", f"t{number}") for number in "12"]
    if products[0] != products[1]:
        raise ValueError(
            f"its halves have shapes {list(products[0][1])} and {list(products[1][1])}, of rank "
            f"{products[0][0]} and {products[1][0]}"
        )
    rank, shape = products[0]
    return Product("loha", rank, shape)


def _lokr(factors: Shapes) -> Product:
    for whole, halves in _LOKR_HALVES.items():
        has_halves = any(half in factors for half in halves)
        if whole in factors and (has_halves or (whole == "w2" and "t2" in factors)):
            raise ValueError(f"it has {whole} both whole and in factors")
        if whole not in factors:
            _demand(factors, halves)
    ranks = []
    parts: list[Shape] = []
    for whole in _LOKR_HALVES:
        if whole in factors:
            parts.append(factors[whole])
        else:
            rank, shape = _pair(factors, whole, "t2" if whole == "w2" else "")
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


def _pair(factors: Shapes, name: str, core_name: str) -> tuple[int, Shape]:
    """Return rank and shape of `a @ b`, or of the two around a core."""
    left, right = factors[f"{name}_a"], factors[f"{name}_b"]
    core = factors.get(core_name)
    shown = " and ".join(str(list(s)) for s in (left, core, right) if s is not None)
    if len(left) != 2 or len(right) < 2 or 0 in (*left, *right):
        raise ValueError(f"factors {shown} do not multiply")
    if core is None:
        if left[1] != right[0]:
            raise ValueError(f"factors {shown} do not multiply")
        return right[0], (left[0], *right[1:])
    if len(core) < 3 or len(right) != 2 or core[:2] != (left[0], right[0]):
        raise ValueError(f"factors {shown} do not multiply")
    return right[0], (left[1], right[1], *core[2:])


def _demand(factors: Shapes, roles: tuple[str, ...]) -> None:
    missing = [role for role in roles if role not in factors]
    if missing:
        raise ValueError(f"it lacks its factor {' and '.join(missing)}")


def _is_flat(shape: Shape) -> bool:
    return element_count(shape[2:]) == 1
