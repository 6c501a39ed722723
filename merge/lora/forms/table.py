"""Every form of LoRA: told by the shapes of its factors, multiplied some rows at a time."""

from __future__ import annotations

from collections.abc import Iterator

from merge.lora.forms.diff import DIFF
from merge.lora.forms.locon import LOCON
from merge.lora.forms.loha import LOHA
from merge.lora.forms.lokr import LOKR
from merge.lora.forms.lora import LORA
from merge.lora.forms.model import Array, Factors, Form, Product, Shapes

FORMS: dict[str, Form] = {form.name: form for form in (LORA, LOCON, LOHA, LOKR, DIFF)}


def product_of(factors: Shapes) -> Product:
    """Find the form of factors and multiply their shapes.

    Args:
        factors: Role, as in `split_role`, to shape.

    Raises:
        ValueError: a factor is missing or too much, or they do not multiply.
    """
    if not factors:
        raise ValueError("it has no factors")
    if "diff" in factors:
        if len(factors) > 1:
            raise ValueError("it has a whole difference and factors of one too")
        return DIFF.product(factors)
    prefixes = {role.partition("_")[0] if "_" in role else "" for role in factors}
    if len(prefixes) > 1:
        raise ValueError(f"it mixes the factors {', '.join(sorted(factors))} of several forms")
    for form in (LOHA, LOKR):
        if prefixes == {form.prefix.rstrip("_")}:
            return form.product({r.removeprefix(form.prefix): s for r, s in factors.items()})
    if not {"down", "up"} <= factors.keys():
        raise ValueError("it has only one of its two factors")
    return (LOCON if "mid" in factors else LORA).product(factors)


def bare(role: str) -> str:
    """Return the role of a factor without its form's prefix."""
    for form in FORMS.values():
        role = role.removeprefix(form.prefix)
    return role


def delta_rows(form: str, factors: Factors, start: int, stop: int) -> Array:
    """Multiply the factors of an adapter, without its alpha, the same on numpy and torch.

    Args:
        form: A key of `FORMS`, whose files say what the factors are.
        factors: Role to array, in float64.
        start: First row.
        stop: One past the last row.

    Returns:
        `(stop - start, columns)`.
    """
    return FORMS[form].rows(factors, start, stop)


def row_steps(
    form: str, factors: Factors, start: int, stop: int, most: int
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
    period = FORMS[form].period(factors)
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
