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

    from merge.conversion import convert
    from merge.editor import (
        EditRequest,
        EditSettings,
        edit,
        edit_many,
        load_editor,
        load_image,
    )
    from merge.errors import MergeError
    from merge.extract import extract_lora
    from merge.lock import load_lock
    from merge.plan import build_plan
    from merge.publication import publish
    from merge.recipe import load_recipe
    from merge.run import reproduce, run_recipe
    from merge.sources import resolve_sources
    from merge.verify import verify_files, verify_folder

_HOMES = {
    "EditRequest": "merge.editor",
    "EditSettings": "merge.editor",
    "MergeError": "merge.errors",
    "build_plan": "merge.plan",
    "convert": "merge.conversion",
    "edit": "merge.editor",
    "edit_many": "merge.editor",
    "extract_lora": "merge.extract",
    "load_editor": "merge.editor",
    "load_image": "merge.editor",
    "load_lock": "merge.lock",
    "load_recipe": "merge.recipe",
    "publish": "merge.publication",
    "reproduce": "merge.run",
    "resolve_sources": "merge.sources",
    "run_recipe": "merge.run",
    "verify_files": "merge.verify",
    "verify_folder": "merge.verify",
}

__all__ = [
    "EditRequest",
    "EditSettings",
    "MergeError",
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
    "publish",
    "reproduce",
    "resolve_sources",
    "run_recipe",
    "verify_files",
    "verify_folder",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
