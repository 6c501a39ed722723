"""What choose.py chose: the weight, and timesteps for each number of steps."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

FILE = Path(__file__).with_name("choice.json")


@dataclass(frozen=True, slots=True)
class Choice:
    """The settings that the recipes have.

    Attributes:
        weight: Of the delta.
        timesteps: Number of steps to where they are; None for the scheduler's own.
    """

    weight: float
    timesteps: dict[int, tuple[int, ...] | None]


def load_choice() -> Choice:
    """Read the committed choice."""
    tree = json.loads(FILE.read_text(encoding="utf-8"))
    places = {
        int(steps): tuple(found["timesteps"]) if found["timesteps"] else None
        for steps, found in tree["timesteps"].items()
    }
    return Choice(tree["weight"], places)
