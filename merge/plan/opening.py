"""The models of a recipe with their headers read, every key understood."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from merge.errors import CheckpointError
from merge.family.expected.compare import squeezed
from merge.family.expected.fit import fit_to_config
from merge.family.keys.single_file import is_single_file, split_single_file, unknown_keys
from merge.family.model import Family, Recognised
from merge.family.registry import component_named, recognise
from merge.lora.roles import is_lora
from merge.plan.model import LeftOut
from merge.plan.patterns import match_exclude
from merge.reader.checkpoint import Checkpoint, read_checkpoint
from merge.reader.intake import Intake, reshaped, take_in, without
from merge.reader.kinds.prediction import Prediction
from merge.sources.model import ResolvedModel, SourceFile, Sources
from merge.sources.ranged import opener_of
from merge.writer.copies.fit import fit_copies
from merge.writer.copies.model import TensorCopy
from merge.writer.copies.single_file import plan_components


@dataclass(frozen=True, slots=True)
class Opened:
    """A model and the headers of its weights.

    Attributes:
        model: Its files.
        parts: Component to its tensors under their own keys, the main component's first; one entry
            without a name for a LoRA, and for what belongs to no known architecture.
        found: What its main component is; None for a LoRA.
        left_out: Keys of its files that belong to none of these, each with its reason.
        prediction: What its files say that it predicts.
        relaid: For a target in a single file, its other components under a folder's names.
        warnings: What a user should decide.
        misfits: Where a target is not what its configs ask for.
    """

    model: ResolvedModel
    parts: Mapping[str, Checkpoint]
    found: Recognised | None
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
    def checkpoint(self) -> Checkpoint:
        """Return the tensors of the main component, or of a LoRA."""
        return next(iter(self.parts.values()))

    @property
    def is_lora(self) -> bool:
        """Return True for an adapter of any kind."""
        return is_lora(self.checkpoint.tensors)


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

    @property
    def family(self) -> Family:
        """Return the target's architecture; of models that were found compatible."""
        assert self.target.found is not None
        return self.target.found.family


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
    first = read_weights(model, model.main_files)
    names = first.checkpoint.tensors
    if not is_lora(names) and is_single_file(names):
        return _open_single_file(model, first, exclude)
    found = None if is_lora(names) else recognise(first.checkpoint.shapes)
    main = found.family.main.name if found is not None else ""
    _, *named = model.weights.items()
    # A LoRA is all of its model, whatever lies beside it.
    others = {} if is_lora(names) else {name: read_weights(model, files) for name, files in named}
    return Opened(
        model,
        {main: first.checkpoint, **{name: part.checkpoint for name, part in others.items()}},
        found,
        left_out_of(model, first, *others.values()),
        first.prediction,
        warnings=first.warnings,
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
    """Give a single file's main component its own keys, and a reason for every other key."""
    checkpoint = weights.checkpoint
    with _naming(model):
        excluded = {
            name: f"excluded by {pattern!r}"
            for name in unknown_keys(checkpoint.tensors)
            if (pattern := match_exclude(name, exclude))
        }
        checkpoint = without(checkpoint, excluded)
        split = split_single_file(checkpoint.tensors)
        relayout = plan_components(checkpoint) if model.role == "target" else None
    main = next(iter(split.pairs))
    names = split.names(main)
    part = replace(
        checkpoint,
        tensors={key: checkpoint.tensors[name] for name, key in names.items()},
        scales={names[n]: place for n, place in checkpoint.scales.items() if n in names},
    )
    reasons = {**split.left_out, **excluded}
    relaid = {}
    if relayout is not None:
        relaid = {name: copies for name, copies in relayout.copies.items() if name != main}
    else:
        component = component_named(main)
        assert component is not None
        others = (pair for name, pairs in split.pairs.items() if name != main for pair in pairs)
        what = f"not the {component.title}, which alone is merged"
        reasons |= {pair.single: what for pair in others}
    left_out = (
        *(LeftOut(model.role, name, reasons[name]) for name in sorted(reasons)),
        *left_out_of(model, weights),
    )
    found = recognise(part.shapes)
    return Opened(
        model, {main: part}, found, left_out, weights.prediction, relaid, weights.warnings
    )


def _fitted(target: Opened) -> Opened:
    """Give a target the shapes of its configs, and keep what does not fit for later."""
    if target.found is None:
        return target
    model, main = target.model, target.found.family.main
    pipeline = model.pipeline.components if model.pipeline is not None else ()
    described = {part.name: (part.config, part.class_name) for part in pipeline}
    described[main.name] = (model.config, main.class_name)
    problems: list[str] = []
    notes: list[str] = []
    parts, relaid = dict(target.parts), dict(target.relaid)
    with _naming(model):
        for name, part in parts.items():
            fit = fit_to_config(name, part.shapes, *described[name])
            parts[name] = reshaped(part, fit.shapes)
            problems, notes = [*problems, *fit.problems], [*notes, *fit.notes]
        for name in (name for name in target.relaid if name in described):
            relaid[name], fit = fit_copies(name, relaid[name], *described[name])
            problems, notes = [*problems, *fit.problems], [*notes, *fit.notes]
    return replace(
        target,
        parts=parts,
        found=recognise(parts[main.name].shapes),
        relaid=relaid,
        warnings=(*target.warnings, *notes),
        misfits=tuple(problems),
    )


def _shaped_like(opened: Opened, target: Opened) -> Opened:
    """Give the tensors of a full model the target's shapes, where the numbers are the same."""
    ours, theirs = target.found, opened.found
    if ours is None or theirs is None or ours.context != theirs.context:
        return opened
    wanted = target.checkpoint.shapes
    shapes = {
        key: wanted[key]
        for key, shape in opened.checkpoint.shapes.items()
        if key.endswith(ours.family.pointwise) and key in wanted and shape != wanted[key]
        if squeezed(shape) == squeezed(wanted[key])
    }
    if not shapes:
        return opened
    part = reshaped(opened.checkpoint, shapes)
    parts = {**opened.parts, theirs.family.main.name: part}
    return replace(opened, parts=parts, found=recognise(part.shapes))
