"""The records that make a run repeatable: recipe digest, lock, manifest.

All three are the same bytes for the same inputs, recipe and tool version: no date, device, machine
path or user name is in them. Local models appear by the name of their file or folder.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from merge._version import __version__
from merge.errors import CheckpointError
from merge.plan import MergePlan
from merge.recipe import Recipe
from merge.sources import ResolvedModel, Sources

LOCK_NAME = "recipe.lock.yaml"
MANIFEST_NAME = "merge_manifest.json"
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
    """

    def files(model: ResolvedModel) -> list[str]:
        found = [digests[model.role, file.name] for file in model.merged_files(recipe.components)]
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
    text = json.dumps(facts, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


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
        "architecture": plan.architecture,
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


def json_bytes(tree: Any) -> bytes:
    """Return JSON as we write it: sorted, indented, UTF-8, one newline at the end."""
    return (json.dumps(tree, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Return the manifest of a folder, or None when it has none.

    Raises:
        CheckpointError: it is there and cannot be read.
    """
    path = folder / MANIFEST_NAME
    if not path.is_file():
        return None
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(tree, dict) or not _is_file_table(tree.get("files")):
        raise CheckpointError(f"{path} is no manifest")
    return tree


def _is_file_table(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(record, dict)
        and type(record.get("size")) is int
        and isinstance(record.get("sha256"), str)
        for record in value.values()
    )


def read_locked_recipe(folder: Path) -> dict[str, Any] | None:
    """Return the recipe part of a folder's lock as plain values, or None without a lock.

    Raises:
        CheckpointError: it is there and cannot be read.
    """
    path = folder / LOCK_NAME
    if not path.is_file():
        return None
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
        recipe = tree["recipe"]
    except (OSError, ValueError, RecursionError, yaml.YAMLError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(recipe, dict):
        raise CheckpointError(f"{path} holds no recipe")
    return recipe


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
