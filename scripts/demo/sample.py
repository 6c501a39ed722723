"""Sample from denoisers in large batches, for the checks between and after the training stages.

The same arithmetic as the edit runner's, on bare tensors: thousands of pictures in minutes.
"""

from __future__ import annotations

from collections.abc import Callable

import diffusers
import models
import torch

Denoiser = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def make_scheduler(name: str, steps: int) -> diffusers.SchedulerMixin:
    """Build `ddim` or `lcm` with the world's schedule, set to a number of steps."""
    kept = models.SCHEDULE
    if name == "lcm":
        known = set(diffusers.LCMScheduler().config)
        scheduler = diffusers.LCMScheduler(**{k: v for k, v in kept.items() if k in known})
    else:
        scheduler = diffusers.DDIMScheduler(**kept)
    scheduler.set_timesteps(steps)
    return scheduler


def sample(
    denoise: Denoiser, scheduler: diffusers.SchedulerMixin, count: int, seed: int
) -> torch.Tensor:
    """Run a denoiser from noise to scaled latents `(count, 4, 8, 8)` on the CPU's random numbers.

    Args:
        denoise: Gives the model's output for latents and timesteps.
        scheduler: From `make_scheduler`.
        count: Pictures.
        seed: Of all noise.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 4, models.LATENT, models.LATENT, generator=generator)
    with torch.inference_mode():
        for t in scheduler.timesteps:
            output = denoise(x, t.expand(count))
            x = scheduler.step(output, t, x, generator=generator).prev_sample
    return x


def guided(
    unet: torch.nn.Module,
    text: torch.Tensor,
    empty: torch.Tensor,
    guidance_scale: float,
    image: torch.Tensor | None = None,
    batch: int = 250,
) -> Denoiser:
    """Make a denoiser with guidance towards the text, image guidance off.

    Args:
        unet: 4 input channels, or 8 with `image`.
        text: Encoded texts, `(n, 12, 64)`.
        empty: The encoded empty text, `(1, 12, 64)`.
        guidance_scale: 1 for none.
        image: Unscaled latents of the source pictures, `(n, 4, 8, 8)`.
        batch: Pictures a forward pass.
    """

    def forward(x: torch.Tensor, t: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        device = context.device
        return torch.cat(
            [
                unet(
                    x[i : i + batch].to(device), t[i : i + batch].to(device), context[i : i + batch]
                )
                .sample.float()
                .cpu()
                for i in range(0, len(x), batch)
            ]
        )

    def denoise(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        rows = x if image is None else torch.cat([x, image.cpu()], dim=1)
        output = forward(rows, t, text)
        if guidance_scale == 1:
            return output
        plain = forward(rows, t, empty.expand(len(x), -1, -1).contiguous())
        return plain + guidance_scale * (output - plain)

    return denoise
