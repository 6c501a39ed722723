"""A single file and the folder of its configs, read together and found to fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from merge.conversion.configs import Configs, check_configs, fit_parts, read_configs
from merge.conversion.problems import naming
from merge.errors import CheckpointError
from merge.family.keys.single_file import unknown_keys
from merge.family.registry import recognise
from merge.json_files import read_json
from merge.plan.patterns import match_exclude
from merge.reader.checkpoint import Checkpoint, read_checkpoint
from merge.reader.intake import take_in, without
from merge.reader.kinds.prediction import EDM, Prediction
from merge.writer.copies.model import TensorCopy
from merge.writer.copies.single_file import plan_components


@dataclass(frozen=True, slots=True)
class OpenedFile:
    """What a single file holds.

    Attributes:
        checkpoint: Its tensors, under its own keys.
        parts: Component to its tensors under a folder's names, in the shapes of the configs.
        configs: Of the folder that was named with it.
        left_out: Key to the reason why no component has it.
        notes: What a user should know, a line each.
    """

    checkpoint: Checkpoint
    parts: Mapping[str, tuple[TensorCopy, ...]]
    configs: Configs
    left_out: Mapping[str, str]
    notes: tuple[str, ...]


def read_single_file(
    source: Path,
    config: Path,
    *,
    ema: str | bool = "auto",
    exclude: Sequence[str] = (),
    allow_pickle: bool = False,
) -> OpenedFile:
    """Read the headers of a single file and everything that its configs say of it.

    Args:
        source: The file.
        config: The pipeline folder that describes it.
        ema: Whether a moving average beside the UNet's plain weights is taken.
        exclude: Globs of keys that belong to no part of it and are left out.
        allow_pickle: Also read a pickle.

    Raises:
        SourceError: the file or the configs cannot be had.
        CheckpointError: a key is unknown, a weight is missing, the file is an EDM model, or the
            configs are those of another model.
    """
    raw = read_checkpoint([source], allow_pickle=allow_pickle)
    with naming(source):
        intake = take_in(raw, ema)
        _check_kind(intake.prediction)
        excluded = {
            name: f"excluded by {pattern!r}"
            for name in unknown_keys(intake.checkpoint.tensors)
            if (pattern := match_exclude(name, exclude))
        }
        checkpoint = without(intake.checkpoint, excluded)
        relayout = plan_components(checkpoint)
        main, copies = next(iter(relayout.copies.items()))
        found = recognise({copy.name: copy.shape for copy in copies})
        if found is None:
            raise CheckpointError(f"its {main} is of no architecture that is known")
    configs = read_configs(config)
    check_configs(configs, relayout.copies, found.family)
    with naming(source):
        _check_prediction(intake.prediction, configs)
        parts, notes = fit_parts(configs, relayout.copies)
    left_out = {**relayout.left_out, **intake.left_out, **excluded, **dict(checkpoint.left_out)}
    return OpenedFile(checkpoint, parts, configs, left_out, (*intake.warnings, *notes))


def _check_kind(prediction: Prediction) -> None:
    if prediction.kind == EDM:
        raise CheckpointError(
            f"is {prediction.title}, which the pipelines of a diffusers folder would take "
            "for an epsilon model",
            hint="keep the single file: ComfyUI reads its marker",
        )


def _check_prediction(prediction: Prediction, configs: Configs) -> None:
    """Refuse a file of one prediction with the scheduler of another."""
    scheduler = configs.folder / "scheduler" / "scheduler_config.json"
    if not prediction.kind or not scheduler.is_file():
        return
    predicts = read_json(scheduler).get("prediction_type", "epsilon")
    if predicts != prediction.kind:
        raise CheckpointError(
            f"is {prediction.title}, and the scheduler of {configs.folder} has "
            f"prediction_type {predicts}",
            hint=f"use a --config folder whose scheduler has prediction_type {prediction.kind}",
        )
