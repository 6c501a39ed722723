"""How a picture is edited: the settings, their limits, and what is known of their range."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class EditSettings:
    """How a picture is edited.

    Attributes:
        steps: num_inference_steps.
        guidance_scale: Of the instruction; found to work from 1 to 3.
        image_guidance_scale: Of the picture; 1 turns it off.
        seed: Of the noise, drawn on the CPU so that every device gets the same.
        resolution: Short side in pixels; None takes what the model was trained at.
        original_inference_steps: Length of the LCM schedule that steps are picked from.
        timesteps: Explicit timesteps instead of `steps`.
    """

    steps: int = 4
    guidance_scale: float = 2.0
    image_guidance_scale: float = 1.0
    seed: int = 0
    resolution: int | None = None
    original_inference_steps: int = 50
    timesteps: tuple[int, ...] | None = None
