"""What a merge method is, and what its parameters may be: both as its function declares them."""

from __future__ import annotations

import difflib
import inspect
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

# numpy.ndarray or torch.Tensor; neither is imported here, so that plans need no torch.
Array = Any
Arrays = Sequence[Array]
Weights = Sequence[float]
# Distilled and base of each delta.
Parents = Sequence[tuple[Array, Array]]

_KINDS = {float: "a number", int: "a whole number", bool: "true or false"}
# What a function may ask for beside target, deltas, weights and its own parameters.
_CONTEXT = ("key", "start", "parents")


@dataclass(frozen=True, slots=True)
class Limits:
    """What a parameter may be; stands in its annotation.

    Attributes:
        doc: What it is, for messages.
        minimum: Smallest value; None for a boolean.
        maximum: Largest value; None for a boolean.
        is_open: True when the value must lie above `minimum`, not at it.
    """

    doc: str
    minimum: float | None = None
    maximum: float | None = None
    is_open: bool = False


@dataclass(frozen=True, slots=True)
class Param:
    """A parameter of a method.

    Attributes:
        name: As written under a recipe's `params`.
        default: Used when the recipe does not say.
        kind: `float`, `int` or `bool`.
        limits: What it may be.
    """

    name: str
    default: float | bool
    kind: type
    limits: Limits

    def problem(self, value: object) -> str | None:
        """Return what is wrong with a value, None when nothing is."""
        limits, what = self.limits, _KINDS[self.kind]
        allowed = (int, float) if self.kind is float else self.kind
        if not isinstance(value, allowed) or isinstance(value, bool) != (self.kind is bool):
            return f"{value!r} is not {what}: {limits.doc}"
        low, high = limits.minimum, limits.maximum
        if low is None or high is None:
            return None
        assert isinstance(value, int | float)
        if (value > low if limits.is_open else value >= low) and value <= high:
            return None
        lowest = f"{low} (not {low} itself)" if limits.is_open else low
        return f"{value} is not within {lowest} to {high}: {limits.doc}"


@dataclass(frozen=True)
class Method:
    """A way to merge.

    Attributes:
        function: `(target, deltas, weights)`, then by their names those of `key`, `start` and
            `parents` that it wants, and its own parameters. It changes the target in place; the
            deltas are its to overwrite. `start` is the index of the block's first element among
            those that the deltas cover; `parents` are distilled and base of each delta.
        formula: One line for plans and cards.
        source: Where the method comes from.
        is_sum: True when deltas are only added, so that they may come one after another.
        is_whole: True when it has to see whole tensors.
        arrays: Float32 arrays of a tensor's size that it needs where tensors come whole.
        arrays_per_delta: The same for each delta.
    """

    function: Callable[..., None]
    formula: str
    source: str
    is_sum: bool = False
    is_whole: bool = False
    arrays: int = 2
    arrays_per_delta: int = 2

    @property
    def name(self) -> str:
        """Return the name in recipes."""
        return self.function.__name__

    @cached_property
    def _declared(self) -> Mapping[str, inspect.Parameter]:
        return inspect.signature(self.function).parameters

    @cached_property
    def params(self) -> tuple[Param, ...]:
        """Return what a recipe's `params` may hold."""
        hints = typing.get_type_hints(self.function, include_extras=True)
        return tuple(
            Param(name, parameter.default, *typing.get_args(hints[name]))
            for name, parameter in self._declared.items()
            if parameter.default is not inspect.Parameter.empty
        )

    @property
    def needs_parents(self) -> bool:
        """Return True when it looks at distilled and base, not only at their difference."""
        return "parents" in self._declared

    def merge(
        self,
        target: Array,
        deltas: Arrays,
        weights: Weights,
        params: Mapping[str, Any],
        **context: Any,
    ) -> None:
        """Call the function with what it declares.

        Args:
            target: Any shape, float32; overwritten.
            deltas: Same shape each; overwritten.
            weights: One a delta, each a float32.
            params: All of its own, see `fill`.
            **context: `key`, `start` and `parents`.
        """
        wanted = {name: context[name] for name in _CONTEXT if name in self._declared}
        self.function(target, deltas, weights, **wanted, **params)

    def fill(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Return parameters, already checked, with the defaults of those that are not given."""
        filled: dict[str, Any] = {}
        for param in self.params:
            value = params.get(param.name, param.default)
            filled[param.name] = float(value) if param.kind is float else value
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
