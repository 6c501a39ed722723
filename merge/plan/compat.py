"""Whether models can be merged at all: architecture, parameterisation, roles."""

from __future__ import annotations

from collections.abc import Sequence

from merge.errors import CheckpointError, PlanError
from merge.kinds import EDM, foreign_kind, is_controlnet
from merge.lora import foreign_family, has_magnitudes, is_lora
from merge.plan.opening import Opened, OpenedSources, open_models
from merge.sources import Sources

# Components that a single file holds beside the UNet.
_IN_SINGLE_FILES = ("vae", "text_encoder", "text_encoder_2")
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
    for opened in sources.models:
        names = opened.checkpoint.tensors
        if opened.prediction.kind == EDM:
            problems.append(
                f"{opened.title} is {opened.prediction.title}; the delta of an epsilon model means "
                "something else there"
            )
        elif opened.unet is not None and not is_controlnet(names):
            continue
        elif kind := foreign_kind(opened.checkpoint.shapes):
            problems.append(f"{opened.title} is no UNet and no LoRA: it is {kind}")
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
    full = [opened for opened in sources.distilled if opened.unet is not None]
    if full and sources.base is None:
        problems.append(
            f"{full[0].role} ({full[0].model.label}) is a full UNet: name the model that it was "
            "distilled from as models.base"
        )
    are_adapters = all(opened.is_lora for opened in sources.distilled)
    if are_adapters and sources.base is not None and not any(map(_is_dora, sources.distilled)):
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
        is_whole = target.model.pipeline is not None
        if is_whole and declared is not None and declared != channels:
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
        if opened.is_lora:
            line = foreign_family(opened.checkpoint.shapes, sources.target.checkpoint.shapes)
            problems += [f"{opened.title}: {line}"] if line else []
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
