"""Class to the function that makes its table."""

from __future__ import annotations

from collections.abc import Callable

from merge.family.expected.clip import (
    safety_checker_tensors,
    text_projection_tensors,
    text_tensors,
    vision_projection_tensors,
    vision_tensors,
)
from merge.family.expected.fields import Fields, Table
from merge.family.expected.unet import unet_tensors
from merge.family.expected.vae import vae_tensors

TABLES: dict[str, Callable[[Fields], Table | None]] = {
    "UNet2DConditionModel": unet_tensors,
    "AutoencoderKL": vae_tensors,
    "CLIPTextModel": text_tensors,
    "CLIPTextModelWithProjection": text_projection_tensors,
    "CLIPVisionModel": vision_tensors,
    "CLIPVisionModelWithProjection": vision_projection_tensors,
    "StableDiffusionSafetyChecker": safety_checker_tensors,
}
