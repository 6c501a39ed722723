"""Where an export comes from, as an in-toto Statement with SLSA provenance.

It says the same as manifest and lock in the words that supply-chain tools read, and holds the
SHA-256 of the manifest, which cannot hold its own. The same manifest and lock give the same bytes:
no date, device or machine's path is in it.

Source: https://in-toto.io/Statement/v1 and https://slsa.dev/provenance/v1
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import yaml

from merge.errors import CheckpointError
from merge.json_files import json_bytes, parse_json
from merge.recipe.text import WEIGHT_SUFFIXES
from merge.records.folder import LOCK_NAME, MANIFEST_NAME, PROVENANCE_NAME

STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "https://slsa.dev/provenance/v1"
# An identifier, not an address: it names this layout of parameters and stays when they do.
BUILDER_ID = "https://github.com/instruct-merge/instruct-merge"
BUILD_TYPE = f"{BUILDER_ID}/merge/v1"
_HUB = "https://huggingface.co"
# How the lock writes a Hub repository that gave only configs.
_PINNED_REPO = re.compile(r"([\w.-]+/[\w.-]+)@([0-9a-f]{40})", re.ASCII)


class _LockLoader(yaml.SafeLoader):
    """Reads a lock, which we write without aliases: a few of them can stand for gigabytes."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("a lock has no aliases")
        return super().compose_node(parent, index)


def build_provenance(manifest: bytes, lock: bytes) -> bytes:
    """Return `provenance.intoto.json` for a manifest and a lock.

    Args:
        manifest: The bytes of `merge_manifest.json`.
        lock: The bytes of `recipe.lock.yaml`.

    Raises:
        CheckpointError: one of them is not what this tool writes.
    """
    facts = parse_json(manifest, MANIFEST_NAME)
    recipe = _parse_lock(lock)
    try:
        return json_bytes(_statement(facts, _sha256(manifest), recipe))
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        # Such as a table where a name should be: nothing that this tool writes.
        raise CheckpointError(f"{MANIFEST_NAME} or {LOCK_NAME} is broken: {error!r}") from error


def check_provenance(folder: Path) -> list[str]:
    """Compare a folder's provenance, manifest and lock with each other.

    Files of the manifest are not hashed; `verify_files` does that.

    Args:
        folder: An output of `run`.

    Returns:
        A line for each thing that differs; empty when all agree.

    Raises:
        CheckpointError: a file is there and cannot be read.
    """
    data = {name: _read(folder / name) for name in (PROVENANCE_NAME, MANIFEST_NAME, LOCK_NAME)}
    lines = [f"{name} is missing" for name, content in data.items() if content is None]
    statement, manifest, lock = data.values()
    if statement is None:
        return lines
    recorded = _recorded_subjects(statement)
    for name, content in ((MANIFEST_NAME, manifest), (LOCK_NAME, lock)):
        if content is not None and name in recorded and recorded[name] != _sha256(content):
            lines.append(f"{name} has SHA-256 {_sha256(content)}, not {recorded[name]}")
    if manifest is None or lock is None:
        return lines
    try:
        is_equal = build_provenance(manifest, lock) == statement
    except CheckpointError:
        is_equal = False
    if not is_equal:
        lines.append(f"{PROVENANCE_NAME} is not what manifest and lock give")
    return lines


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes() if path.is_file() else None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def _recorded_subjects(statement: bytes) -> dict[str, str]:
    """Return file name to SHA-256 as a statement has them; what is broken is left out."""
    try:
        subjects = parse_json(statement, PROVENANCE_NAME)["subject"]
        return {str(item["name"]): str(item["digest"]["sha256"]) for item in subjects}
    except (CheckpointError, KeyError, TypeError):
        return {}


def _statement(
    manifest: Mapping[str, Any], digest: str, recipe: Mapping[str, Any]
) -> dict[str, Any]:
    files = {name: record["sha256"] for name, record in manifest["files"].items()}
    files[MANIFEST_NAME] = digest
    tool = {"name": manifest["tool"]["name"], "version": manifest["tool"]["version"]}
    config = recipe["models"]["target"].get("config")
    return {
        "_type": STATEMENT_TYPE,
        "subject": [
            {"name": name, "digest": {"sha256": sha256}} for name, sha256 in sorted(files.items())
        ],
        "predicateType": PREDICATE_TYPE,
        "predicate": {
            "buildDefinition": {
                "buildType": BUILD_TYPE,
                "externalParameters": {"recipe": recipe},
                "internalParameters": {"tool": tool},
                "resolvedDependencies": [
                    dependency
                    for role, record in sorted(manifest["inputs"].items())
                    for dependency in _dependencies(
                        role, record, config if role == "target" else None
                    )
                ],
            },
            "runDetails": {
                "builder": {"id": BUILDER_ID, "version": {tool["name"]: tool["version"]}}
            },
        },
    }


def _dependencies(
    role: str, record: Mapping[str, Any], config: str | None
) -> Iterator[dict[str, Any]]:
    """Yield a descriptor for an input's repository, and one for each file.

    Args:
        role: As in the manifest.
        record: What the manifest says of the input.
        config: Where the files beside a single weight file are from; None for other inputs.
    """
    annotations = {"role": role}
    own = (record["repo"], record["commit"]) if "repo" in record else None
    pinned = _PINNED_REPO.fullmatch(config or "")
    beside = (pinned[1], pinned[2]) if pinned else None
    for origin in dict.fromkeys((own, beside)):
        if origin is not None:
            repo, commit = origin
            yield {
                "uri": f"git+{_HUB}/{quote(repo)}@{quote(commit)}",
                "digest": {"gitCommit": commit},
                "annotations": annotations,
            }
    for name, file in sorted(record["files"].items()):
        # Of a single file's model, the weights are its own and all else is its config's.
        is_beside = config is not None and not name.lower().endswith(WEIGHT_SUFFIXES)
        origin = beside if is_beside else own
        label = config if is_beside else record.get("name")
        yield {
            **_where(name, origin, label),
            "digest": {"sha256": file["sha256"]},
            "annotations": annotations,
        }


def _where(name: str, origin: tuple[str, str] | None, label: str | None) -> dict[str, str]:
    if origin is not None:
        repo, commit = origin
        return {"name": name, "uri": f"{_HUB}/{quote(repo)}/resolve/{quote(commit)}/{quote(name)}"}
    return {"name": name if label in (None, name) else f"{label}/{name}"}


def _parse_lock(data: bytes) -> dict[str, Any]:
    try:
        recipe = yaml.load(data, _LockLoader)["recipe"]
    except (ValueError, RecursionError, yaml.YAMLError, KeyError, TypeError) as error:
        raise CheckpointError(f"{LOCK_NAME} cannot be read: {error}") from error
    if not isinstance(recipe, dict):
        raise CheckpointError(f"{LOCK_NAME} holds no recipe")
    return recipe


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
