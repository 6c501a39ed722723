"""The files of an export around the merged weights, as a plan of copies and small JSON files.

Every component but the UNet and the scheduler is the target's, byte for byte. JSON that has to
change is written sorted, with the target's `_diffusers_version` kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from merge.manifest import json_bytes
from merge.plan import MergePlan
from merge.portable import blank_file, blank_places, describe_blank, is_config
from merge.recipe import Recipe, SchedulerSpec
from merge.sources import ResolvedModel, SourceFile

WEIGHTS_NAME = "unet/diffusion_pytorch_model.safetensors"
PIPELINE_CLASSES = {
    "sd15": "StableDiffusionInstructPix2PixPipeline",
    "sd21": "StableDiffusionInstructPix2PixPipeline",
    "sdxl": "StableDiffusionXLInstructPix2PixPipeline",
}
# What a new class takes from the target's config, as its `from_config` would. A class ignores what
# it does not know; what it knows and is not told gets its default, and DDIM's clips the latents.
_KEPT_SCHEDULER_KEYS = (
    "beta_end",
    "beta_schedule",
    "beta_start",
    "clip_sample",
    "clip_sample_range",
    "dynamic_thresholding_ratio",
    "num_train_timesteps",
    "original_inference_steps",
    "prediction_type",
    "rescale_betas_zero_snr",
    "sample_max_value",
    "set_alpha_to_one",
    "skip_prk_steps",
    "steps_offset",
    "thresholding",
    "timestep_scaling",
    "timestep_spacing",
    "trained_betas",
)


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
        plan: For the architecture.
        target: Whose components are exported; a bare UNet gives a UNet folder only.
    """
    written: dict[str, bytes] = {}
    warnings: list[str] = []

    def write(name: str, tree: Mapping[str, Any]) -> None:
        blank, fields = blank_places(tree)
        if fields:
            warnings.append(describe_blank(name, fields))
        written[name] = json_bytes(blank)

    if target.config is not None:
        write("unet/config.json", target.config)
    pipeline = target.pipeline
    if pipeline is None:
        return ExportFiles({}, written, tuple(warnings))
    index = dict(pipeline.model_index)
    index["_class_name"] = PIPELINE_CLASSES[plan.architecture]
    index["scheduler"] = ["diffusers", recipe.scheduler.class_name]
    write("model_index.json", index)
    version = index.get("_diffusers_version")
    scheduler = scheduler_config(recipe.scheduler, target.scheduler or {}, version)
    write("scheduler/scheduler_config.json", scheduler)
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


def scheduler_config(
    spec: SchedulerSpec, target: Mapping[str, Any], version: str | None
) -> dict[str, Any]:
    """Return the exported scheduler's config: the target's noise schedule in the new class.

    Args:
        spec: The recipe's class and the values that it sets.
        target: The target's scheduler config.
        version: `_diffusers_version` for a target that states none of its own.
    """
    if target.get("_class_name") == spec.class_name:
        config = dict(target)
    else:
        config = {key: target[key] for key in _KEPT_SCHEDULER_KEYS if key in target}
    config.setdefault("prediction_type", "epsilon")
    config["_class_name"] = spec.class_name
    stated = target.get("_diffusers_version", version)
    if stated is not None:
        config["_diffusers_version"] = stated
    config.update(spec.config)
    return config
