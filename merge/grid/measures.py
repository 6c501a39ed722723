"""What is measured of a cell, and what each number is worth.

Distances are mean squares: an absolute or Huber distance forgives the few large errors that break
a picture, and chose too small weights in every trial.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from merge.editor.denoise import GuidedModel
from merge.editor.load import Editor
from merge.editor.pictures import load_image
from merge.editor.result import EditResult
from merge.editor.schedule import Schedule
from merge.errors import RecipeError, VerificationError
from merge.grid.jobs import SampleReference
from merge.grid.model import Sample
from merge.grid.path import NoiseLevels
from merge.verify.metrics import has_ssim, measure_pair, rms, to_values

Values = dict[str, tuple[float | None, ...]]

# Of 1000 trained timesteps, and the seed of the noise that is added there.
_RESIDUAL_SHARE = 0.2
_RESIDUAL_SEED = 0x5EED0FF5


@dataclass(frozen=True, slots=True)
class Metric:
    """A number of a cell.

    Attributes:
        title: For people.
        meaning: What it is.
        better: `lower`, `higher`, or empty for what is shown and not judged.
        needs_reference: True when the target's own path has to be followed.
    """

    title: str
    meaning: str
    better: str = ""
    needs_reference: bool = False


METRICS: Mapping[str, Metric] = {
    "right": Metric(
        "Right edits",
        "share of the edits with a known answer that are near to one",
        "higher",
    ),
    "score": Metric(
        "Score",
        "what ranks where no answer is known: of endpoint and residual, or of path and residual",
        "lower",
        needs_reference=True,
    ),
    "path": Metric(
        "Distance to the target's own path",
        "mean squared difference of the latents to where the target itself leads from the same "
        "noise",
        "lower",
        needs_reference=True,
    ),
    "endpoint": Metric(
        "Error of single steps",
        "mean squared difference of each step's answer, from where the target is, to the end that "
        "the target leads to",
        "lower",
        needs_reference=True,
    ),
    "residual": Metric(
        "What the target would change",
        "mean squared change when the target denoises the result after a little noise was added",
        "lower",
    ),
    "l1": Metric("Difference from the source, L1", "mean absolute, values in 0 to 1"),
    "psnr": Metric("PSNR to the source, dB", "of a peak of 1"),
    "ssim": Metric("SSIM to the source", "1 for the same picture"),
    "clip_image": Metric("CLIP image similarity", "cosine of source and result"),
    "clip_text": Metric("CLIP similarity to the caption", "cosine of result and its caption"),
    "clip_direction": Metric("CLIP directional similarity", "of the changes of both"),
}
# What is asked for by name; exact scores are measured wherever an edit names `expected`.
CHOICES = ("path", "endpoint", "residual", "l1", "psnr", "ssim")
# The error of single steps takes as many UNet rows as the edits do, and is left to be asked for.
DEFAULT = ("path", "residual")


def check_metrics(names: Sequence[str]) -> tuple[str, ...]:
    """Return names of metrics, each once.

    Raises:
        RecipeError: one is unknown, or cannot be measured here.
    """
    problems = [
        f"{name!r} is no metric; there are {', '.join(CHOICES)}"
        for name in names
        if name not in CHOICES
    ]
    if "ssim" in names and not has_ssim():
        problems.append("'ssim' needs the extra `metrics`: pip install 'instruct-merge[metrics]'")
    if problems:
        raise RecipeError(
            "the metrics are not valid:", problems, hint=f"as in --metrics {CHOICES[0]}"
        )
    return tuple(dict.fromkeys(names))


def measure_samples(
    results: Sequence[EditResult],
    samples: Sequence[Sample],
    references: Mapping[int, SampleReference] | None,
    metrics: Sequence[str],
) -> Values:
    """Measure the edits of a cell.

    Args:
        results: One for each sample.
        samples: What was asked.
        references: Index of a sample to the target's answers.
        metrics: Names; those of other models and of other weights are left out.

    Returns:
        Metric to a value for each sample.
    """
    values: Values = {}
    if any(sample.edit.expected for sample in samples):
        pairs = zip(results, samples, strict=True)
        values["right"] = tuple(_right(result, sample) for result, sample in pairs)
    if references is not None and "path" in metrics:
        values["path"] = tuple(
            mean_square(result.latents, references[index].last)
            for index, result in enumerate(results)
        )
    named = [name for name in ("l1", "psnr", "ssim") if name in metrics]
    if named:
        found = [measure_pair(result.source, result.to_pil()) for result in results]
        values |= {name: tuple(pair[name] for pair in found) for name in named}
    return values


def mean_square(values: Any, reference: Any) -> float:
    """Return the mean squared difference of two arrays of one shape, in float64."""
    return float(np.square(values.astype(np.float64) - reference).mean())


def endpoint_of(
    editor: Editor,
    schedule: Schedule,
    predict: GuidedModel,
    states: torch.Tensor,
    ends: torch.Tensor,
) -> list[float | None]:
    """Return the mean square by which a model's single steps miss the target's ends.

    Args:
        editor: With the weights that are measured.
        schedule: Of the few steps.
        predict: The model, with the guidance of the edit.
        states: What each step begins with, `(steps, n, 4, h, w)` float32 on the CPU.
        ends: Where the target leads from there.

    Returns:
        One value for each of the n samples; None where a step has no answer of its own, as that of
        a solver of the ODE.
    """
    if not schedule.has_answers:
        return [None] * states.shape[1]
    steps = editor.move(schedule.timesteps)
    errors = []
    for index, (state, end) in enumerate(zip(states, ends, strict=True)):
        noisy = editor.move(state)
        answer = schedule.answer(index, predict(schedule.scale(noisy, index), steps[index]), noisy)
        assert answer is not None
        errors.append((answer.cpu() - end).double().square().mean(dim=(1, 2, 3)))
    return [float(error) for error in torch.stack(errors).mean(dim=0)]


def residual_of(
    editor: Editor,
    levels: NoiseLevels,
    predict: GuidedModel,
    latents: torch.Tensor,
    indices: Sequence[int],
) -> list[float]:
    """Return how much the target changes latents at little noise, a mean square for each.

    Args:
        editor: With the target's weights.
        levels: Of its scheduler.
        predict: The target with its own guidance.
        latents: What edits ended in, `(n, 4, h, w)` float32 on the CPU.
        indices: Of the samples: each has noise of its own, the same in every cell.
    """
    timestep = round(editor.trained_steps * _RESIDUAL_SHARE)
    drawn = (
        torch.randn(
            latents.shape[1:], generator=torch.Generator("cpu").manual_seed(_RESIDUAL_SEED + index)
        )
        for index in indices
    )
    noise = torch.stack(list(drawn))
    noisy = editor.move(levels.mix(latents, noise, timestep))
    step = torch.tensor(timestep, device=editor.device)
    clean, _ = levels.split(predict(noisy, step), noisy, timestep)
    changes = (clean.cpu() - latents).double().square().mean(dim=(1, 2, 3))
    return [float(change) for change in changes]


def check_finite(values: Values, where: str) -> None:
    """Refuse numbers that are none.

    Raises:
        VerificationError: naming the metric and the sample.
    """
    for name, found in values.items():
        for index, value in enumerate(found):
            if value is not None and not math.isfinite(value):
                raise VerificationError(
                    f"{where}: {name} of sample {index} is {value}, not a finite number",
                    hint="the weight is far too large, or the device's dtype is too small",
                )


def check_latents(latents: Sequence[Any], where: str) -> None:
    """Refuse edits that came to no numbers: a picture of them is black, and measures as one.

    Raises:
        VerificationError: naming the sample.
    """
    for index, found in enumerate(latents):
        if not np.isfinite(found).all():
            raise VerificationError(
                f"{where}: the latents of sample {index} are not finite numbers",
                hint="the weight is far too large, or the device's dtype is too small",
            )


def _right(result: EditResult, sample: Sample) -> float | None:
    """Return 1 for an edit that is near to a known answer, 0 for another; None: none is known."""
    edit = sample.edit
    if not edit.expected:
        return None
    picture = result.to_pil()
    known = (
        load_image(path).resize(picture.size, Image.Resampling.LANCZOS) for path in edit.expected
    )
    distance = min(rms(to_values(picture), to_values(image)) for image in known)
    return float(distance <= edit.expected_limit)
