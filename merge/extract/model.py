"""What an extraction found."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class ExtractedLayer:
    """A weight whose delta is in the LoRA.

    Attributes:
        key: The weight's name.
        component: Whose weight it is.
        block: A1111's name of its block; empty where there is none.
        rank: Of its factors.
        squared_norm: Of the delta.
        relative_error: `||delta - up @ down|| / ||delta||`, with the factors as they are stored.
        energy: Part of the squared norm that the rank keeps.
        is_capped: True when the energy asked for needs a higher rank than allowed.
    """

    key: str
    component: str
    block: str
    rank: int
    squared_norm: float
    relative_error: float
    energy: float
    is_capped: bool


@dataclass(frozen=True, slots=True)
class LeftOutDelta:
    """A tensor whose delta no LoRA can hold.

    Attributes:
        key: The tensor's name.
        component: Where it is.
        reason: Why.
        squared_norm: Of the delta that is left out.
    """

    key: str
    component: str
    reason: str
    squared_norm: float


@dataclass(frozen=True, slots=True)
class BlockError:
    """The layers of one block together.

    Attributes:
        name: E.g. `IN04`; the component's name where it has no blocks.
        layers: How many.
        ranks: The smallest and the largest.
        relative_error: Of all of them as one vector.
        energy: Part of their squared norm that is kept.
    """

    name: str
    layers: int
    ranks: tuple[int, int]
    relative_error: float
    energy: float


@dataclass(frozen=True, slots=True)
class ExtractResult:
    """A LoRA and how far it is from the delta.

    Attributes:
        path: The file.
        form: `kohya` or `peft`.
        dtype: Of the factors, e.g. `float16`.
        size_bytes: Of the file.
        layers: In the order of the plan.
        left_out: What the LoRA lacks.
        unchanged: Keys whose delta is zero; nothing is stored for them.
        block_names: Of the layers, as data flows.
    """

    path: Path
    form: str
    dtype: str
    size_bytes: int
    layers: tuple[ExtractedLayer, ...]
    left_out: tuple[LeftOutDelta, ...]
    unchanged: tuple[str, ...]
    block_names: tuple[str, ...]

    @property
    def blocks(self) -> tuple[BlockError, ...]:
        """Return the error of each block, in the network's order."""
        groups: dict[str, list[ExtractedLayer]] = {}
        for layer in self.layers:
            groups.setdefault(layer.block or layer.component, []).append(layer)
        others = [name for name in groups if name not in self.block_names]
        return tuple(_summary(name, groups[name]) for name in (*self.block_names, *others))

    @property
    def total(self) -> BlockError:
        """Return the error of all layers in the LoRA."""
        return _summary("total", self.layers)

    @property
    def squared_norm(self) -> float:
        """Return that of the whole delta, what is left out included."""
        missing = sum(item.squared_norm for item in self.left_out)
        return missing + sum(layer.squared_norm for layer in self.layers)

    @property
    def total_error(self) -> float:
        """Return the relative error of the whole delta, what is left out included."""
        missing = sum(item.squared_norm for item in self.left_out)
        lost = missing + sum(_lost(layer) for layer in self.layers)
        return math.sqrt(lost / self.squared_norm)

    def share(self, item: LeftOutDelta | ExtractedLayer) -> float:
        """Return a tensor's part of the squared norm of the whole delta."""
        return item.squared_norm / self.squared_norm


def _lost(layer: ExtractedLayer) -> float:
    return layer.squared_norm * layer.relative_error**2


def _summary(name: str, layers: Iterable[ExtractedLayer]) -> BlockError:
    layers = list(layers)
    ranks = [layer.rank for layer in layers]
    whole = sum(layer.squared_norm for layer in layers)
    lost = sum(_lost(layer) for layer in layers)
    kept = sum(layer.squared_norm * layer.energy for layer in layers)
    error = math.sqrt(lost / whole)
    return BlockError(name, len(layers), (min(ranks), max(ranks)), error, kept / whole)
