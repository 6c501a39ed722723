"""What a local model says of its own licence."""

from __future__ import annotations

from pathlib import Path

import yaml

from merge.errors import MergeError
from merge.reader.checkpoint import read_header
from merge.sources.model import ResolvedModel

_CARD_CHARACTERS = 64 * 1024


def stated_locally(model: ResolvedModel) -> str:
    """Return the licence that a local model states: in its card, or in its weights' metadata.

    The card is the README.md beside the files or one folder above, as for several models of one
    repository. Empty where neither says anything.
    """
    for folder in (model.root, model.root.parent):
        if licence := _licence_of_card(folder / "README.md"):
            return licence
    for file in model.main_files[:1]:
        try:
            return read_header(file.path).header.metadata.get("modelspec.license", "").lower()
        except MergeError:
            pass
    return ""


def _licence_of_card(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")[:_CARD_CHARACTERS]
        head = text.split("---", 2)[1] if text.startswith("---") else ""
        tree = yaml.safe_load(head)
    except (OSError, ValueError, IndexError, yaml.YAMLError, RecursionError):
        return ""
    if not isinstance(tree, dict):
        return ""
    licence = tree.get("license")
    stated = tree.get("license_name") if licence == "other" else licence
    return stated.strip().lower() if isinstance(stated, str) else ""
