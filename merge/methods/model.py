"""What a merge method is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

# numpy.ndarray or torch.Tensor; neither is imported here, so that plans need no torch.
Array = Any


@dataclass(frozen=True, slots=True)
class Method:
    """A way to merge.

    Attributes:
        name: As written in recipes.
        function: The arithmetic on one block of a tensor.
        params: Names that the recipe's `params` may hold.
        formula: One line for plans and cards.
        scope: `tensor` when it has to see whole tensors, else `element`.
        needs_parents: True when it looks at distilled and base, not only at their difference.
        combine: Adds several deltas at once; None: they are added one after the other.
    """

    name: str
    function: Callable[[Array, Array, Array, float], None]
    params: tuple[str, ...]
    formula: str
    scope: str = "element"
    needs_parents: bool = False
    combine: Callable[..., None] | None = None

    def fill(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Return parameters with the defaults of those that are not given."""
        return dict(params)
