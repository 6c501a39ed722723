"""The records of an output folder, read in one place by all that want to know what it is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml

from merge.errors import CheckpointError
from merge.json_files import read_json, read_json_if_any

LOCK_NAME = "recipe.lock.yaml"
MANIFEST_NAME = "merge_manifest.json"
PROVENANCE_NAME = "provenance.intoto.json"
RUN_NAME = "run.json"
REPORT_NAME = "report.json"
PAGE_NAME = "report.html"
IMAGES_NAME = "images"

Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class OutputRecords:
    """What is written in an output, or in a download of one.

    Each record is read and checked when it is asked for: anybody may have written to it since.

    Attributes:
        folder: The output.
    """

    folder: Path

    @property
    def missing(self) -> str:
        """Return the name of the record without which a folder is no output; empty where it is."""
        if self.manifest is None:
            return MANIFEST_NAME
        return "" if (self.folder / LOCK_NAME).is_file() else LOCK_NAME

    @property
    def manifest(self) -> dict[str, Any] | None:
        """Return the manifest, or None when there is none.

        Raises:
            CheckpointError: it is there and cannot be read.
        """
        path = self.folder / MANIFEST_NAME
        if not path.is_file():
            return None
        tree = read_json(path)
        if not _is_file_table(tree.get("files")):
            raise CheckpointError(f"{path} is no manifest")
        return tree

    @property
    def recipe(self) -> dict[str, Any] | None:
        """Return the recipe of the lock as plain values, or None without a lock.

        Raises:
            CheckpointError: it is there and cannot be read.
        """
        path = self.folder / LOCK_NAME
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

    @property
    def lock_text(self) -> str:
        """Return the lock as it is written."""
        return (self.folder / LOCK_NAME).read_text(encoding="utf-8")

    @property
    def report(self) -> dict[str, Any] | None:
        """Return the report of a verification, or None when there is none.

        Raises:
            CheckpointError: it is there and cannot be read.
        """
        path = self.folder / REPORT_NAME
        return read_json(path) if path.is_file() else None

    @property
    def run(self) -> dict[str, Any]:
        """Return how the run went; empty where that is missing or broken: nothing needs it."""
        return read_json_if_any(self.folder / RUN_NAME)

    def run_table(self, name: str, kind: type[Value]) -> dict[str, Value]:
        """Return a table of the run's record without the values of another type."""
        table = self.run.get(name)
        pairs = table.items() if isinstance(table, dict) else ()
        return {key: value for key, value in pairs if isinstance(value, kind)}


def _is_file_table(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(record, dict)
        and type(record.get("size")) is int
        and isinstance(record.get("sha256"), str)
        for record in value.values()
    )
