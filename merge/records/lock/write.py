"""A recipe and its inputs to the bytes of a lock."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from merge._version import __version__
from merge.recipe.schema import CompareSpec, ModelRef, Recipe
from merge.records.manifest import InputDigests, input_record
from merge.sources.model import ResolvedModel, Sources

LOCK_VERSION = 1


class _Dumper(yaml.SafeDumper):
    """Writes every value where it stands: aliases are refused when a lock is read."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def build_lock(
    recipe: Recipe, sources: Sources, digests: InputDigests, *, with_requested: bool = False
) -> bytes:
    """Return a lock's bytes.

    Args:
        recipe: After overrides.
        sources: Its models.
        digests: Of every file of theirs.
        with_requested: Also write which revisions the recipe asked for, so that a later
            change of the recipe is noticed; an output's lock is the same for `main` and a commit.
    """
    lock: dict[str, Any] = {
        "lock_version": LOCK_VERSION,
        "tool_version": __version__,
        "recipe": portable_recipe(recipe, {model.role: model for model in sources.models}),
        "models": {model.role: input_record(model, digests) for model in sources.models},
    }
    if with_requested:
        lock["requested"] = requested_revisions(recipe)
    text = yaml.dump(lock, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)
    return text.encode()


def portable_recipe(recipe: Recipe, resolved: Mapping[str, ResolvedModel]) -> dict[str, Any]:
    """Return a recipe as plain values without anything of this machine."""
    tree = dataclasses.asdict(recipe)
    trees = {
        role: _portable_model(ref, resolved.get(role))
        for role, ref in recipe.models.by_role.items()
    }
    tree["models"] = {
        "base": trees.get("base"),
        "distilled": [t for role, t in trees.items() if role not in ("target", "base")],
        "target": trees["target"],
    }
    # Where the output lay on this machine is no part of what it is.
    tree["output"]["folder"] = f"outputs/{recipe.name}"
    for edit in tree["verify"]["edits"]:
        edit["image"] = Path(edit["image"]).name
        edit["expected"] = [Path(name).name for name in edit["expected"]]
    if recipe.verify.compare == CompareSpec():
        # As every recipe has it that says nothing of it.
        del tree["verify"]["compare"]
    return tree


def _portable_model(ref: ModelRef, model: ResolvedModel | None) -> dict[str, Any]:
    # In the order of the schema, whether the recipe or the run filled a field in.
    tree = dataclasses.asdict(ref)
    if ref.path is not None:
        tree["path"] = Path(ref.path).name
    if ref.config is not None and Path(ref.config).is_absolute():
        tree["config"] = f"./{Path(ref.config).name}"
    elif model is not None and model.config_label:
        tree["config"] = model.config_label
    if model is not None and model.commit is not None:
        tree["revision"] = model.commit
    if ref.ema == "auto":
        del tree["ema"]
    return {name: value for name, value in tree.items() if value is not None}


def requested_revisions(recipe: Recipe) -> dict[str, str]:
    """Return role to branch, tag or commit as a recipe has it, of models on the Hub."""
    refs = recipe.models.by_role
    return {role: ref.revision or "main" for role, ref in refs.items() if ref.repo is not None}
