"""Whether models can be merged at all: architecture, parameterisation, roles."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from merge.errors import CheckpointError, PlanError
from merge.family.foreign import foreign_lora
from merge.family.registry import FAMILIES
from merge.lora.roles import down_factors, has_magnitudes, is_lora
from merge.plan.opening import Opened, OpenedSources, open_models
from merge.reader.kinds.foreign import foreign_kind, is_controlnet
from merge.reader.kinds.prediction import EDM
from merge.sources.model import Sources

WHOLE_HINT = (
    "loaders draw a missing weight anew every time, so that no two edits agree; take a whole "
    "file, or the configs that belong to this one"
)


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
        CheckpointError: a file breaks its format, or the target is not whole.
        PlanError: the models do not belong together.
    """
    result = open_models(sources, exclude)
    problems = [
        *_check_kinds(result),
        *_check_roles(result),
        *_check_families(result),
        *_check_predictions(result, prediction_type),
    ]
    if problems:
        raise PlanError("these models cannot be merged:", problems)
    if misfits := result.target.misfits:
        raise CheckpointError(
            "\n  ".join([f"{result.target.title} is not whole, or not of its configs:", *misfits]),
            hint=WHOLE_HINT,
        )
    return result


def _check_kinds(sources: OpenedSources) -> list[str]:
    problems = []
    found = sources.target.found
    family = found.family if found is not None else FAMILIES[-1]
    main = family.main.title
    for opened in sources.models:
        names = opened.checkpoint.tensors
        if opened.prediction.kind == EDM:
            problems.append(
                f"{opened.title} is {opened.prediction.title}; the delta of an epsilon model means "
                "something else there"
            )
        elif opened.found is not None and not is_controlnet(names):
            continue
        elif kind := foreign_kind(opened.checkpoint.shapes):
            problems.append(f"{opened.title} is no {main} and no LoRA: it is {kind}")
        elif not is_lora(names):
            shown = ", ".join(sorted(names)[:3]) or "no tensors"
            problems.append(
                f"{opened.title} is no {main} with diffusers keys: it has no {family.sign} "
                f"(it has {shown})"
            )
        elif opened.role in ("target", "base"):
            problems.append(f"{opened.title} is a LoRA, and must be a whole {main}")
    return problems


def _check_roles(sources: OpenedSources) -> list[str]:
    problems = []
    for opened in sources.distilled:
        if opened.found is not None and sources.base is None:
            problems.append(
                f"{opened.title} is a full {opened.found.family.main.title}: name the model that "
                "it was distilled from as models.base"
            )
            break
    are_adapters = all(opened.is_lora for opened in sources.distilled)
    if are_adapters and sources.base is not None and not any(map(_is_dora, sources.distilled)):
        problems.append(
            "every distilled model is a LoRA, which needs no base: set models.base=null"
        )
    target = sources.target
    return [*problems, *_check_single_file(target), *_check_channels(target)]


def _check_channels(target: Opened) -> Iterator[str]:
    """Compare a target's input channels with those of an editor, and with its config."""
    if target.found is None or (widening := target.found.family.widening) is None:
        return
    channels, title = target.found.in_channels, target.found.family.main.title
    if channels != widening.edit_channels:
        yield (
            f"{target.title} has {channels} input channels; an InstructPix2Pix {title} has "
            f"{widening.edit_channels} (are target and base swapped?)"
        )
    declared = (target.model.config or {}).get("in_channels")
    if target.model.pipeline is not None and declared not in (None, channels):
        yield (
            f"{target.title}: its config says in_channels {declared}, its {widening.key} has "
            f"{channels}"
        )


def _check_single_file(target: Opened) -> list[str]:
    """Compare what a target's single file holds with the pipeline that its config describes."""
    if not target.relaid or target.found is None:
        return []
    label = target.title
    if target.model.pipeline is None:
        what = "is a whole single file, which holds no tokenizers and configs"
        return [f"{label} {what}: name a pipeline that has them as models.target.config"]
    described = {part.name for part in target.model.pipeline.components}
    where = target.model.config_label
    return [
        *(
            f"{label} has no {name}, and its config ({where}) describes one"
            for name in (part.name for part in target.found.family.components)
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
    target, shapes = sources.target.found, sources.target.checkpoint.shapes
    if target is None:
        return []
    problems = []
    for opened in sources.models[1:]:
        other = opened.found
        if opened.is_lora:
            theirs = opened.checkpoint.shapes
            line = foreign_lora(theirs, down_factors(theirs), shapes, target.family)
            problems += [f"{opened.title}: {line}"] if line else []
        if other is None or other.family == target.family:
            continue
        problems.append(
            f"{opened.title} is {other.family.title} (cross-attention width {other.context}) and "
            f"the target is {target.family.title} ({target.context}): a delta fits only the "
            "architecture it was made for"
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
        label = opened.title
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
        title = sources.family.main.title
        notes.append(
            f"the target is only a {title}: the output is a {title} folder, and no edit can "
            "prove it"
        )
    return notes
