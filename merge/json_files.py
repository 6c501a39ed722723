"""JSON as we write it, and objects of JSON that anybody may have written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from merge.errors import CheckpointError, MergeError


def json_bytes(tree: Any) -> bytes:
    """Return JSON as we write it: sorted, indented, UTF-8, one newline at the end."""
    return (json.dumps(tree, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def canonical_bytes(tree: Any) -> bytes:
    """Return JSON for digests: sorted, without white space, UTF-8."""
    return json.dumps(tree, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def parse_json(
    data: str | bytes, where: str | Path, error: type[MergeError] = CheckpointError
) -> dict[str, Any]:
    """Return an object.

    Args:
        data: JSON in UTF-8.
        where: The file's name in messages.
        error: The class that is raised.

    Raises:
        MergeError: of that class: it is no JSON, or something else than an object.
    """
    try:
        tree = json.loads(data)
    except (ValueError, RecursionError) as problem:
        raise error(f"{where} cannot be read: {problem}") from problem
    if not isinstance(tree, dict):
        raise error(f"{where} is not a JSON object")
    return tree


def read_json(path: Path, error: type[MergeError] = CheckpointError) -> dict[str, Any]:
    """Return the object that a file holds.

    Raises:
        MergeError: of the class `error`: the file cannot be read or holds something else.
    """
    try:
        data = path.read_bytes()
    except OSError as problem:
        raise error(f"{path} cannot be read: {problem}") from problem
    return parse_json(data, path, error)


def read_json_if_any(path: Path) -> dict[str, Any]:
    """Return the object that a file holds; an empty one where it is missing or broken."""
    try:
        return read_json(path)
    except CheckpointError:
        return {}
