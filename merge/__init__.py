"""Merge diffusion weights offline: add a distilled model's delta to an InstructPix2Pix model.

    from merge import load_recipe, run_recipe

    result = run_recipe(load_recipe("sd15-lcm-lora", ["weight=0.8"]), out="outputs/mine")
    print(result.folder, result.recipe_digest)

Importing this package is cheap and changes nothing: each name below is loaded when it is used.
"""

from __future__ import annotations

import importlib

from merge._version import __version__

# Known to type checkers by its name. `typing` itself is not imported: with `python -m merge` the
# current folder is on the path until this package's own code runs, and its modules would be taken.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from merge.background.pool.options import ExecutorOptions
    from merge.conversion.directions import convert
    from merge.editor.batches import edit, edit_many
    from merge.editor.load import load_editor
    from merge.editor.pictures import load_image
    from merge.editor.result import EditRequest
    from merge.editor.settings import EditSettings
    from merge.errors import MergeError
    from merge.extract.extraction import extract_lora
    from merge.grid.inputs import Inputs
    from merge.grid.model import SweepResult
    from merge.grid.sweep import sweep
    from merge.plan.build import build_plan
    from merge.publication.publish import publish
    from merge.recipe.load import load_recipe
    from merge.records.lock.read import load_lock
    from merge.run.in_memory import merge_in_memory
    from merge.run.prepare import prepare_run
    from merge.run.repetition import reproduce
    from merge.run.stages import run_recipe
    from merge.sources.resolve import resolve_sources
    from merge.tuning.model import TuneResult
    from merge.tuning.tune import tune
    from merge.verify.files import verify_files
    from merge.verify.folder import verify_folder

_HOMES = {
    "EditRequest": "merge.editor.result",
    "EditSettings": "merge.editor.settings",
    "ExecutorOptions": "merge.background.pool.options",
    "Inputs": "merge.grid.inputs",
    "MergeError": "merge.errors",
    "SweepResult": "merge.grid.model",
    "TuneResult": "merge.tuning.model",
    "build_plan": "merge.plan.build",
    "convert": "merge.conversion.directions",
    "edit": "merge.editor.batches",
    "edit_many": "merge.editor.batches",
    "extract_lora": "merge.extract.extraction",
    "load_editor": "merge.editor.load",
    "load_image": "merge.editor.pictures",
    "load_lock": "merge.records.lock.read",
    "load_recipe": "merge.recipe.load",
    "merge_in_memory": "merge.run.in_memory",
    "prepare_run": "merge.run.prepare",
    "publish": "merge.publication.publish",
    "reproduce": "merge.run.repetition",
    "resolve_sources": "merge.sources.resolve",
    "run_recipe": "merge.run.stages",
    "sweep": "merge.grid.sweep",
    "tune": "merge.tuning.tune",
    "verify_files": "merge.verify.files",
    "verify_folder": "merge.verify.folder",
}

__all__ = [
    "EditRequest",
    "EditSettings",
    "ExecutorOptions",
    "Inputs",
    "MergeError",
    "SweepResult",
    "TuneResult",
    "__version__",
    "build_plan",
    "convert",
    "edit",
    "edit_many",
    "extract_lora",
    "load_editor",
    "load_image",
    "load_lock",
    "load_recipe",
    "merge_in_memory",
    "prepare_run",
    "publish",
    "reproduce",
    "resolve_sources",
    "run_recipe",
    "sweep",
    "tune",
    "verify_files",
    "verify_folder",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
