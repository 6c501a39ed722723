"""Build a plan: rows for the output, reasons for what is left out, problems all at once."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from merge.errors import PlanError
from merge.header import encode_header
from merge.layout import TensorCopy
from merge.methods import METHODS
from merge.modelspec import modelspec
from merge.plan.compat import describe_roles, open_sources
from merge.plan.copied import read_copied
from merge.plan.model import (
    DIGEST_KEY,
    DIGEST_PLACEHOLDER,
    ComponentPlan,
    MergePlan,
    TensorPlan,
)
from merge.plan.opening import OpenedSources
from merge.plan.rows import RowBuilder
from merge.recipe.schema import Recipe
from merge.sources import Sources

WEIGHT_FILES = {
    "unet": "unet/diffusion_pytorch_model.safetensors",
    "text_encoder": "text_encoder/model.safetensors",
    "text_encoder_2": "text_encoder_2/model.safetensors",
    "vae": "vae/diffusion_pytorch_model.safetensors",
}
_SINGLE_FILE_FAMILIES = ("sd15", "sdxl")


def build_plan(recipe: Recipe, sources: Sources) -> MergePlan:
    """Decide every output tensor before any weight is read.

    Reads headers, and scalars such as a LoRA's alpha.

    Args:
        recipe: A checked recipe.
        sources: Its models' files.

    Raises:
        CheckpointError: a weight file breaks its format.
        PlanError: keys, shapes, architectures or dtypes do not fit; all problems together.
    """
    opened = open_sources(sources, _prediction_type(recipe), recipe.exclude)
    builder = RowBuilder(recipe, opened)
    builder.run()
    problems = [*builder.problems, *_check_output(recipe, opened)]
    if problems:
        raise PlanError(
            "the models of this recipe do not fit together:",
            problems,
            hint="a key that may stay as it is in the target can be listed under `exclude`",
        )
    assert opened.target.unet is not None
    components = tuple(
        _component(name, rows, _metadata(recipe, opened, name))
        for name, rows in builder.by_component().items()
    )
    copied = read_copied(opened.target, [part.name for part in components])
    relaid = {WEIGHT_FILES[name]: copies for name, copies in opened.target.relaid.items()}
    relaid |= copied.relaid
    copy_bytes = _copy_bytes(sources, components, relaid) + _relaid_bytes(relaid)
    merged_bytes = sum(part.out_header.file_bytes for part in components)
    return MergePlan(
        recipe=recipe.name,
        method=recipe.method,
        params=METHODS[recipe.method].fill(recipe.params),
        architecture=opened.target.unet.family,
        files=tuple(builder.inputs.files),
        components=components,
        left_out=(*builder.left_out, *copied.left_out),
        notes=(*describe_roles(opened), *builder.notes),
        warnings=(*_warnings(opened), *copied.warnings, *builder.warnings),
        relaid=relaid,
        copy_bytes=copy_bytes,
        single_file_bytes=merged_bytes + copy_bytes if recipe.output.single_file else 0,
    )


def _warnings(opened: OpenedSources) -> list[str]:
    return [f"{model.title}: {line}" for model in opened.models for line in model.warnings]


def _component(name: str, rows: list[TensorPlan], metadata: Mapping[str, str]) -> ComponentPlan:
    layout = {row.key: (row.dtype_out, row.target.shape) for row in rows}
    _, header = encode_header(layout, metadata)
    by_key = {row.key: row for row in rows}
    tensors = tuple(by_key[spec.name] for spec in header.tensors)
    return ComponentPlan(name, WEIGHT_FILES[name], tensors, header, metadata)


def _check_output(recipe: Recipe, opened: OpenedSources) -> list[str]:
    unet = opened.target.unet
    if not recipe.output.single_file or unet is None:
        return []
    if opened.target.model.pipeline is None:
        what = "the target is only a UNet, and a single file needs a VAE and text encoders too"
        return [f"output.single_file: {what}"]
    if unet.family not in _SINGLE_FILE_FAMILIES:
        return [f"output.single_file: {unet.title} has no single-file form here"]
    return []


def _copy_bytes(
    sources: Sources, components: tuple[ComponentPlan, ...], relaid: Collection[str]
) -> int:
    pipeline = sources.target.pipeline
    if pipeline is None:
        return 0
    written = {part.name for part in components} | {name.partition("/")[0] for name in relaid}
    files = [
        file
        for part in pipeline.components
        for file in (part.companions if part.name in written else part.copies).values()
    ]
    return sum(file.size_bytes for file in files)


def _relaid_bytes(relaid: Mapping[str, Sequence[TensorCopy]]) -> int:
    pieces = (piece for copies in relaid.values() for copy in copies for piece in copy.pieces)
    return sum(piece.out_bytes for piece in pieces)


def _metadata(recipe: Recipe, opened: OpenedSources, component: str) -> dict[str, str]:
    """Return the strings of an output's header."""
    assert opened.target.unet is not None
    common = {"format": "pt", DIGEST_KEY: DIGEST_PLACEHOLDER}
    if component != "unet":
        return common
    size = recipe.verify.resolution
    return {
        **common,
        **modelspec(
            opened.target.unet.family,
            is_edit=True,
            implementation="diffusers",
            title=recipe.name,
            prediction_type=_prediction_type(recipe),
        ),
        "modelspec.resolution": f"{size}x{size}",
        "modelspec.merged_from": ",".join(parent.model.label for parent in opened.models),
    }


def _prediction_type(recipe: Recipe) -> str:
    return str(recipe.scheduler.config.get("prediction_type", "epsilon"))
