"""Whether models can be merged at all: architecture, parameterisation, roles."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from merge.errors import CheckpointError, PlanError
from merge.intake import Intake, take_in, without
from merge.keymap import (
    LDM_UNET_PREFIX,
    UNetArchitecture,
    detect_unet,
    split_single_file,
    unknown_keys,
)
from merge.kinds import EDM, Prediction
from merge.layout import TensorCopy, copies_of, plan_components
from merge.lora import has_magnitudes, is_lora
from merge.plan.model import LeftOut
from merge.plan.patterns import match_exclude
from merge.reader import Checkpoint, read_checkpoint
from merge.sources import ResolvedModel, SourceFile, Sources, opener_of

# Components that a single file holds beside the UNet.
_IN_SINGLE_FILES = ("vae", "text_encoder", "text_encoder_2")


@dataclass(frozen=True, slots=True)
class Opened:
    """A model and the headers of its weights.

    Attributes:
        model: Its files.
        checkpoint: The tensors of its UNet under diffusers keys, or of a LoRA under its own.
        unet: Its architecture; None for a LoRA.
        text: The tensors of its text encoders by component, where they could be merged.
        left_out: Keys of its files that belong to none of these, each with its reason.
        prediction: What its files say that it predicts.
        relaid: For a target in a single file, its other components under a folder's names.
        warnings: What a user should decide.
    """

    model: ResolvedModel
    checkpoint: Checkpoint
    unet: UNetArchitecture | None
    text: Mapping[str, Checkpoint] = field(default_factory=dict)
    left_out: tuple[LeftOut, ...] = ()
    prediction: Prediction = field(default_factory=Prediction)
    relaid: Mapping[str, tuple[TensorCopy, ...]] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    @property
    def role(self) -> str:
        """Return the model's role."""
        return self.model.role

    @property
    def title(self) -> str:
        """Return the model's role and name, for messages."""
        return f"{self.model.role} ({self.model.label})"

    def component(self, name: str) -> Checkpoint | None:
        """Return the tensors of a component, or None when the model does not have it."""
        return self.checkpoint if name == "unet" else self.text.get(name)


@dataclass(frozen=True, slots=True)
class OpenedSources:
    """All models of a recipe with their headers read and found compatible."""

    target: Opened
    base: Opened | None
    distilled: tuple[Opened, ...]

    @property
    def models(self) -> tuple[Opened, ...]:
        """Return target, base if there is one, then distilled."""
        base = (self.base,) if self.base is not None else ()
        return (self.target, *base, *self.distilled)


def open_sources(
    sources: Sources, prediction_type: str = "epsilon", exclude: Sequence[str] = ()
) -> OpenedSources:
    """Read every header and refuse what cannot be merged, with the reason.

    Args:
        sources: The models.
        exclude: Patterns of keys that single files may hold beside what is known.
        prediction_type: What all of them predict, as the recipe says. UNet folders and LoRAs do
            not tell, and nearly all few-step distillations predict epsilon.

    Raises:
        CheckpointError: a file breaks its format.
        PlanError: the models do not belong together.
    """
    opened = {model.role: _open(model, exclude) for model in sources.models}
    result = OpenedSources(
        opened["target"],
        opened.get("base"),
        tuple(opened[model.role] for model in sources.distilled),
    )
    problems = [
        *_check_kinds(result),
        *_check_roles(result),
        *_check_families(result),
        *_check_predictions(result, prediction_type),
    ]
    if problems:
        raise PlanError("these models cannot be merged:", problems)
    return result


def _open(model: ResolvedModel, exclude: Sequence[str]) -> Opened:
    weights = _read(model, model.weights)
    is_adapter = is_lora(weights.checkpoint.tensors)
    names = weights.checkpoint.tensors
    if not is_adapter and any(name.startswith(LDM_UNET_PREFIX) for name in names):
        return _open_single_file(model, weights, exclude)
    texts = {name: _read(model, files) for name, files in model.text_encoders.items()}
    return Opened(
        model,
        weights.checkpoint,
        None if is_adapter else detect_unet(weights.checkpoint.shapes),
        {name: text.checkpoint for name, text in texts.items()},
        _left_out_of(model, weights, *texts.values()),
        weights.prediction,
        warnings=weights.warnings,
    )


def _read(model: ResolvedModel, files: Sequence[SourceFile]) -> Intake:
    paths = [file.path for file in files]
    checkpoint = read_checkpoint(
        paths, allow_pickle=model.allow_pickle, opener=opener_of(files, model.role)
    )
    with _naming(model):
        return take_in(checkpoint, model.ema)


@contextmanager
def _naming(model: ResolvedModel) -> Iterator[None]:
    """Say of which model an error is."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(
            f"{model.role} ({model.label}): {error.message}", hint=error.hint
        ) from None


def _left_out_of(model: ResolvedModel, *parts: Intake) -> tuple[LeftOut, ...]:
    """List what files hold besides tensors that count: markers, the state of a training."""
    found = []
    for part in parts:
        reasons = {**part.left_out, **dict(part.checkpoint.left_out)}
        found += [LeftOut(model.role, key, reasons[key]) for key in sorted(reasons)]
    return tuple(found)


def read_converted(
    target: ResolvedModel, merged: Collection[str]
) -> tuple[dict[str, tuple[TensorCopy, ...]], tuple[LeftOut, ...]]:
    """Read the headers of pickles that an export converts, since pickles are never copied.

    Args:
        target: The model whose components are exported.
        merged: Components whose weights are written by the merge.

    Returns:
        Weight file of the export to its tensors, and what these pickles hold besides tensors.

    Raises:
        CheckpointError: a pickle cannot be read; better now than after the merge.
    """
    parts = target.pipeline.components if target.pipeline is not None else ()
    found = {
        part.converted_name: _read(target, part.weights)
        for part in parts
        if part.converted_name and part.name not in merged
    }
    copies = {name: tuple(copies_of(part.checkpoint)) for name, part in found.items()}
    return copies, _left_out_of(target, *found.values())


def _open_single_file(model: ResolvedModel, weights: Intake, exclude: Sequence[str]) -> Opened:
    """Give an LDM/SGM file's UNet its diffusers keys, and a reason for every other key."""
    checkpoint = weights.checkpoint
    with _naming(model):
        excluded = {
            name: f"excluded by {pattern!r}"
            for name in unknown_keys(checkpoint.tensors)
            if (pattern := match_exclude(name, exclude))
        }
        checkpoint = without(checkpoint, excluded)
        parts = split_single_file(checkpoint.tensors)
        relayout = plan_components(checkpoint) if model.role == "target" else None
    names = parts.unet
    unet = replace(
        checkpoint,
        tensors={key: checkpoint.tensors[name] for name, key in names.items()},
        scales={names[n]: place for n, place in checkpoint.scales.items() if n in names},
    )
    reasons = {**parts.left_out, **excluded}
    relaid = {}
    if relayout is not None:
        relaid = {name: copies for name, copies in relayout.copies.items() if name != "unet"}
    else:
        others = (pair for name, pairs in parts.pairs.items() if name != "unet" for pair in pairs)
        reasons |= {pair.single: "not the UNet, which alone is merged" for pair in others}
    left_out = (
        *(LeftOut(model.role, name, reasons[name]) for name in sorted(reasons)),
        *_left_out_of(model, weights),
    )
    return Opened(
        model,
        unet,
        detect_unet(unet.shapes),
        {},
        left_out,
        weights.prediction,
        relaid,
        weights.warnings,
    )


def _check_kinds(sources: OpenedSources) -> list[str]:
    problems = []
    for opened in sources.models:
        names = opened.checkpoint.tensors
        if opened.prediction.kind == EDM:
            problems.append(
                f"{opened.title} is {opened.prediction.title}; the delta of an epsilon model means "
                "something else there"
            )
        elif opened.unet is not None:
            continue
        elif not is_lora(names):
            shown = ", ".join(sorted(names)[:3]) or "no tensors"
            problems.append(
                f"{opened.role} ({opened.model.label}) is no UNet with diffusers keys: it has no "
                f"conv_in.weight of rank 4 (it has {shown})"
            )
        elif opened.role in ("target", "base"):
            problems.append(
                f"{opened.role} ({opened.model.label}) is a LoRA, and must be a whole UNet"
            )
    return problems


def _check_roles(sources: OpenedSources) -> list[str]:
    problems = []
    full = [opened for opened in sources.distilled if not is_lora(opened.checkpoint.tensors)]
    if full and sources.base is None:
        problems.append(
            f"{full[0].role} ({full[0].model.label}) is a full UNet: name the model that it was "
            "distilled from as models.base"
        )
    if not full and sources.base is not None and not any(map(_is_dora, sources.distilled)):
        problems.append(
            "every distilled model is a LoRA, which needs no base: set models.base=null"
        )
    target = sources.target
    problems += _check_single_file(target)
    if target.unet is not None:
        channels = target.unet.in_channels
        if channels != 8:
            problems.append(
                f"target ({target.model.label}) has {channels} input channels; an InstructPix2Pix "
                "UNet has 8 (are target and base swapped?)"
            )
        declared = (target.model.config or {}).get("in_channels")
        if declared is not None and declared != channels:
            problems.append(
                f"target ({target.model.label}): its config says in_channels {declared}, its "
                f"conv_in.weight has {channels}"
            )
    return problems


def _check_single_file(target: Opened) -> list[str]:
    """Compare what a target's single file holds with the pipeline that its config describes."""
    label = f"target ({target.model.label})"
    if not target.relaid:
        return []
    if target.model.pipeline is None:
        what = "is a whole single file, which holds no tokenizers and configs"
        return [f"{label} {what}: name a pipeline that has them as models.target.config"]
    described = {part.name for part in target.model.pipeline.components}
    where = target.model.config_label
    return [
        *(
            f"{label} has no {name}, and its config ({where}) describes one"
            for name in _IN_SINGLE_FILES
            if name in described and name not in target.relaid
        ),
        *(
            f"{label} has a {name}, and its config ({where}) describes none"
            for name in target.relaid
            if name not in described
        ),
    ]


def _is_dora(opened: Opened) -> bool:
    # Only relative to the model that it was trained on is DoRA an additive delta.
    return has_magnitudes(opened.checkpoint.tensors)


def _check_families(sources: OpenedSources) -> list[str]:
    target = sources.target.unet
    if target is None:
        return []
    problems = []
    for opened in sources.models[1:]:
        unet = opened.unet
        if unet is None or unet.family == target.family:
            continue
        problems.append(
            f"{opened.role} ({opened.model.label}) is {unet.title} (cross-attention width "
            f"{unet.context}) and the target is {target.title} ({target.context}): a delta fits "
            "only the architecture it was made for"
        )
    return problems


def _check_predictions(sources: OpenedSources, prediction_type: str) -> list[str]:
    problems = []
    for opened in sources.models:
        stated = opened.prediction
        if stated.kind not in ("", EDM, prediction_type):
            problems.append(
                f"{opened.title} is {stated.title}, and not an {prediction_type} one: all models "
                f"of a merge must predict the same, and scheduler.config.prediction_type says what"
            )
            continue
        scheduler = opened.model.scheduler
        if scheduler is None:
            continue
        name = str(scheduler.get("_class_name", ""))
        predicts = scheduler.get("prediction_type", "epsilon")
        label = f"{opened.role} ({opened.model.label})"
        if name.startswith("EDM"):
            problems.append(
                f"{label} is no {prediction_type} model: its scheduler is {name}; "
                "LCM and Turbo deltas belong to epsilon models"
            )
        elif predicts != prediction_type:
            problems.append(
                f"{label} is no {prediction_type} model: its scheduler predicts {predicts}; LCM "
                "and Turbo deltas belong to epsilon models, and one that was distilled from such "
                f"a model needs scheduler.config.prediction_type={predicts}"
            )
    return problems


def describe_roles(sources: OpenedSources) -> Sequence[str]:
    """Return notes on roles that are legal and unusual."""
    notes = []
    target = sources.target
    if target.model.pipeline is None:
        notes.append(
            "the target is only a UNet: the output is a UNet folder, and no edit can prove it"
        )
    return notes
