"""The delta of an adapter from its factors, some rows at a time, the same on numpy and torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from merge.header import element_count

# numpy's or torch's; both know every operation used here.
Array = Any


def delta_rows(form: str, factors: Mapping[str, Array], start: int, stop: int) -> Array:
    """Multiply the factors of an adapter, without its alpha.

    Convolutions are written as matrices of `(out, in*kh*kw)`; a factor of a linear layer may have
    trailing dimensions of 1.

    Args:
        form: One of
            `lora`, `up @ down`: `down` `(r, in[, kh, kw])`, `up` `(out, r[, 1, 1])`;
            `locon`, with a core: `down` `(q, in[, 1, 1])`, `mid` `(p, q, kh, kw)`, `up` `(out, p)`;
            `loha`, `(w1_a @ w1_b) * (w2_a @ w2_b)` with `a` `(out, r)` and `b` `(r, in*kh*kw)`, or
            with the cores `t1` and `t2` `(r, r, kh, kw)`, `a` `(r, out)` and `b` `(r, in)`;
            `lokr`, the Kronecker product of `w1` `(l, m)` and `w2` `(k, n[, kh, kw])`, where `w1`
            may be `w1_a @ w1_b` and `w2` may be `w2_a @ w2_b`, or `w2_a` `(r, k)` and `w2_b`
            `(r, n)` around the core `t2` `(r, r, kh, kw)`;
            `diff`, the delta itself, of the weight's shape.
        factors: Role to array, in float64.
        start: First row.
        stop: One past the last row.

    Returns:
        `(stop - start, columns)`.

    Source: Hu et al. 2021, arXiv:2106.09685 (LoRA); Yeh et al. 2024, arXiv:2309.14859 (LyCORIS:
    LoCon, LoHa after Hyeon-Woo et al. 2022, arXiv:2108.06098, LoKr).
    """
    return _FORMS[form](factors, start, stop)


def row_steps(
    form: str, factors: Mapping[str, Array], start: int, stop: int, most: int
) -> Iterator[tuple[int, int]]:
    """Split rows into steps for `delta_rows` that need no more than their own rows' memory.

    Args:
        form: As in `delta_rows`.
        factors: As in `delta_rows`.
        start: First row.
        stop: One past the last row.
        most: Rows of a step at most.

    Yields:
        First row and one past the last row of each step.
    """
    period = _fine_rows(factors) if form == "lokr" else 1
    while start < stop:
        end = min(start + max(most, 1), stop)
        into = start % period
        # A Kronecker product is made in whole periods, or within one.
        if into or end - start < period:
            end = min(end, start - into + period)
        else:
            end -= end % period
        yield start, end
        start = end


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


def _matrix(factor: Array) -> Array:
    return factor.reshape(factor.shape[0], -1)


def _lora(factors: Mapping[str, Array], start: int, stop: int) -> Array:
    return _matrix(factors["up"])[start:stop] @ _matrix(factors["down"])


def _locon(factors: Mapping[str, Array], start: int, stop: int) -> Array:
    left = _matrix(factors["up"])[start:stop]
    return _through_core(left, factors["mid"], _matrix(factors["down"]))


def _through_core(left: Array, core: Array, right: Array) -> Array:
    """Contract `(rows, p)`, `(p, q, kh, kw)` and `(q, in)` to `(rows, in*kh*kw)`."""
    kernel = element_count(core.shape[2:])
    half = (left @ _matrix(core)).reshape(left.shape[0], core.shape[1], kernel)
    # (in, q) @ (rows, q, kernel), for each row.
    return (right.T @ half).reshape(left.shape[0], right.shape[1] * kernel)


def _loha(factors: Mapping[str, Array], start: int, stop: int) -> Array:
    halves = []
    for number in "12":
        left, right = factors[f"w{number}_a"], factors[f"w{number}_b"]
        core = factors.get(f"t{number}")
        if core is None:
            halves.append(left[start:stop] @ _matrix(right))
        else:
            halves.append(_through_core(left.T[start:stop], core, right))
    return halves[0] * halves[1]


def _lokr(factors: Mapping[str, Array], start: int, stop: int) -> Array:
    coarse = factors["w1"] if "w1" in factors else factors["w1_a"] @ factors["w1_b"]
    fine_rows = _fine_rows(factors)
    first, last = start // fine_rows, (stop - 1) // fine_rows
    # Within one row of the coarse factor only some rows of the fine one are needed.
    begin, end = (0, fine_rows)
    if first == last:
        begin, end = start - first * fine_rows, stop - first * fine_rows
    fine = _lokr_fine(factors, begin, end)
    part = coarse[first : last + 1]
    blocks = part.reshape(*part.shape, 1, 1).swapaxes(1, 2) * fine.reshape(1, end - begin, 1, -1)
    rows = blocks.reshape(part.shape[0] * (end - begin), -1)
    skipped = start - first * fine_rows - begin
    return rows[skipped : skipped + stop - start]


def _lokr_fine(factors: Mapping[str, Array], start: int, stop: int) -> Array:
    if "w2" in factors:
        return _matrix(factors["w2"])[start:stop]
    left, right = factors["w2_a"], factors["w2_b"]
    if "t2" in factors:
        return _through_core(left.T[start:stop], factors["t2"], right)
    return left[start:stop] @ _matrix(right)


def _fine_rows(factors: Mapping[str, Array]) -> int:
    """Return how many rows of a LoKr's delta share a row of its coarse factor."""
    if "w2" in factors:
        return int(factors["w2"].shape[0])
    return int(factors["w2_a"].shape[1 if "t2" in factors else 0])


def _diff(factors: Mapping[str, Array], start: int, stop: int) -> Array:
    return _matrix(factors["diff"])[start:stop]


_FORMS = {"lora": _lora, "locon": _locon, "loha": _loha, "lokr": _lokr, "diff": _diff}
