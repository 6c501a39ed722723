"""The steps of an edit: their timesteps, their noise, and how each moves the latents."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from merge.editor.settings import EditSettings
from merge.errors import ImageError


class Schedule(Protocol):
    """What the loop asks of a scheduler; good for one run.

    Everything that a step reads stays on the CPU: a step that looked a number up on the GPU would
    wait for the GPU.

    Attributes:
        timesteps: What the UNet is told, one per step, on the CPU.
        init_noise_sigma: What the first noise is multiplied by.
        noises: Tensors of noise that the steps take from outside.
        has_answers: True where each step ends in a picture, which `answer` returns.
    """

    timesteps: torch.Tensor
    init_noise_sigma: float
    noises: int
    has_answers: bool

    def scale(self, latents: torch.Tensor, index: int) -> torch.Tensor:
        """Return what the UNet of step `index` is given for these latents."""
        ...

    def step(
        self, index: int, prediction: torch.Tensor, latents: torch.Tensor, noise: Noise
    ) -> torch.Tensor:
        """Return the latents after step `index`, all in float32."""
        ...

    def answer(
        self, index: int, prediction: torch.Tensor, latents: torch.Tensor
    ) -> torch.Tensor | None:
        """Return the picture that step `index` ends in; None where a step ends in no picture."""
        ...


@dataclass(frozen=True, eq=False, slots=True)
class Noise:
    """The random numbers of a batch: every picture has a generator, so none depends on another.

    Attributes:
        first: Where the latents start, `(n, 4, h, w)` float32.
        steps: One such tensor for each of the schedule's `noises`.
        generators: One per picture, on the CPU, for schedulers that draw for themselves.
    """

    first: torch.Tensor
    steps: tuple[torch.Tensor, ...]
    generators: list[torch.Generator]


def draw_noise(
    seeds: Sequence[int], shape: Sequence[int], schedule: Schedule
) -> tuple[torch.Tensor, list[torch.Generator]]:
    """Draw the noise of a batch on the CPU.

    In float32 whatever the model's dtype, so that every device and dtype gets the same: the numbers
    a generator gives differ from dtype to dtype. In diffusers' order, first and then step by step.

    Args:
        seeds: One per picture.
        shape: Of the latents of one picture, `(4, h, w)`.
        schedule: For the number of tensors.

    Returns:
        Noise of shape `(1 + schedule.noises, n, 4, h, w)`, and the generators to draw on from.
    """
    noise = torch.empty(1 + schedule.noises, len(seeds), *shape)
    generators = []
    for row, seed in enumerate(seeds):
        generator = torch.Generator("cpu").manual_seed(seed)
        for step in range(1 + schedule.noises):
            # As one picture alone: a generator fills other shapes in another order.
            noise[step, row] = torch.randn(1, *shape, generator=generator)[0]
        generators.append(generator)
    return noise, generators


def make_schedule(scheduler: Any, settings: EditSettings) -> Schedule:
    """Return the steps that the settings ask for.

    Args:
        scheduler: Of the checkpoint; it is left as it is.
        settings: Checked ones.

    Raises:
        ImageError: explicit timesteps, and the scheduler takes none; or it is of another kind.
    """
    if not hasattr(scheduler, "init_noise_sigma"):
        raise ImageError(
            f"{type(scheduler).__name__} is no scheduler of the kind that these models edit with",
            hint="name another one, such as LCMScheduler or DDIMScheduler",
        )
    scheduler = copy.deepcopy(scheduler)
    is_lcm = type(scheduler).__name__ == "LCMScheduler"
    arguments: dict[str, Any] = {"device": "cpu"}
    if is_lcm:
        arguments["original_inference_steps"] = settings.original_inference_steps
    if settings.timesteps is None:
        arguments["num_inference_steps"] = settings.steps
    elif "timesteps" in inspect.signature(scheduler.set_timesteps).parameters:
        arguments["timesteps"] = list(settings.timesteps)
    else:
        raise ImageError(
            f"{type(scheduler).__name__} takes no explicit timesteps", hint="give steps instead"
        )
    with warnings.catch_warnings():
        # Old schedulers use numpy in ways it warns of.
        warnings.simplefilter("ignore", DeprecationWarning)
        scheduler.set_timesteps(**arguments)
    if is_lcm and not scheduler.config.thresholding:
        return _LcmSchedule(scheduler)
    return _StockSchedule(scheduler)


@dataclass(frozen=True, slots=True)
class _LcmStep:
    """The numbers of one step, each a float32 scalar on the CPU."""

    alpha: torch.Tensor
    beta: torch.Tensor
    c_skip: torch.Tensor
    c_out: torch.Tensor
    next_alpha: torch.Tensor
    next_beta: torch.Tensor


class _LcmSchedule:
    """LCMScheduler's step with noise that was drawn and moved before the loop.

    The scheduler itself would draw at every step and make the GPU wait for the copy. The operations
    and their order are its own, so on the CPU the latents are the same to the bit.

    Source: Luo et al., "Latent Consistency Models", 2023, algorithm 1; `LCMScheduler.step`.
    """

    has_answers = True

    def __init__(self, scheduler: Any) -> None:
        self.timesteps: torch.Tensor = scheduler.timesteps
        self.init_noise_sigma = float(scheduler.init_noise_sigma)
        self.noises = len(self.timesteps) - 1
        self._prediction_type = scheduler.config.prediction_type
        self._clip = scheduler.config.clip_sample_range if scheduler.config.clip_sample else None
        self._steps = []
        for index, timestep in enumerate(self.timesteps):
            following = self.timesteps[min(index + 1, self.noises)]
            alpha, next_alpha = (scheduler.alphas_cumprod[t] for t in (timestep, following))
            c_skip, c_out = scheduler.get_scalings_for_boundary_condition_discrete(timestep)
            self._steps.append(
                _LcmStep(
                    alpha.sqrt(),
                    (1 - alpha).sqrt(),
                    c_skip,
                    c_out,
                    next_alpha.sqrt(),
                    (1 - next_alpha).sqrt(),
                )
            )

    def scale(self, latents: torch.Tensor, index: int) -> torch.Tensor:
        return latents

    def answer(self, index: int, prediction: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        numbers = self._steps[index]
        if self._prediction_type == "epsilon":
            clean = (latents - numbers.beta * prediction) / numbers.alpha
        elif self._prediction_type == "v_prediction":
            clean = numbers.alpha * latents - numbers.beta * prediction
        else:
            clean = prediction
        if self._clip is not None:
            clean = clean.clamp(-self._clip, self._clip)
        return numbers.c_out * clean + numbers.c_skip * latents

    def step(
        self, index: int, prediction: torch.Tensor, latents: torch.Tensor, noise: Noise
    ) -> torch.Tensor:
        numbers = self._steps[index]
        denoised = self.answer(index, prediction, latents)
        if index == self.noises:
            return denoised
        return numbers.next_alpha * denoised + numbers.next_beta * noise.steps[index]


class _StockSchedule:
    """Any scheduler of diffusers by its own step."""

    has_answers = False

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler
        self.timesteps: torch.Tensor = scheduler.timesteps
        self.init_noise_sigma = float(scheduler.init_noise_sigma)
        self.noises = 0
        parameters = inspect.signature(scheduler.step).parameters
        # As the pipelines do; the default of some is another.
        self._arguments: dict[str, Any] = {"eta": 0.0} if "eta" in parameters else {}
        self._draws = "generator" in parameters

    def scale(self, latents: torch.Tensor, index: int) -> torch.Tensor:
        scaled: torch.Tensor = self._scheduler.scale_model_input(latents, self.timesteps[index])
        return scaled

    def step(
        self, index: int, prediction: torch.Tensor, latents: torch.Tensor, noise: Noise
    ) -> torch.Tensor:
        drawing = {"generator": noise.generators} if self._draws else {}
        following: torch.Tensor = self._scheduler.step(
            prediction,
            self.timesteps[index],
            latents,
            **self._arguments,
            **drawing,
            return_dict=False,
        )[0]
        return following

    def answer(self, index: int, prediction: torch.Tensor, latents: torch.Tensor) -> None:
        return None
