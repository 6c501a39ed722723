"""Pictures to latents and back."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from merge.editor.load import Editor

# Pixels in one call: more would be no faster and take gigabytes.
_CALL_PIXELS = 1024 * 1024


def encode_pictures(editor: Editor, pictures: Sequence[Image.Image]) -> torch.Tensor:
    """Return the latents that an edit is conditioned on, `(n, 4, h, w)` in the VAE's dtype.

    The mode of the distribution, not a sample, and not scaled.

    Args:
        editor: The checkpoint.
        pictures: RGB, all of one size.

    Source: `prepare_image_latents` of diffusers' InstructPix2Pix pipelines.
    """
    vae = editor.pipeline.vae
    count = _pictures_per_call(pictures[0].width * pictures[0].height)
    parts = []
    for begin in range(0, len(pictures), count):
        bytes_ = torch.from_numpy(
            np.stack([np.asarray(p) for p in pictures[begin : begin + count]])
        )
        pixels = editor.move(bytes_).permute(0, 3, 1, 2).float() / 255
        parts.append(vae.encode((2 * pixels - 1).to(vae.dtype)).latent_dist.mode())
    return torch.cat(parts)


def decode_latents(editor: Editor, latents: torch.Tensor) -> torch.Tensor:
    """Return pictures in 0 to 1 of shape `(n, height, width, 3)`, NaN where one is not finite.

    Args:
        editor: The checkpoint.
        latents: `(n, 4, h, w)`, as the last step gave them.
    """
    vae = editor.pipeline.vae
    scaled = _unscale(editor, latents)
    count = _pictures_per_call(latents.shape[2] * latents.shape[3] * editor.vae_scale_factor**2)
    parts = []
    for part in torch.split(scaled.to(vae.dtype), count):
        values = vae.decode(part, return_dict=False)[0].float() * 0.5 + 0.5
        # Clamping alone would make an overflow look like white.
        parts.append(torch.where(values.isfinite(), values.clamp(0, 1), torch.nan))
    return torch.cat(parts).permute(0, 2, 3, 1)


def _unscale(editor: Editor, latents: torch.Tensor) -> torch.Tensor:
    """Undo the scaling that the UNet works in; some of SDXL's VAEs also shift."""
    config = editor.pipeline.vae.config
    mean, deviation = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
    if not editor.has_added_conditions or mean is None or deviation is None:
        return latents.div(config.scaling_factor)
    means, deviations = (latents.new_tensor(v).view(1, -1, 1, 1) for v in (mean, deviation))
    return (latents * deviations).div(config.scaling_factor) + means


def _pictures_per_call(pixels: int) -> int:
    return max(1, _CALL_PIXELS // pixels)
