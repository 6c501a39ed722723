"""Build a plan: rows for the output, reasons for what is left out, problems all at once."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from merge.errors import PlanError
from merge.family.model import Family
from merge.family.modelspec import modelspec
from merge.header.encode import encode_header
from merge.methods.table import METHODS
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
from merge.sources.model import Sources
from merge.writer.copies.model import TensorCopy


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
    found = builder.found
    problems = [*found.problems, *_check_output(recipe, opened)]
    if problems:
        raise PlanError(
            "the models of this recipe do not fit together:",
            problems,
            hint="a key that may stay as it is in the target can be listed under `exclude`",
        )
    family = opened.family
    components = tuple(
        _component(family, name, rows, _metadata(recipe, opened, name))
        for name, rows in builder.by_component().items()
    )
    copied = read_copied(opened.target, [part.name for part in components])
    relaid = {_file_name(family, name): copies for name, copies in opened.target.relaid.items()}
    relaid |= copied.relaid
    copy_bytes = _copy_bytes(sources, components, relaid) + _relaid_bytes(relaid)
    merged_bytes = sum(part.out_header.file_bytes for part in components)
    return MergePlan(
        recipe=recipe.name,
        method=recipe.method,
        params=METHODS[recipe.method].fill(recipe.params),
        family=family,
        files=tuple(builder.inputs.files),
        components=components,
        merged=builder.components,
        left_out=(*found.left_out, *copied.left_out),
        notes=(*describe_roles(opened), *found.notes),
        warnings=(*_warnings(opened), *copied.warnings, *found.warnings),
        relaid=relaid,
        copy_bytes=copy_bytes,
        single_file_bytes=merged_bytes + copy_bytes if recipe.output.single_file else 0,
    )


def _warnings(opened: OpenedSources) -> list[str]:
    return [f"{model.title}: {line}" for model in opened.models for line in model.warnings]


def _file_name(family: Family, component: str) -> str:
    """Return the place of a component's weights in an export."""
    part = family.component(component)
    assert part is not None
    return part.file_name


def _component(
    family: Family, name: str, rows: list[TensorPlan], metadata: Mapping[str, str]
) -> ComponentPlan:
    layout = {row.key: (row.dtype_out, row.target.shape) for row in rows}
    _, header = encode_header(layout, metadata)
    by_key = {row.key: row for row in rows}
    tensors = tuple(by_key[spec.name] for spec in header.tensors)
    return ComponentPlan(name, _file_name(family, name), tensors, header, metadata)


def _check_output(recipe: Recipe, opened: OpenedSources) -> list[str]:
    family = opened.family
    if not recipe.output.single_file:
        return []
    if opened.target.model.pipeline is None:
        what = f"the target is only a {family.main.title}, and a single file needs a VAE and text "
        return [f"output.single_file: {what}encoders too"]
    if family.single_file is None:
        return [f"output.single_file: {family.title} has no single-file form here"]
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
    common = {"format": "pt", DIGEST_KEY: DIGEST_PLACEHOLDER}
    if component != opened.family.main.name:
        return common
    size = recipe.verify.resolution
    return {
        **common,
        **modelspec(
            opened.family,
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
