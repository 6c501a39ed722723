"""The small JSON files that tell how a model is laid out."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from merge.errors import SourceError, SourceNotFoundError
from merge.json_files import read_json
from merge.sources.components import Listed, source_files
from merge.sources.model import SourceFile
from merge.sources.select import Weights

_MAX_JSON_BYTES = 16 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class ConfigFiles:
    """JSON files that were read.

    Attributes:
        trees: Name to what the file holds.
        files: The files themselves.
    """

    trees: Mapping[str, Mapping[str, Any]]
    files: tuple[SourceFile, ...]


def read_configs(model: Listed, names: Collection[str]) -> ConfigFiles:
    """Fetch and parse JSON files of a model.

    Raises:
        SourceError: a file is no JSON object, or cannot be had.
    """
    model.store.fetch(names)
    files = source_files(model, "", sorted(names))
    return ConfigFiles({file.name: _read_json(file.path) for file in files}, files)


def check_index(name: str, tree: Mapping[str, Any], weights: Weights) -> None:
    """Check that an index names the shards that are there and nothing outside the folder.

    Raises:
        SourceError: it is no index, or names something else.
        SourceNotFoundError: a shard that it names is missing.
    """
    name = PurePosixPath(name).name
    entries = tree.get("weight_map")
    if not isinstance(entries, dict) or not all(isinstance(v, str) for v in entries.values()):
        raise SourceError(f"{name}: it has no weight_map from tensors to files")
    for shard in sorted(set(entries.values())):
        if PurePosixPath(shard).name != shard or shard in ("", ".", ".."):
            raise SourceError(f"{name}: {shard!r} is not the name of a file beside it")
        if shard not in weights.names:
            raise SourceNotFoundError(f"{name} names the shard {shard}, which is missing")


def _read_json(path: Path) -> dict[str, Any]:
    if path.is_file() and path.stat().st_size > _MAX_JSON_BYTES:
        raise SourceError(f"{path} is too large for a config")
    return read_json(path, SourceError)
