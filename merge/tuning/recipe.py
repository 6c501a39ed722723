"""`tuned.yaml`: a whole recipe with what was chosen, and why."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from merge.recipe.load import override_recipe
from merge.recipe.schema import Recipe
from merge.tuning.model import TuneResult

_SUFFIX = "-tuned"


def tuned_recipe(recipe: Recipe, result: TuneResult) -> bytes:
    """Return the recipe with the chosen setting; the same result gives the same bytes.

    Paths are relative to the folder of the result, where the recipe is.

    Args:
        recipe: What was tuned.
        result: With a choice.
    """
    tuned = override_recipe(recipe, result.overrides)
    name = recipe.name if recipe.name.endswith(_SUFFIX) else f"{recipe.name}{_SUFFIX}"
    tree = _without_defaults(tuned)
    tree["name"] = name
    if tree.get("output", {}).get("folder") == f"outputs/{recipe.name}":
        del tree["output"]["folder"]
    tree = {key: value for key, value in tree.items() if value != {} or key == "models"}
    _make_relative(tree, result.folder.resolve())
    text = yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=100)
    return ("".join(f"# {line}".rstrip() + "\n" for line in _comment(result)) + text).encode()


def _comment(result: TuneResult) -> list[str]:
    assert result.chosen is not None
    chosen = dict(result.chosen.labels)
    what = ", ".join(f"{key} {chosen[key]}" for key in result.over if key in chosen)
    samples, device = len(result.cells[0].samples), result.device
    lines = [
        f"{result.recipe} with {what}, chosen by measuring.",
        "Run:    instruct-merge run tuned.yaml",
        "",
        f"Decided by: {result.ranking.meaning};",
        f"{len(result.cells)} settings, {samples} edits each, in {result.steps} steps on {device}.",
        "Quarters of the samples choose weights "
        + ", ".join(f"{weight:.2f}" for weight in result.picks)
        + ".",
    ]
    held = result.held_out
    if held is not None:
        verdict = "no neighbour is better beyond doubt" if held.passed else "a neighbour is better"
        lines.append(
            f"On {held.samples} samples that it was not chosen on ({held.what}): {verdict}."
        )
    return lines


def _without_defaults(recipe: Recipe) -> dict[str, Any]:
    """Return a recipe as a tree of what is not its default."""

    def tree_of(value: Any) -> Any:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            found = {}
            for each in dataclasses.fields(value):
                item = getattr(value, each.name)
                default = (
                    each.default_factory()
                    if each.default_factory is not dataclasses.MISSING
                    else each.default
                )
                if item != default:
                    found[each.name] = tree_of(item)
            return found
        return [tree_of(item) for item in value] if isinstance(value, list | tuple) else value

    tree: dict[str, Any] = tree_of(recipe)
    # Only where a sweep needed it.
    tree.pop("allow_noop", None)
    return tree


def _make_relative(tree: dict[str, Any], folder: Path) -> None:
    """Make the paths of this machine relative to the folder that the recipe is in."""

    def relative(text: str) -> str:
        path = os.path.relpath(text, folder)
        return path if path.startswith(".") else f"./{path}"

    models = tree["models"]
    for ref in [models["target"], models.get("base"), *models["distilled"]]:
        for key in ("path", "config"):
            if isinstance(ref, Mapping) and str(ref.get(key) or "").startswith("/"):
                ref[key] = relative(ref[key])  # type: ignore[index]
    for edit in tree.get("verify", {}).get("edits", ()):
        edit["image"] = relative(edit["image"])
        if "expected" in edit:
            edit["expected"] = [relative(name) for name in edit["expected"]]
