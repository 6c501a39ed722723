"""Small grids over the tiny pipelines: how they are written, measured and read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from merge.grid.inputs import Inputs
from merge.grid.model import SweepResult
from merge.grid.sweep import sweep
from merge.verify.model import Edit

ONE = (Edit(None, "make it winter"),)
TWO = (*ONE, Edit(None, "turn the boat into a car", drawing="boat"))
Tree = dict[str, Any]


def write_recipe(folder: Path, models: Path, **changes: object) -> Path:
    """Write a recipe over tiny pipelines, with edits of few rows and short paths.

    Args:
        folder: Where to.
        models: Written by `scripts.make_tiny`.
        changes: Of the recipe, and of its models; `lora` names a LoRA in place of the full model.
    """
    lora = changes.pop("lora", "")
    verify = {"resolution": 64, "steps": 1, "guidance_scale": 1.0}
    compare = {"guidance_scale": 1.0, "image_guidance_scale": 1.0}
    named = {role: changes.pop(role) for role in ("base", "distilled", "target") if role in changes}
    tree: Tree = {
        "name": "tiny",
        "models": {
            "base": None if lora else str(models / "base"),
            "distilled": str(models / str(lora or "distilled")),
            "target": str(models / "target"),
            **named,
        },
        "verify": {**verify, "compare": compare, **dict(changes.pop("verify", {}))},  # type: ignore[call-overload]
        **changes,
    }
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def measure(
    recipe: Path,
    axes: Sequence[str],
    out: Path,
    edits: Sequence[Edit] | Path | None = ONE,
    **options: Any,
) -> SweepResult:
    """Sweep on the CPU."""
    inputs = Inputs(tuple(edits) if isinstance(edits, Sequence) else edits)
    return sweep(recipe, axes, out=out, device="cpu", **{"inputs": inputs, **options})


def read(folder: Path) -> Tree:
    """Return what `sweep.json` holds."""
    tree: Tree = json.loads((folder / "sweep.json").read_text())
    return tree


def without_seconds(tree: Any) -> Any:
    """Return a tree without what differs from run to run."""
    if isinstance(tree, dict):
        return {key: without_seconds(value) for key, value in tree.items() if key != "seconds"}
    return [*map(without_seconds, tree)] if isinstance(tree, list) else tree


def rows_of(told: Sequence[tuple[str, int, int]]) -> tuple[int, int]:
    """Return the last count of UNet rows that a progress was told, and their total."""
    return next((done, total) for stage, done, total in reversed(told) if stage == "sweep")
