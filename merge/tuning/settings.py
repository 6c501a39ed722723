"""The settings that a tuning tries: weights, guidance scales, timesteps."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from merge.errors import RecipeError
from merge.grid.axes import Axis, AxisValue, override_words, read_axes

# What may be tuned, in the order in which it is.
OVER = ("weight", "guidance_scale", "timesteps", "groups")
WEIGHTS = "0:1.5:0.25"
GUIDANCE = (1.0, 1.5, 2.0)
# Of timesteps that lie on the schedule of most LCMs: 50 of 1000, the last of each 20.
_GRID = 20
_LASTS = (259, 199, 99, 59)
_LASTS_OF_TWO = (399, 299, 199, 99)
_BENDS = (1.0, 1.4)

# At most five groups of a UNet, by what their keys have in common; the rest has the weight itself.
GROUPS = {
    "self-attention": "*.attn1.*",
    "cross-attention": "*.attn2.*",
    "feed-forward": "*.ff.*",
    "residual blocks": "*resnets*",
}


@dataclass(frozen=True, slots=True)
class Setting:
    """One way to merge and to edit.

    Attributes:
        weight: Of the delta.
        guidance_scale: Of the edits.
        timesteps: Explicit ones; None: the scheduler's own.
        groups: Weight of a group of tensors, by its pattern; empty: the weight for all.
    """

    weight: float
    guidance_scale: float
    timesteps: tuple[int, ...] | None
    groups: tuple[tuple[str, float], ...] = ()

    @property
    def labels(self) -> tuple[tuple[str, str], ...]:
        """Return each key with its value as it is typed."""
        steps = "null" if self.timesteps is None else "/".join(map(str, self.timesteps))
        return (
            ("weight", f"{self.weight:g}"),
            ("guidance_scale", f"{self.guidance_scale:g}"),
            ("timesteps", steps),
            *((f"block_weights[{pattern}]", f"{value:g}") for pattern, value in self.groups),
        )

    @property
    def grid(self) -> tuple[tuple[Axis, ...], tuple[AxisValue, ...]]:
        """Return the axes and the values of its cell."""
        values = [AxisValue(text, override_words(key, text)) for key, text in self.labels]
        axes = [Axis(key, (value,)) for (key, _), value in zip(self.labels, values, strict=True)]
        return tuple(axes), tuple(values)

    @property
    def rows(self) -> int:
        """Return the UNet rows of a step, which guidance doubles."""
        return 1 if self.guidance_scale <= 1 else 2

    def overrides(self, over: Sequence[str]) -> tuple[str, ...]:
        """Return the overrides for `run` of what was tuned."""
        return tuple(
            word
            for key, text in self.labels
            if key in over or (key.startswith("block_weights") and "groups" in over)
            for word in override_words(key, text)
        )

    def tree(self, steps: int) -> dict[str, Any]:
        """Return it as JSON has it."""
        return {
            "weight": self.weight,
            "guidance_scale": self.guidance_scale,
            "timesteps": None if self.timesteps is None else list(self.timesteps),
            "steps": steps,
            **({"block_weights": dict(self.groups)} if self.groups else {}),
        }


def check_over(names: Sequence[str]) -> tuple[str, ...]:
    """Return what is tuned, in the order in which it is.

    Raises:
        RecipeError: a name is unknown, or there is none.
    """
    unknown = [name for name in names if name not in OVER]
    if unknown or not names:
        raise RecipeError(
            "what is tuned is not valid:",
            [f"{name!r} is not one of {', '.join(OVER)}" for name in unknown] or ["name something"],
            hint="as in --over weight,guidance_scale,timesteps",
        )
    if "groups" in names and "weight" not in names:
        raise RecipeError("groups are tuned around a weight", [], hint="--over weight,groups")
    return tuple(name for name in OVER if name in names)


def read_weights(text: str) -> tuple[float, ...]:
    """Return the weights to try, ascending.

    Args:
        text: As an axis, `0:1.5:0.25`.

    Raises:
        RecipeError: it is no list or range of three numbers or more.
    """
    axes, _ = read_axes([f"weight={text}"])
    labels = [value.label for axis in axes for value in axis.values]
    try:
        weights = sorted(float(label) for label in labels)
    except ValueError:
        weights = []
    if len(weights) < 3:
        raise RecipeError(
            f"the weights {text!r} are no range of at least three numbers",
            [],
            hint=f"as in --weights {WEIGHTS}",
        )
    return tuple(weights)


def timesteps_for(steps: int) -> tuple[tuple[int, ...] | None, ...]:
    """Return timesteps to try for a number of steps, the scheduler's own first.

    All begin with pure noise. They differ in where the last step is, and in how much denser they
    become towards it: a picture of few latents is settled later than LCM's own timesteps have it.
    """
    if steps < 2:
        return (None,)
    found: list[tuple[int, ...] | None] = [None]
    lasts = _LASTS_OF_TWO if steps == 2 else _LASTS
    for last in lasts:
        for bend in _BENDS:
            shares = [(1 - index / (steps - 1)) ** bend for index in range(steps)]
            placed = tuple(_on_grid(last + (999 - last) * share) for share in shares)
            is_falling = all(a > b for a, b in itertools.pairwise(placed))
            if is_falling and placed not in found:
                found.append(placed)
    return tuple(found)


def _on_grid(timestep: float) -> int:
    return max(_GRID, round((timestep + 1) / _GRID) * _GRID) - 1
