"""What every training stage uses: where it keeps its work, the optimizer, the noise schedule."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import data
import diffusers
import models
import torch
import torch.distributed as dist
import world
from presets import Preset
from world import TRAINING_SEED

EMPTY = 0  # the row of the empty text


@dataclass(frozen=True, slots=True)
class Schedule:
    """How a stage trains, here.

    Attributes:
        steps: Optimizer steps.
        rate: Peak learning rate of AdamW.
    """

    steps: int
    rate: float


# What a step of a stage takes, in steps of plain training: the distillation asks its teacher twice.
_COST = {"base": 1.15, "target": 1.05, "distilled": 2.4}
# The committed autoencoder, which both sizes share.
_AUTOENCODER = Path(__file__).with_name("small") / "target" / "vae"


class Run:
    """Where a training run keeps its stages and curves, and its part of the batch.

    With several processes each takes a share of every batch and the gradients are averaged; two
    of one thread each are half as fast again as one of two threads, the models are that small.
    """

    def __init__(
        self,
        work: Path,
        device: str,
        preset: Preset,
        rank: int = 0,
        processes: int = 1,
        fraction: float = 1.0,
    ) -> None:
        self.work = work
        self.preset = preset
        self.fraction = fraction
        self.rank = rank
        self.batch = preset.batch // processes
        self.device = torch.device(device)
        self._pools: dict[int, data.Pool] = {}
        work.mkdir(parents=True, exist_ok=True)

    def schedule(self, stage: str) -> Schedule:
        """Return how long a stage trains here; where the clock decides, it is asked now."""
        full = self.preset.budgets[stage]
        steps = full.steps
        if steps is None:
            steps = int(self.preset.seconds / (_step_seconds(self) * _COST[stage]))
        return Schedule(max(2, round(steps * self.fraction)), full.rate)

    def make_unet(self, in_channels: int) -> diffusers.UNet2DConditionModel:
        """Build a denoiser of the preset's size."""
        return models.make_unet(in_channels, self.preset.widths).to(self.device)

    def pool(self, count: int) -> data.Pool:
        """Draw training edits, the same ones for every stage that asks for as many."""
        count = max(200, int(count * self.fraction))
        if count not in self._pools:
            vae, scale = load_vae(self)
            tokenizer = models.make_tokenizer(self.work / "tokenizer")
            self._pools[count] = data.make_pool(vae, tokenizer, scale, TRAINING_SEED, count)
        return self._pools[count]

    def path(self, stage: str) -> Path:
        """Return where a stage is kept."""
        return self.work / f"{stage}.pt"

    def load(self, stage: str) -> dict[str, dict[str, torch.Tensor]]:
        """Load a finished stage."""
        if not self.path(stage).exists():
            raise SystemExit(f"stage {stage} has not been trained: run it first")
        loaded: dict[str, dict[str, torch.Tensor]] = torch.load(
            self.path(stage), map_location=self.device
        )
        return loaded

    def save(self, stage: str, content: dict[str, object]) -> None:
        """Keep a finished stage, whole or not at all."""
        if self.rank:
            return
        partial = self.path(stage).with_suffix(".partial")
        torch.save(content, partial)
        partial.replace(self.path(stage))

    @contextmanager
    def curve(self, stage: str) -> Iterator[Curve]:
        """Open the log of a stage."""
        path = self.work / f"{stage}.jsonl" if self.rank == 0 else Path(os.devnull)
        with path.open("w", encoding="utf-8") as file:
            yield Curve(stage, file, quiet=self.rank > 0)

    def generator(self, offset: int) -> torch.Generator:
        """Seed this process's random numbers."""
        return torch.Generator().manual_seed(TRAINING_SEED + 1000 * self.rank + offset)


class Curve:
    """A stage's log: one JSON object a line, and the same on the screen."""

    def __init__(self, stage: str, file: TextIO, quiet: bool) -> None:
        self._stage, self._file, self._quiet = stage, file, quiet
        self._started = time.monotonic()

    def add(self, step: int, **values: float) -> None:
        """Log a line."""
        row = {"step": step, "time_s": round(time.monotonic() - self._started, 1)}
        row |= {name: round(value, 5) for name, value in values.items()}
        print(json.dumps(row), file=self._file, flush=True)
        if not self._quiet:
            print(self._stage, *(f"{name} {value:g}" for name, value in row.items()), flush=True)


class Optimizer:
    """AdamW with warm-up, a cosine to a twentieth of the rate, clipping, and averaged weights."""

    def __init__(
        self, parameters: list[torch.Tensor], schedule: Schedule, ema: float = 0.999
    ) -> None:
        self.parameters = parameters
        self.average = [p.detach().clone() for p in parameters]
        self._schedule, self._ema = schedule, ema
        self._adam = torch.optim.AdamW(
            parameters, lr=schedule.rate, betas=(0.9, 0.99), weight_decay=0.0, fused=True
        )

    def step(self, loss: torch.Tensor, step: int) -> None:
        """Take a step down the gradient of a loss."""
        loss.backward()
        self._average_over_processes()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        warm = min(1.0, (step + 1) / 100)
        fall = 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / self._schedule.steps))
        for group in self._adam.param_groups:
            group["lr"] = self._schedule.rate * warm * fall
        self._adam.step()
        self._adam.zero_grad(set_to_none=True)
        decay = min(self._ema, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(self.average, self.parameters, 1 - decay)

    def _average_over_processes(self) -> None:
        if not dist.is_initialized():
            return
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        parts = flat.split([gradient.numel() for gradient in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Put the averaged weights in place for the while."""
        kept = [p.detach().clone() for p in self.parameters]
        with torch.no_grad():
            torch._foreach_copy_(self.parameters, self.average)
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(self.parameters, kept)


class Noise:
    """The forward process of the world's schedule, with v-prediction."""

    def __init__(self, device: torch.device) -> None:
        scheduler = diffusers.DDIMScheduler(**models.SCHEDULE)
        self.alpha = scheduler.alphas_cumprod.sqrt().to(device)
        self.sigma = (1 - scheduler.alphas_cumprod).sqrt().to(device)

    def at(self, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the share of picture and of noise at timesteps, `(n, 1, 1, 1)` each."""
        return self.alpha[t].view(-1, 1, 1, 1), self.sigma[t].view(-1, 1, 1, 1)

    def add(
        self, x: torch.Tensor, noise: torch.Tensor, t: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the noisy latents and the v to predict."""
        a, s = self.at(t)
        return a * x + s * noise, a * noise - s * x

    def split(
        self, xt: torch.Tensor, v: torch.Tensor, t: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the latents and the noise that a v stands for."""
        a, s = self.at(t)
        return a * xt - s * v, s * xt + a * v


def relative_norm(state: dict[str, torch.Tensor], start: dict[str, torch.Tensor]) -> float:
    moved = sum((state[k] - start[k]).double().square().sum() for k in start)
    return math.sqrt(moved / sum(x.double().square().sum() for x in start.values()))


def load_vae(run: Run) -> tuple[diffusers.AutoencoderKL, float]:
    """Load the trained autoencoder and its scale."""
    if "vae" not in run.preset.budgets:
        vae = diffusers.AutoencoderKL.from_pretrained(_AUTOENCODER, torch_dtype=torch.float32)
        vae = vae.to(run.device).eval().requires_grad_(False)
        return vae, vae.config.scaling_factor
    loaded = run.load("vae")
    vae = models.make_vae().to(run.device).eval().requires_grad_(False)
    vae.load_state_dict(loaded["vae"])
    vae.register_to_config(scaling_factor=loaded["scale"])
    return vae, loaded["scale"]


def load_text(run: Run):
    """Load the trained text encoder and the tokenizer."""
    tokenizer = models.make_tokenizer(run.work / "tokenizer")
    text_encoder = models.make_text_encoder(len(tokenizer)).to(run.device)
    text_encoder.load_state_dict(run.load("base")["text_encoder"])
    return text_encoder.eval().requires_grad_(False), tokenizer


def _step_seconds(run: Run, count: int = 30, warm_up: int = 10) -> float:
    """Measure what a step of plain training takes here."""
    unet, noise = run.make_unet(8), Noise(run.device)
    optimizer = Optimizer(list(unet.parameters()), Schedule(count, 1e-4))
    generator = run.generator(30)
    clean = torch.randn(run.batch, 4, models.LATENT, models.LATENT, device=run.device)
    width = unet.config.cross_attention_dim
    context = torch.randn(run.batch, models.TEXT_LENGTH, width, device=run.device)
    started = 0.0
    for step in range(warm_up + count):
        if step == warm_up:
            _wait_for(run.device)
            started = time.monotonic()
        hint = clean * draw_tile_mask(run.batch, generator).to(run.device)
        optimizer.step(v_loss(unet, noise, clean, hint, context, generator), step)
    _wait_for(run.device)
    return (time.monotonic() - started) / count


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def draw_text_to_image(
    pool: data.Pool, batch: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw unscaled latents and text rows: captions, instruction-like sentences, or no text."""
    index = torch.randint(len(pool), (batch,), generator=generator)
    lot = torch.rand(2, batch, generator=generator).to(pool.source.device)
    is_source = lot[0] < 0.4
    text = torch.where(lot[0] < 0.7, pool.outcome_caption[index], pool.instruction[index])
    text = torch.where(is_source, pool.source_caption[index], text)
    text = torch.where(lot[1] < 0.1, EMPTY, text)
    latents = torch.where(is_source.view(-1, 1, 1, 1), pool.source[index], pool.outcome[index])
    return latents, text


def draw_tile_mask(batch: int, generator: torch.Generator) -> torch.Tensor:
    """Draw which tiles are shown: none in half of the pictures, else a random share of them."""
    share = torch.rand(batch, 1, 1, 1, generator=generator) * 1.6 - 0.6
    half = torch.rand(batch, 1, 1, 1, generator=generator) < 0.5
    share = torch.where(half, 0.0, share.clamp(min=0.2))
    shown = torch.rand(batch, 1, world.GRID, world.GRID, generator=generator) < share
    cells = models.LATENT // world.GRID
    return shown.float().repeat_interleave(cells, 2).repeat_interleave(cells, 3)


def v_loss(unet, noise, clean, image, context, generator):
    t = torch.randint(1000, (len(clean),), generator=generator).to(clean.device)
    fresh = torch.randn(clean.shape, generator=generator).to(clean.device)
    xt, v = noise.add(clean, fresh, t)
    return torch.nn.functional.mse_loss(unet(torch.cat([xt, image], 1), t, context).sample, v)
