"""The target's own path: what an edit model itself makes of the noise that a few steps begin with.

A consistency model answers each step with the end of the path that leads from there, and takes
fresh noise to the next. So the reference for a few-step picture is no picture of 50 steps, which
begins and goes on with other noise, but the target's own chain: from the same noise, each step
answered by the end of the target's ODE, noised again with the same noise.

Source: Luo et al., "Latent Consistency Models", 2023, algorithm 1, with the ODE solved instead of
guessed; DDIM, Song et al. 2020, solves it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from merge.editor.denoise import GuidedModel
from merge.editor.load import Editor
from merge.editor.schedule import Noise, Schedule, draw_noise
from merge.errors import VerificationError

# Of the ODE over all of the noise; a part of it takes its share, and never fewer than the least.
ODE_STEPS = 16
LEAST_ODE_STEPS = 4


@dataclass(frozen=True, slots=True)
class NoiseLevels:
    """How much picture and how much noise a timestep has, and what the model predicts.

    Attributes:
        alphas: Factor of the picture for each trained timestep.
        sigmas: Factor of the noise.
        kind: `epsilon`, `v_prediction` or `sample`.
    """

    alphas: tuple[float, ...]
    sigmas: tuple[float, ...]
    kind: str

    @classmethod
    def of(cls, scheduler: Any) -> NoiseLevels:
        """Return those of a scheduler.

        Raises:
            VerificationError: its noise is of another kind, as that of flow matching.
        """
        powers = getattr(scheduler, "alphas_cumprod", None)
        kind = getattr(scheduler.config, "prediction_type", "epsilon")
        if powers is None or kind not in ("epsilon", "v_prediction", "sample"):
            raise VerificationError(
                f"{type(scheduler).__name__} has no noise levels that a path can be made of",
                hint="name metrics that need none, as in --metrics l1,ssim",
            )
        values = [float(power) for power in powers]
        return cls(
            tuple(math.sqrt(value) for value in values),
            tuple(math.sqrt(1 - value) for value in values),
            str(kind),
        )

    def split(
        self, prediction: torch.Tensor, noisy: torch.Tensor, timestep: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return picture and noise that a prediction says noisy latents are made of."""
        alpha, sigma = self.alphas[timestep], self.sigmas[timestep]
        if self.kind == "v_prediction":
            return alpha * noisy - sigma * prediction, sigma * noisy + alpha * prediction
        if self.kind == "epsilon":
            return (noisy - sigma * prediction) / alpha, prediction
        return prediction, (noisy - alpha * prediction) / sigma

    def mix(self, clean: torch.Tensor, noise: torch.Tensor, timestep: int) -> torch.Tensor:
        """Return latents with the noise of a timestep."""
        return self.alphas[timestep] * clean + self.sigmas[timestep] * noise


def ode_grid(timestep: int, trained_steps: int) -> list[int]:
    """Return the timesteps at which the ODE is evaluated from one down to 0, which is not."""
    count = max(LEAST_ODE_STEPS, math.ceil(ODE_STEPS * timestep / trained_steps))
    grid = [round(timestep * (count - index) / count) for index in range(count)]
    return sorted({step for step in grid if step > 0}, reverse=True) or [timestep]


def starts_of(schedule: Schedule, levels: NoiseLevels) -> list[int]:
    """Return the timesteps from which the target leads to an end of its own.

    A scheduler whose steps take no noise has one path, whatever the number of its steps.
    """
    timesteps = [min(round(float(t)), len(levels.alphas) - 1) for t in schedule.timesteps]
    return timesteps[: 1 + schedule.noises]


def draws_noise(schedule: Schedule) -> bool:
    """Return True for a scheduler whose steps draw noise of their own, by trying it."""
    zeros = torch.zeros(1, 4, 1, 1)

    def first(seed: int) -> torch.Tensor:
        # A schedule is good for one run: each step moves it on.
        fresh = copy.deepcopy(schedule)
        drawn, generators = draw_noise([seed], (4, 1, 1), fresh)
        return fresh.step(0, zeros, zeros + 1, Noise(drawn[0], tuple(drawn[1:]), generators))

    return schedule.noises == 0 and not first(0).equal(first(1))


def follow_path(
    editor: Editor,
    schedule: Schedule,
    predict: GuidedModel,
    noise: Noise,
    on_evaluation: Callable[[], None],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what each step begins with and where it leads, each `(steps, n, 4, h, w)` float32.

    Args:
        editor: With the target's weights.
        schedule: Of the few steps.
        predict: The target with its own guidance.
        noise: Of the few steps, on the device.
        on_evaluation: Called each time the target was evaluated.
    """
    levels = NoiseLevels.of(editor.pipeline.scheduler)
    starts = starts_of(schedule, levels)
    states, ends = [noise.first], []
    for index, timestep in enumerate(starts):
        ends.append(_solve(editor, levels, predict, states[-1], timestep, on_evaluation))
        if index + 1 < len(starts):
            states.append(levels.mix(ends[-1], noise.steps[index], starts[index + 1]))
    return torch.stack(states), torch.stack(ends)


def _solve(
    editor: Editor,
    levels: NoiseLevels,
    predict: GuidedModel,
    latents: torch.Tensor,
    timestep: int,
    on_evaluation: Callable[[], None],
) -> torch.Tensor:
    """Return the end of the ODE from noisy latents."""
    grid = ode_grid(timestep, editor.trained_steps)
    steps = editor.move(torch.tensor(grid))
    for index, step in enumerate(grid):
        prediction = predict(latents, steps[index])
        clean, drawn = levels.split(prediction, latents, step)
        on_evaluation()
        if index + 1 == len(grid):
            return clean
        latents = levels.mix(clean, drawn, grid[index + 1])
    raise AssertionError("an empty grid")
