"""A weight file's tensors as they are meant: names unwrapped, scales beside their weights.

Everything that reads weights comes through here, so that no command understands a file otherwise
than another one does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from merge.errors import CheckpointError
from merge.family.keys.average import AVERAGE_PREFIX, averaged_keys
from merge.family.keys.single_file import is_single_file
from merge.family.registry import main_keys
from merge.header.model import TensorSpec
from merge.lora.roles import is_lora
from merge.reader.checkpoint import Checkpoint
from merge.reader.kinds.prediction import Prediction, is_marker, stated_prediction
from merge.reader.kinds.quantized import find_scales
from merge.reader.kinds.wrappers import unwrapped

# How a recipe says which of two sets of weights is taken.
AUTO = "auto"
# Tools that merge every tensor of a file average this constant too, into fractions that older
# loaders cut to integers: one position twice, another never.
_POSITIONS = "a constant, stored as floats; loaders count positions themselves"

Tensors = dict[str, tuple[int, TensorSpec]]


@dataclass(frozen=True, slots=True)
class Intake:
    """What a model's weight files hold.

    Attributes:
        checkpoint: Its tensors under the keys that they mean, those of a main component that is
            alone in its file under its own, each with its scale.
        left_out: Key of the file to the reason why nothing needs it.
        prediction: What the file says that its model predicts.
        warnings: What a user should decide, a line each.
    """

    checkpoint: Checkpoint
    left_out: Mapping[str, str] = field(default_factory=dict)
    prediction: Prediction = field(default_factory=Prediction)
    warnings: tuple[str, ...] = ()


def take_in(checkpoint: Checkpoint, ema: str | bool = AUTO) -> Intake:
    """Find out what the keys of a model mean.

    Args:
        checkpoint: Headers as they are in the files.
        ema: Whether a moving average beside plain weights is taken: True, False, or `auto`, which
            takes it where it is whole.

    Raises:
        CheckpointError: weights are quantised in a way that cannot be read, a scale or an average
            is missing, or two keys are one.
    """
    plain = unwrapped(checkpoint.tensors)
    tensors: Tensors = {plain[name]: place for name, place in checkpoint.tensors.items()}
    prediction = stated_prediction(tensors, checkpoint.metadata)
    quantized = find_scales({name: spec for name, (_, spec) in tensors.items()})
    left_out = dict(quantized.left_out)
    left_out |= {name: "a marker, not a weight" for name in tensors if is_marker(name)}
    left_out |= {name: _POSITIONS for name, (_, spec) in tensors.items() if _is_added_up(spec)}
    scales = {weight: tensors[scale] for weight, scale in quantized.scales.items()}
    for name in (*left_out, *quantized.scales.values()):
        del tensors[name]
    warnings: tuple[str, ...] = ()
    if any(name.startswith(AVERAGE_PREFIX) for name in tensors) or ema is True:
        tensors, scales, unused, warnings = _choose_average(tensors, scales, ema)
        left_out |= unused
    shapes = {name: spec.shape for name, (_, spec) in tensors.items()}
    names = {} if is_lora(tensors) else main_keys(shapes)
    if names:
        tensors = {names[name]: place for name, place in tensors.items()}
        scales = {names[name]: place for name, place in scales.items()}
    found = dataclasses.replace(checkpoint, tensors=tensors, scales=scales)
    return Intake(found, left_out, prediction, warnings)


def _choose_average(
    tensors: Tensors, scales: Tensors, ema: str | bool
) -> tuple[Tensors, Tensors, dict[str, str], tuple[str, ...]]:
    """Put the moving average in the place of the UNet's plain weights, or leave it out."""
    averages = averaged_keys(tensors)
    plain = (name for name in tensors if is_single_file([name]))
    lacking = next((name for name in plain if name not in averages), "")
    if ema is True and (not averages or lacking):
        what = f"of {lacking}" if averages else "of its UNet (model_ema.*)"
        raise CheckpointError(
            f"the file has no moving average {what}, and ema: true asks for it",
            hint="ema: false takes the plain weights",
        )
    is_average = ema is True or (ema == AUTO and bool(averages) and not lacking)
    kept = {name: p for name, p in tensors.items() if not name.startswith(AVERAGE_PREFIX)}
    reason = "a moving average kept for training; the plain weights are used"
    if is_average:
        reason = "of the moving average's training"
    left_out = {name: reason for name in tensors if name.startswith(AVERAGE_PREFIX)}
    if is_average:
        for name, average in averages.items():
            if tensors[average][1].shape != tensors[name][1].shape:
                raise CheckpointError(
                    f"{average} has shape {list(tensors[average][1].shape)}, and {name} "
                    f"{list(tensors[name][1].shape)}",
                    hint="ema: false takes the plain weights",
                )
            kept[name] = tensors[average]
            left_out[name] = "a plain weight; its moving average is used"
            left_out.pop(average)
        scales = {name: place for name, place in scales.items() if name not in averages}
    if ema != AUTO or not averages:
        return kept, scales, left_out, ()
    taken = "the moving average is" if is_average else "the plain weights are"
    why = f", since {lacking} has no average" if lacking else ", as in published folders"
    line = f"it holds plain weights and a moving average of them: {taken} used{why} (ema decides)"
    return kept, scales, left_out, (line,)


def _is_added_up(spec: TensorSpec) -> bool:
    return spec.name.endswith("embeddings.position_ids") and spec.dtype.startswith(("F", "BF"))


def reshaped(checkpoint: Checkpoint, shapes: Mapping[str, tuple[int, ...]]) -> Checkpoint:
    """Return a checkpoint some of whose tensors have another shape, of the same numbers."""
    if not shapes:
        return checkpoint
    tensors = dict(checkpoint.tensors)
    for key, shape in shapes.items():
        index, spec = tensors[key]
        tensors[key] = index, dataclasses.replace(spec, shape=shape)
    return dataclasses.replace(checkpoint, tensors=tensors)


def without(checkpoint: Checkpoint, names: Collection[str]) -> Checkpoint:
    """Return a checkpoint without some of its keys."""
    tensors = {name: place for name, place in checkpoint.tensors.items() if name not in names}
    scales = {name: place for name, place in checkpoint.scales.items() if name not in names}
    return dataclasses.replace(checkpoint, tensors=tensors, scales=scales)
