"""The bytes of a lock to what they say, checked."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from merge.errors import RecipeError
from merge.recipe.load import parse_recipe
from merge.records.folder import LOCK_NAME
from merge.records.lock.model import Lock
from merge.records.lock.write import LOCK_VERSION
from merge.records.manifest import FileRecord

LOCK_SUFFIX = ".lock.yaml"
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
# What of a lock depends on the machine that it is run on.
_LOCAL_KEYS = re.compile(r"models\.(target|base|distilled(\[\d+\])?)\.(path|config)|output\.folder")


def is_lock(path: Path) -> bool:
    """Return True for a file that is named like a lock, or begins like one."""
    try:
        if not path.is_file():
            return False
        with path.open("rb") as file:
            return path.name.endswith(LOCK_SUFFIX) or file.read(13) == b"lock_version:"
    except (OSError, ValueError):
        return False


def load_lock(path: Path, overrides: Sequence[str] = ()) -> Lock:
    """Read a lock.

    Args:
        path: `recipe.lock.yaml` of an output, or one that `--write-lock` made.
        overrides: Only where things are on this machine: `models.target.path=...`,
            `models.target.config=...`, `output.folder=...`.

    Returns:
        The lock; local models are looked for beside it unless an override says where they are.

    Raises:
        RecipeError: it is no lock, contradicts itself, or an override would change the result.
    """
    for word in overrides:
        if not _LOCAL_KEYS.fullmatch(word.partition("=")[0]):
            raise RecipeError(
                f"{path.name} is a lock and runs as it is: {word.partition('=')[0]} cannot be set",
                [],
                hint="change the recipe and run that; of a lock only models.ROLE.path, "
                "models.ROLE.config and output.folder can be set",
            )
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise _invalid(path, str(error)) from error
    if not isinstance(tree, dict) or not isinstance(tree.get("recipe"), dict):
        raise _invalid(path, "it holds no recipe")
    if tree.get("lock_version") != LOCK_VERSION:
        raise _invalid(path, f"lock_version is {tree.get('lock_version')!r}, not {LOCK_VERSION}")
    models = tree.get("models")
    if not isinstance(models, dict):
        raise _invalid(path, "it has no models")
    text = yaml.safe_dump(tree["recipe"], sort_keys=False, allow_unicode=True)
    lock = Lock(
        path=path,
        tool_version=str(tree.get("tool_version")),
        recipe=parse_recipe(text, path, overrides),
        commits={role: model["commit"] for role, model in models.items() if "commit" in model},
        files={role: _records(path, role, model) for role, model in models.items()},
        requested=dict(tree.get("requested") or {}),
    )
    _check_consistent(lock)
    return lock


def _records(path: Path, role: str, model: Any) -> dict[str, FileRecord]:
    files = model.get("files") if isinstance(model, dict) else None
    if not isinstance(files, dict) or not files:
        raise _invalid(path, f"models.{role} has no files")
    records = {}
    for name, record in files.items():
        table = record if isinstance(record, dict) else {}
        size, sha256 = table.get("size"), table.get("sha256")
        if type(size) is not int or size < 0 or not _SHA256.fullmatch(str(sha256)):
            raise _invalid(path, f"models.{role}.files: {name} has no size and SHA-256")
        records[str(name)] = FileRecord(size, str(sha256))
    return records


def _check_consistent(lock: Lock) -> None:
    refs = lock.recipe.models.by_role
    if refs.keys() != lock.files.keys():
        raise _invalid(lock.path, "its recipe and its models have different roles")
    for role, ref in refs.items():
        commit = lock.commits.get(role)
        if (ref.repo is None) != (commit is None):
            raise _invalid(lock.path, f"models.{role}: a commit goes with a repository")
        if ref.repo is not None and (ref.revision != commit or not _COMMIT.fullmatch(str(commit))):
            raise _invalid(lock.path, f"models.{role}: {ref.revision} is not the commit {commit}")


def _invalid(path: Path, what: str) -> RecipeError:
    return RecipeError(
        f"{path.name} is no lock that can be run: {what}",
        [],
        hint=f"`run RECIPE --write-lock` makes one, and every output has its {LOCK_NAME}",
    )
