"""Places of somebody's machine in a model's configs, which nobody else can use."""

from __future__ import annotations

import json
import re
from typing import Any

# Trainers write where they loaded a model from into its config; a Hub id or a plain name is none.
_PLACE = re.compile(r"(?:/[^/\s<>]+/|~[/\\]|[A-Za-z]:[\\/]|\\\\)[^\n]*")
_CONFIGS = ("config.json", "model_index.json", "special_tokens_map.json")
# A vocabulary beside it may be of megabytes; a config is not.
_MOST_BYTES = 1024 * 1024


def is_config(name: str, size_bytes: int) -> bool:
    """Return True for a file that can hold such a place, by its name and size."""
    return name.endswith(_CONFIGS) and size_bytes <= _MOST_BYTES


def blank_places(tree: Any) -> tuple[Any, tuple[str, ...]]:
    """Return a config without its places, and the names of the fields that lost one.

    Args:
        tree: Parsed JSON.
    """
    fields: list[str] = []

    def blank(value: Any, field: str) -> Any:
        if isinstance(value, dict):
            return {name: blank(item, str(name)) for name, item in value.items()}
        if isinstance(value, list):
            return [blank(item, field) for item in value]
        if isinstance(value, str) and _PLACE.fullmatch(value):
            fields.append(field)
            return ""
        return value

    return blank(tree, ""), tuple(dict.fromkeys(fields))


def blank_file(data: bytes) -> tuple[Any, tuple[str, ...]]:
    """Return what `blank_places` does for a file's bytes; nothing to blank where it is no JSON."""
    try:
        return blank_places(json.loads(data))
    except (ValueError, RecursionError):
        return None, ()


def describe_blank(name: str, fields: tuple[str, ...]) -> str:
    """Return a line that says what was blanked."""
    verb = "hold a place" if len(fields) > 1 else "holds a place"
    return f"{name}: {', '.join(fields)} {verb} of another machine, and the output has it blank"
