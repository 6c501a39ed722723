"""The files of an export around the merged weights, as a plan of copies and small JSON files.

Every component but the main one and the scheduler is the target's, byte for byte. JSON that has to
change is written sorted, with the target's `_diffusers_version` kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from merge.disclosure.portable import blank_file, blank_places, describe_blank, is_config
from merge.family.model import Family
from merge.json_files import json_bytes
from merge.plan.model import MergePlan
from merge.recipe.schema import Recipe, SchedulerSpec
from merge.sources.model import ResolvedModel, SourceFile


@dataclass(frozen=True, slots=True)
class ExportFiles:
    """What an export holds besides the merged weights.

    Attributes:
        copies: Name in the export to the file that is copied there.
        written: Name in the export to bytes that we write.
        warnings: What is written otherwise than the target has it, a line each.
    """

    copies: Mapping[str, SourceFile]
    written: Mapping[str, bytes]
    warnings: tuple[str, ...] = ()


def plan_export(recipe: Recipe, plan: MergePlan, target: ResolvedModel) -> ExportFiles:
    """Decide every file of the output folder but the merged weights and the records.

    Args:
        recipe: For its scheduler.
        plan: For the architecture, and for what is written anew.
        target: Whose components are exported; a bare network gives its folder only.
    """
    written: dict[str, bytes] = {}
    warnings: list[str] = []

    def write(name: str, tree: Mapping[str, Any]) -> None:
        blank, fields = blank_places(tree)
        if fields:
            warnings.append(describe_blank(name, fields))
        written[name] = json_bytes(blank)

    family = plan.family
    if target.config is not None:
        write(family.main.config_name, {**target.config, **family.config_changes})
    pipeline = target.pipeline
    if pipeline is None:
        return ExportFiles({}, written, tuple(warnings))
    index = dict(pipeline.model_index)
    index["_class_name"] = family.pipeline_class
    index["scheduler"] = ["diffusers", recipe.scheduler.class_name]
    write("model_index.json", index)
    write("scheduler/scheduler_config.json", exported_scheduler(recipe, family, target))
    written_anew = {component.name for component in plan.components}
    written_anew |= {name.partition("/")[0] for name in plan.relaid}
    copies: dict[str, SourceFile] = {}
    for part in pipeline.components:
        copies |= part.companions if part.name in written_anew else part.copies
    for name, file in list(copies.items()):
        if is_config(name, file.size_bytes):
            blank, fields = blank_file(file.path.read_bytes())
            if fields:
                del copies[name]
                written[name] = json_bytes(blank)
                warnings.append(describe_blank(name, fields))
    return ExportFiles(copies, written, tuple(warnings))


def exported_scheduler(recipe: Recipe, family: Family, target: ResolvedModel) -> dict[str, Any]:
    """Return the scheduler config that an export of a whole pipeline has."""
    version = target.pipeline.model_index.get("_diffusers_version") if target.pipeline else None
    kept = family.scheduler_keys
    return scheduler_config(recipe.scheduler, target.scheduler or {}, version, kept)


def scheduler_config(
    spec: SchedulerSpec, target: Mapping[str, Any], version: str | None, kept: Sequence[str]
) -> dict[str, Any]:
    """Return the exported scheduler's config: the target's noise schedule in the new class.

    Args:
        spec: The recipe's class and the values that it sets.
        target: The target's scheduler config.
        version: `_diffusers_version` for a target that states none of its own.
        kept: Keys that another class takes from the target's.
    """
    if target.get("_class_name") == spec.class_name:
        config = dict(target)
    else:
        config = {key: target[key] for key in kept if key in target}
    config.setdefault("prediction_type", "epsilon")
    config["_class_name"] = spec.class_name
    stated = target.get("_diffusers_version", version)
    if stated is not None:
        config["_diffusers_version"] = stated
    config.update(spec.config)
    return config
