"""What a merge method is."""

from __future__ import annotations

from collections.abc import Callable
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
    """

    name: str
    function: Callable[[Array, Array, Array, float], None]
    params: tuple[str, ...]
    formula: str
