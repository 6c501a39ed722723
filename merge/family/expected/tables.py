"""Class to the function that makes its table."""

from __future__ import annotations

from collections.abc import Callable

from merge.family.expected import clip
from merge.family.expected.fields import ConfigFields, Table
from merge.family.expected.unet import unet_tensors
from merge.family.expected.vae import vae_tensors

TABLES: dict[str, Callable[[ConfigFields], Table | None]] = {
    "UNet2DConditionModel": unet_tensors,
    "AutoencoderKL": vae_tensors,
    "CLIPTextModel": clip.text_tensors,
    "CLIPTextModelWithProjection": clip.text_projection_tensors,
    "CLIPVisionModel": clip.vision_tensors,
    "CLIPVisionModelWithProjection": clip.vision_projection_tensors,
    "StableDiffusionSafetyChecker": clip.safety_checker_tensors,
}
