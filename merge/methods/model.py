"""What a merge method is, and what its parameters may be."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

# numpy.ndarray or torch.Tensor; neither is imported here, so that plans need no torch.
Array = Any

_KINDS = {"number": "a number", "integer": "a whole number", "boolean": "true or false"}


@dataclass(frozen=True, slots=True)
class Param:
    """A parameter of a method.

    Attributes:
        name: As written under a recipe's `params`.
        default: Used when the recipe does not say.
        minimum: Smallest value; None for a boolean.
        maximum: Largest value; None for a boolean.
        kind: `number`, `integer` or `boolean`.
        doc: What it is, for messages.
        is_open: True when the value must lie above `minimum`, not at it.
    """

    name: str
    default: float | bool
    minimum: float | None
    maximum: float | None
    kind: str
    doc: str
    is_open: bool = False

    def problem(self, value: object) -> str | None:
        """Return what is wrong with a value, None when nothing is."""
        if self.kind == "boolean":
            return None if isinstance(value, bool) else self._is_not(value)
        allowed = int if self.kind == "integer" else (int, float)
        if isinstance(value, bool) or not isinstance(value, allowed):
            return self._is_not(value)
        assert isinstance(value, int | float)
        assert self.minimum is not None
        assert self.maximum is not None
        is_above = value > self.minimum if self.is_open else value >= self.minimum
        if is_above and value <= self.maximum:
            return None
        lowest = f"{self.minimum} (not {self.minimum} itself)" if self.is_open else self.minimum
        return f"{value} is not within {lowest} to {self.maximum}: {self.doc}"

    def _is_not(self, value: object) -> str:
        return f"{value!r} is not {_KINDS[self.kind]}: {self.doc}"


@dataclass(frozen=True, slots=True)
class Method:
    """A way to merge.

    Attributes:
        name: As written in recipes.
        params: What the recipe's `params` may hold.
        formula: One line for plans and cards.
        source: Where the method comes from.
        scope: `tensor` when it has to see whole tensors, else `element`.
        needs_parents: True when it looks at distilled and base, not only at their difference.
        combine: `(target, deltas, weights, params, key, start)` and, where it needs them,
            `parents`: adds several deltas at once, in place; None: they are weighted and added one
            after the other. `deltas` are the callee's to overwrite; `start` is the index of the
            block's first element among those that the deltas cover.
    """

    name: str
    params: tuple[Param, ...]
    formula: str
    source: str
    scope: str = "element"
    needs_parents: bool = False
    combine: Callable[..., None] | None = None

    def fill(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Return parameters, already checked, with the defaults of those that are not given."""
        filled: dict[str, Any] = {}
        for param in self.params:
            value = params.get(param.name, param.default)
            filled[param.name] = float(value) if param.kind == "number" else value
        return filled

    def problems(self, params: Mapping[str, Any]) -> Iterator[str]:
        """Yield a line for each parameter that the method does not take or that is out of range."""
        known = {param.name: param for param in self.params}
        for name, value in params.items():
            if name in known:
                problem = known[name].problem(value)
                if problem:
                    yield f"params.{name}: {problem}"
                continue
            close = difflib.get_close_matches(str(name), known, n=1)
            hint = f", did you mean {close[0]!r}?" if close else ""
            takes = f"; it takes {', '.join(known)}" if known and not close else ""
            yield f"params.{name}: method {self.name} has no such parameter{hint}{takes}"
