"""Stands in for what the lora and keymap packages are about to provide."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from merge.header import element_count
from merge.lora import parse_lora


@dataclass(frozen=True)
class AdapterModule:
    """One adapted weight."""

    component: str
    key: str
    form: str
    factors: tuple[tuple[str, str], ...]
    rank: int
    alpha_key: str | None
    alpha: float | None
    rows: int
    columns: int
    channels: int
    magnitude: str | None = None

    @property
    def divisor(self) -> float:
        """Return the rank."""
        return float(self.rank)

    @property
    def names(self) -> tuple[str, ...]:
        """Return every key of the file that it uses."""
        alpha = (self.alpha_key,) if self.alpha_key else ()
        return (*(name for _, name in self.factors), *alpha)


@dataclass(frozen=True)
class AdapterTable:
    """All of a LoRA file."""

    modules: tuple[AdapterModule, ...]
    problems: tuple[str, ...]


def parse_adapters(
    shapes: Mapping[str, tuple[int, ...]],
    metadata: Mapping[str, str],
    targets: Mapping[str, Mapping[str, tuple[int, ...]]],
) -> AdapterTable:
    """Match every key of a LoRA file with a weight of the UNet."""
    table = parse_lora(shapes, metadata, targets["unet"])
    modules = tuple(
        AdapterModule(
            "unet",
            m.key,
            "lora",
            (("down", m.down), ("up", m.up)),
            m.rank,
            m.alpha_key,
            m.alpha,
            shapes[m.up][0],
            element_count(shapes[m.down][1:]),
            m.channels,
        )
        for m in table.modules
    )
    return AdapterTable(modules, table.problems)
