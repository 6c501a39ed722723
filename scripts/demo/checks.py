"""Checks between training stages: samples for held-out scenes and edits, scored exactly."""

from __future__ import annotations

import models
import numpy as np
import sample
import torch
import world
from training import Run
from world import VALIDATION_SEED


class Check:
    """Samples on held-out scenes and edits, scored exactly."""

    def __init__(self, run: Run, vae: torch.nn.Module, scale: float, count: int = 200) -> None:
        rng = np.random.default_rng(VALIDATION_SEED)
        self.edits_ = world.sample_edits(rng, count)
        self.scenes = world.sample_scenes(rng, count)
        self._vae, self._scale, self._device = vae, scale, run.device
        self._images = models.to_latents(vae, world.render(self.edits_.source))

    def _decode(self, latents: torch.Tensor) -> np.ndarray:
        return models.to_pictures(self._vae, latents.to(self._device) / self._scale)

    def _captioned(self, unet, text_encoder, tokenizer, name, steps, scale):
        with torch.no_grad():
            text = models.embed(text_encoder, tokenizer, world.caption(self.scenes))
            empty = models.embed(text_encoder, tokenizer, [""])
        denoise = sample.guided(unet, text, empty, scale)
        latents = sample.sample(denoise, sample.make_scheduler(name, steps), len(text), 0)
        worst = world.caption_distance(self.scenes, self._decode(latents))
        return float((worst < world.RIGHT_BELOW).mean())

    def text_to_image(self, unet, text_encoder, tokenizer) -> dict[str, float]:
        """Return the shares of right pictures of a denoiser that is not distilled."""
        models_ = (unet, text_encoder, tokenizer)
        return {
            "ddim25": self._captioned(*models_, "ddim", 25, 1.5),
            "lcm4": self._captioned(*models_, "lcm", 4, 1.5),
        }

    def few_steps(self, unet, text_encoder, tokenizer) -> dict[str, float]:
        """Return the shares of right pictures of a few-step denoiser."""
        models_ = (unet, text_encoder, tokenizer)
        return {f"lcm{n}": self._captioned(*models_, "lcm", n, 1.0) for n in (1, 2, 4)}

    def edits(self, unet, text_encoder, tokenizer) -> dict[str, float]:
        """Return the shares of right edits of an 8-channel denoiser."""
        values = {}
        with torch.no_grad():
            text = models.embed(text_encoder, tokenizer, self.edits_.instructions)
            empty = models.embed(text_encoder, tokenizer, [""])
        for name, steps in (("ddim", 25), ("lcm", 4), ("lcm", 2)):
            denoise = sample.guided(unet, text, empty, 1.5, self._images)
            latents = sample.sample(denoise, sample.make_scheduler(name, steps), len(text), 0)
            right = world.score(self.edits_, self._decode(latents)).is_right
            values[f"{name}{steps}"] = float(right.mean())
            values[f"{name}{steps}_open"] = float(right[self.edits_.is_open].mean())
        return values
