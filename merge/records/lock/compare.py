"""A recipe against the lock that was made of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from merge.family.registry import main_names
from merge.recipe.schema import Recipe
from merge.records.lock.model import Lock
from merge.records.lock.write import portable_recipe, requested_revisions


def differing_fields(recipe: Recipe, lock: Lock) -> list[str]:
    """Return what a recipe says otherwise than a lock that was made of it, a line each."""
    ours, theirs = portable_recipe(recipe, {}), portable_recipe(lock.recipe, {})
    if ours["components"] is None and theirs["components"][0] in main_names():
        # The main component alone, which a lock names.
        theirs["components"] = theirs["components"][1:] or None
    revisions = requested_revisions(recipe)
    lines = []
    for role, ref in lock.recipe.models.by_role.items():
        was = lock.requested.get(role, ref.revision)
        now = revisions.get(role)
        if now not in (was, ref.revision):
            lines.append(f"models.{role}.revision is {now}, and {was} in the lock")
    for tree in (ours, theirs):
        for model in _model_trees(tree):
            model.pop("revision", None)
    found, locked = dict(_leaves(ours, "")), dict(_leaves(theirs, ""))
    return lines + [
        f"{key} is {found.get(key)!r}, and {locked.get(key)!r} in the lock"
        for key in sorted(found.keys() | locked.keys())
        if found.get(key) != locked.get(key)
    ]


def _model_trees(tree: Mapping[str, Any]) -> list[dict[str, Any]]:
    models = tree["models"]
    return [m for m in (models["base"], *models["distilled"], models["target"]) if m is not None]


def _leaves(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for name, item in value.items():
            yield from _leaves(item, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list) and value:
        for index, item in enumerate(value):
            yield from _leaves(item, f"{key}[{index}]")
    else:
        yield key, value
