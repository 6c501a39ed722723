"""The manifest of an output, and the digest of what decides its weights.

Like the lock and the provenance, it has the same bytes for the same inputs, recipe and tool
version: no date, device, machine path or user name is in it. Local models appear by the name of
their file or folder.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from merge._version import __version__
from merge.json_files import canonical_bytes, json_bytes
from merge.plan.model import MergePlan
from merge.recipe.schema import Recipe
from merge.sources.model import ResolvedModel, Sources

MANIFEST_VERSION = 1


@dataclass(frozen=True, slots=True)
class FileRecord:
    """A file's size and SHA-256 (64 hexadecimal digits)."""

    size_bytes: int
    sha256: str


# Role and file name inside the model to the digest of the file.
InputDigests = Mapping[tuple[str, str], str]


def recipe_digest(recipe: Recipe, sources: Sources, digests: InputDigests) -> str:
    """Return the SHA-256 of everything that decides the merged weights.

    It covers method, parameters, weights, rules, dtypes and the inputs' SHA-256, and no names, so
    that a lock, a moved folder and a branch resolved to the same commit agree.

    Args:
        recipe: With its components filled in, see `MergePlan.complete`.
        sources: Its models.
        digests: Of every file of theirs.
    """

    def files(model: ResolvedModel) -> list[str]:
        merged = model.merged_files(recipe.components or ())
        found = [digests[model.role, file.name] for file in merged]
        return found if model.ema == "auto" else [*found, f"ema {model.ema}".lower()]

    facts = {
        "method": recipe.method,
        "params": recipe.params,
        "weight": recipe.weight,
        "components": recipe.components,
        "channel_rule": recipe.channel_rule,
        "block_weights": recipe.block_weights,
        "exclude": sorted(recipe.exclude),
        "guidance_embedding": recipe.guidance_embedding,
        "bake_guidance": recipe.bake_guidance,
        "compute_dtype": recipe.compute_dtype,
        "out_dtype": recipe.out_dtype,
        "on_overflow": recipe.on_overflow,
        "other_dtype": recipe.output.other_dtype,
        "inputs": {
            "target": files(sources.target),
            "base": None if sources.base is None else files(sources.base),
            "distilled": [
                {"weight": ref.weight, "files": files(model)}
                for ref, model in zip(recipe.models.distilled, sources.distilled, strict=True)
            ],
        },
    }
    return hashlib.sha256(canonical_bytes(facts)).hexdigest()


def build_manifest(
    plan: MergePlan,
    sources: Sources,
    digests: InputDigests,
    digest: str,
    files: Mapping[str, FileRecord],
    overflows: Mapping[str, int],
) -> bytes:
    """Return `merge_manifest.json`: what the folder holds and where it comes from."""
    manifest = {
        "schema_version": MANIFEST_VERSION,
        "tool": {"name": "instruct-merge", "version": __version__},
        "recipe": plan.recipe,
        "recipe_digest": digest,
        "architecture": plan.family.name,
        "inputs": {model.role: input_record(model, digests) for model in sources.models},
        "counts": plan.counts,
        "left_out": [dataclasses.asdict(item) for item in plan.left_out],
        "overflows": dict(overflows),
        "files": {
            name: {"size": record.size_bytes, "sha256": record.sha256}
            for name, record in sorted(files.items())
        },
    }
    return json_bytes(manifest)


def input_record(model: ResolvedModel, digests: InputDigests) -> dict[str, Any]:
    """Return a model as the records name it: origin, and every file with size and SHA-256."""
    origin = (
        {"name": model.label}
        if model.repo is None
        else {"repo": model.repo, "commit": model.commit}
    )
    return {
        **origin,
        "files": {
            file.name: {"size": file.size_bytes, "sha256": digests[model.role, file.name]}
            for file in model.files
        },
    }
