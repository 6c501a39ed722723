"""The models of a recipe with their headers read, every key understood."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from merge.errors import CheckpointError
from merge.expected import fit_to_config, squeezed
from merge.intake import Intake, reshaped, take_in, without
from merge.keymap import (
    LDM_UNET_PREFIX,
    UNetArchitecture,
    detect_unet,
    split_single_file,
    unknown_keys,
)
from merge.kinds import Prediction
from merge.layout import TensorCopy, fit_copies, plan_components
from merge.lora import is_lora
from merge.plan.model import LeftOut
from merge.plan.patterns import match_exclude
from merge.reader import Checkpoint, read_checkpoint
from merge.sources import ResolvedModel, SourceFile, Sources, opener_of

_UNET_CLASS = "UNet2DConditionModel"
# 1x1 convolutions, which some models of a family and some tools have as matrices.
_POINTWISE = (".proj_in.weight", ".proj_out.weight", ".conv_shortcut.weight")


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
        misfits: Where a target is not what its configs ask for.
    """

    model: ResolvedModel
    checkpoint: Checkpoint
    unet: UNetArchitecture | None
    text: Mapping[str, Checkpoint] = field(default_factory=dict)
    left_out: tuple[LeftOut, ...] = ()
    prediction: Prediction = field(default_factory=Prediction)
    relaid: Mapping[str, tuple[TensorCopy, ...]] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    misfits: tuple[str, ...] = ()

    @property
    def role(self) -> str:
        """Return the model's role."""
        return self.model.role

    @property
    def title(self) -> str:
        """Return the model's role and name, for messages."""
        return f"{self.model.role} ({self.model.label})"

    @property
    def is_lora(self) -> bool:
        """Return True for an adapter of any kind."""
        return is_lora(self.checkpoint.tensors)

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


def open_models(sources: Sources, exclude: Sequence[str]) -> OpenedSources:
    """Read the headers of every model.

    Tensors get the shapes that the target's config asks for, those of the others the target's,
    where only ones are between: a 1x1 convolution holds the numbers of a linear layer.

    Args:
        sources: The models.
        exclude: Patterns of keys that single files may hold beside what is known.

    Raises:
        CheckpointError: a file breaks its format, or a key of it cannot be understood.
    """
    target = _fitted(_open(sources.target, exclude))
    others = {
        model.role: _shaped_like(_open(model, exclude), target) for model in sources.models[1:]
    }
    return OpenedSources(
        target, others.get("base"), tuple(others[model.role] for model in sources.distilled)
    )


def _open(model: ResolvedModel, exclude: Sequence[str]) -> Opened:
    weights = read_weights(model, model.weights)
    is_adapter = is_lora(weights.checkpoint.tensors)
    names = weights.checkpoint.tensors
    if not is_adapter and any(name.startswith(LDM_UNET_PREFIX) for name in names):
        return _open_single_file(model, weights, exclude)
    texts = {name: read_weights(model, files) for name, files in model.text_encoders.items()}
    return Opened(
        model,
        weights.checkpoint,
        None if is_adapter else detect_unet(weights.checkpoint.shapes),
        {name: text.checkpoint for name, text in texts.items()},
        left_out_of(model, weights, *texts.values()),
        weights.prediction,
        warnings=weights.warnings,
    )


def read_weights(model: ResolvedModel, files: Sequence[SourceFile]) -> Intake:
    """Read the headers of a component's weights.

    Raises:
        CheckpointError: a file breaks its format, or a key of it cannot be understood.
    """
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


def left_out_of(model: ResolvedModel, *parts: Intake) -> tuple[LeftOut, ...]:
    """List what files hold besides tensors that count: markers, the state of a training."""
    found = []
    for part in parts:
        reasons = {**part.left_out, **dict(part.checkpoint.left_out)}
        found += [LeftOut(model.role, key, reasons[key]) for key in sorted(reasons)]
    return tuple(found)


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
        *left_out_of(model, weights),
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


def _fitted(target: Opened) -> Opened:
    """Give a target the shapes of its configs, and keep what does not fit for later."""
    model = target.model
    described = {part.name: part for part in (model.pipeline.components if model.pipeline else ())}
    with _naming(model):
        fit = fit_to_config("unet", target.checkpoint.shapes, model.config, _UNET_CLASS)
        unet = reshaped(target.checkpoint, fit.shapes)
        problems, notes = [*fit.problems], [*fit.notes]
        text = dict(target.text)
        for name, checkpoint in text.items():
            part = described[name]
            fit = fit_to_config(name, checkpoint.shapes, part.config, part.class_name)
            text[name] = reshaped(checkpoint, fit.shapes)
            problems, notes = [*problems, *fit.problems], [*notes, *fit.notes]
        relaid = dict(target.relaid)
        for name in relaid.keys() & described.keys():
            part = described[name]
            relaid[name], fit = fit_copies(name, relaid[name], part.config, part.class_name)
            problems, notes = [*problems, *fit.problems], [*notes, *fit.notes]
    return replace(
        target,
        checkpoint=unet,
        unet=None if target.unet is None else detect_unet(unet.shapes),
        text=text,
        relaid=relaid,
        warnings=(*target.warnings, *notes),
        misfits=tuple(problems),
    )


def _shaped_like(opened: Opened, target: Opened) -> Opened:
    """Give the tensors of a full model the target's shapes, where the numbers are the same."""
    if opened.unet is None or target.unet is None or opened.unet.context != target.unet.context:
        return opened
    ours, theirs = target.checkpoint.shapes, opened.checkpoint.shapes
    shapes = {
        key: ours[key]
        for key, shape in theirs.items()
        if key.endswith(_POINTWISE) and key in ours and shape != ours[key]
        if squeezed(shape) == squeezed(ours[key])
    }
    if not shapes:
        return opened
    checkpoint = reshaped(opened.checkpoint, shapes)
    return replace(opened, checkpoint=checkpoint, unet=detect_unet(checkpoint.shapes))
