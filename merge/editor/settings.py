"""How a picture is edited: the settings, their limits, and the range that was found to work."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

from merge.errors import ImageError
from merge.family.model import Family

MIN_RESOLUTION = 8  # pixels: one latent of the real models
MAX_RESOLUTION = 8192


@dataclass(frozen=True, slots=True)
class EditSettings:
    """How a picture is edited.

    Attributes:
        steps: num_inference_steps.
        guidance_scale: Of the instruction; found to work from 1 to 3.
        image_guidance_scale: Of the picture; 1 turns it off.
        seed: Of the noise, drawn on the CPU so that every device gets the same.
        resolution: Short side in pixels; None takes what the model was trained at.
        original_inference_steps: Length of the LCM schedule that steps are picked from; other
            schedulers take no notice of it.
        timesteps: Explicit timesteps, falling, instead of `steps`.
    """

    steps: int = 4
    guidance_scale: float = 2.0
    image_guidance_scale: float = 1.0
    seed: int = 0
    resolution: int | None = None
    original_inference_steps: int = 50
    timesteps: tuple[int, ...] | None = None


def check_settings(settings: EditSettings, *, trained_steps: int, is_lcm: bool) -> None:
    """Refuse settings that no edit can have.

    Args:
        settings: What was asked for.
        trained_steps: num_train_timesteps of the scheduler.
        is_lcm: True where the steps are picked from `original_inference_steps`.

    Raises:
        ImageError: a number is not finite or out of its range.
    """
    original = settings.original_inference_steps
    if is_lcm and not 1 <= original <= trained_steps:
        raise ImageError(
            f"original_inference_steps {original} is not within 1 to {trained_steps}",
            hint="most LCMs were distilled with 50",
        )
    if settings.timesteps is not None:
        _check_timesteps(settings.timesteps, trained_steps)
    elif is_lcm and not 1 <= settings.steps <= original:
        raise ImageError(
            f"steps {settings.steps} is not within 1 to original_inference_steps ({original})",
            hint="an LCM edits in 4 to 8 steps",
        )
    elif not 1 <= settings.steps <= trained_steps:
        raise ImageError(f"steps {settings.steps} is not within 1 to {trained_steps}")
    for name in ("guidance_scale", "image_guidance_scale"):
        value = getattr(settings, name)
        if not (math.isfinite(value) and value >= 0):
            raise ImageError(
                f"{name} {value} is not a finite number of at least 0",
                hint="2 for the instruction and 1 for the picture is where to start",
            )
    check_seed(settings.seed)
    resolution = settings.resolution
    if resolution is not None and not MIN_RESOLUTION <= resolution <= MAX_RESOLUTION:
        raise ImageError(
            f"resolution {resolution} is not within {MIN_RESOLUTION} to {MAX_RESOLUTION} pixels"
        )


def check_seed(seed: int) -> None:
    """Refuse a seed that a random generator cannot take.

    Raises:
        ImageError: it is negative or has more than 63 bits.
    """
    if not 0 <= seed < 2**63:
        raise ImageError(
            f"seed {seed} is not within 0 to 2**63 - 1", hint="any small number will do"
        )


def outside_range(
    settings: EditSettings, family: Family, default_resolution: int
) -> tuple[str, ...]:
    """Return a line for each setting outside the range that the merge was found to work in."""
    lines = []
    resolution = settings.resolution or default_resolution
    if settings.guidance_scale > 3:
        lines.append(f"guidance_scale {settings.guidance_scale:g} is above 3: expect artifacts")
    if settings.guidance_scale > 1 and settings.image_guidance_scale < 1:
        lines.append(
            f"image_guidance_scale {settings.image_guidance_scale:g} below 1 turns all guidance off"
        )
    elif settings.image_guidance_scale != 1:
        lines.append("image_guidance_scale other than 1 was found to cause artifacts")
    best = family.resolution
    if family.has_fixed_size and default_resolution == best != resolution:
        name = family.name.upper()
        lines.append(f"{name} edits at {resolution} px: only {best} was found to work")
    return tuple(lines)


def _check_timesteps(timesteps: tuple[int, ...], trained_steps: int) -> None:
    falling = all(a > b for a, b in itertools.pairwise(timesteps))
    inside = all(0 <= step < trained_steps for step in timesteps)
    if not (timesteps and falling and inside):
        shown = ", ".join(map(str, timesteps)) or "none"
        raise ImageError(
            f"timesteps {shown} do not fall strictly within {trained_steps - 1} to 0",
            hint="such as 999, 749, 499, 249",
        )
