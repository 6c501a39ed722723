"""Distil the base into few-step models: a full UNet, and a LoRA.

Latent consistency distillation: the student, one step of the teacher's DDIM further along, must
say the same picture. Guidance scales of the teacher are drawn and the student is not told, as for
LCM-LoRA, so it needs no guidance embedding.

As in the base's training, half of the pictures come with some of their tiles in the four extra
channels, and the rate is small. Without both, the delta bends what only editing uses: distilled
from text alone at 4e-4 (13 % of the base's norm), the merge at weight 1 got 30 % of edits right in
4 steps, where the unmerged target had 69 %.

Source: Luo et al. 2023, "Latent Consistency Models" (arXiv:2310.04378), algorithm 1.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import models
import torch
from checks import Check
from training import (
    EMPTY,
    Noise,
    Optimizer,
    Run,
    draw_text_to_image,
    draw_tile_mask,
    load_text,
    load_vae,
    relative_norm,
)

LORA_RANK = 16
_STEPS = 50  # of the teacher's DDIM, original_inference_steps when editing
_GUIDANCE = (1.0, 2.0)  # the teacher's guidance scales
_SIGMA_DATA, _TIMESTEP_SCALING = 0.5, 10.0  # LCMScheduler's

State = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Student:
    """What is trained, and how a denoiser's weights are made of it.

    Attributes:
        weights: The tensors that are trained.
        build: Makes the denoiser's tensors that differ from the base, by name.
    """

    weights: list[torch.Tensor]
    build: Callable[[list[torch.Tensor]], State]


def train_distilled(run: Run) -> None:
    """Distil the base with every weight free."""
    base = run.load("base")["unet"]
    names = list(base)

    def build(values: list[torch.Tensor]) -> State:
        return dict(zip(names, values, strict=True))

    student = Student([base[name].clone().requires_grad_() for name in names], build)
    weights = _distil(run, "distilled", student)
    run.save("distilled", {"unet": models.cut_image_channels(build(weights))})


def train_lora(run: Run) -> None:
    """Distil the base into a LoRA, from the truncated SVD of the full distillation's delta."""
    base = run.load("base")["unet"]
    full = run.load("distilled")["unet"]
    keys = [key for key in base if key.endswith(".weight") and base[key].ndim > 1]
    # As in LCM-LoRA: a target's first convolution has another shape.
    keys = [key for key in keys if not key.startswith(("conv_in.", "conv_out."))]
    factors: list[torch.Tensor] = []
    for key in keys:
        u, s, v = torch.linalg.svd((full[key] - base[key]).flatten(1), full_matrices=False)
        root = s[:LORA_RANK].sqrt()
        factors += [u[:, :LORA_RANK] * root, root[:, None] * v[:LORA_RANK]]

    def build(values: list[torch.Tensor]) -> State:
        pairs = zip(keys, values[::2], values[1::2], strict=True)
        return {key: base[key] + (up @ down).view_as(base[key]) for key, up, down in pairs}

    student = Student([f.contiguous().clone().requires_grad_() for f in factors], build)
    weights = _distil(run, "lora", student)
    run.save("lora", {"keys": keys, "factors": weights})


def _distil(run: Run, stage: str, student: Student) -> list[torch.Tensor]:
    """Train a student and return its averaged weights."""
    schedule = run.schedule(stage)
    vae, scale = load_vae(run)
    text_encoder, tokenizer = load_text(run)
    teacher = run.make_unet(8).requires_grad_(False)
    teacher.load_state_dict(run.load("base")["unet"])
    shell = copy.deepcopy(teacher)
    optimizer = Optimizer(student.weights, schedule, ema=0.99)
    pool = run.pool(run.preset.distillation_pool)
    noise = Noise(run.device)
    check = Check(run, vae, scale)
    generator = run.generator(20)
    with torch.no_grad():
        context = text_encoder(pool.texts)[0]

    def predict(
        values: list[torch.Tensor],
        xt: torch.Tensor,
        hint: torch.Tensor,
        t: torch.Tensor,
        text: torch.Tensor,
    ) -> torch.Tensor:
        inputs = (torch.cat([xt, hint], 1), t, text)
        v = torch.func.functional_call(shell, student.build(values), inputs).sample
        x, _ = noise.split(xt, v, t)
        s = (t * _TIMESTEP_SCALING).view(-1, 1, 1, 1)
        root = (s**2 + _SIGMA_DATA**2).sqrt()
        return xt * (_SIGMA_DATA / root) ** 2 + x * (s / root)

    with run.curve(stage) as curve:
        mean = 0.0
        for step in range(schedule.steps):
            clean, rows = draw_text_to_image(pool, run.batch, generator)
            hint = clean * draw_tile_mask(run.batch, generator).to(run.device)
            text = context[rows]
            index = torch.randint(_STEPS, (run.batch,), generator=generator)
            low, high = _GUIDANCE
            guidance = low + (high - low) * torch.rand(run.batch, 1, 1, 1, generator=generator)
            t = ((index + 1) * (1000 // _STEPS) - 1).to(run.device)
            before = (t - 1000 // _STEPS).clamp(min=0)
            fresh = torch.randn(clean.shape, generator=generator).to(run.device)
            xt, _ = noise.add(clean * pool.scale, fresh, t)
            with torch.no_grad():
                both = torch.cat([text, context[EMPTY].expand_as(text)])
                seen = torch.cat([xt, hint], 1).repeat(2, 1, 1, 1)
                v, plain = teacher(seen, t.repeat(2), both).sample.chunk(2)
                v = plain + guidance.to(run.device) * (v - plain)
                x, eps = noise.split(xt, v, t)
                a, s = noise.at(before)
                goal = predict(optimizer.average, a * x + s * eps, hint, before, text)
                # The last step of DDIM ends in the picture itself.
                goal = torch.where((index == 0).to(run.device).view(-1, 1, 1, 1), x, goal)
            error = predict(student.weights, xt, hint, t, text) - goal
            loss = ((error.square() + 1e-6).sqrt() - 1e-3).mean()  # pseudo-Huber
            optimizer.step(loss, step)
            mean += loss.item() / 100
            if (step + 1) % 100 == 0:
                values = {"loss": mean}
                mean = 0.0
                if (step + 1) % 500 == 0 and run.rank == 0:
                    state = teacher.state_dict() | student.build(optimizer.average)
                    small = run.make_unet(4)
                    small.load_state_dict(models.cut_image_channels(state))
                    values |= check.few_steps(small, text_encoder, tokenizer)
                    values["drift"] = relative_norm(state, teacher.state_dict())
                curve.add(step + 1, **values)
    return [average.detach() for average in optimizer.average]
