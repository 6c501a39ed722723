"""Whether every weight of a checkpoint is there, before diffusers loads it.

diffusers draws a missing weight anew at every load and warns in its log alone; it knows no scales.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from merge.conversion.single import read_single_file
from merge.errors import CheckpointError, SourceError
from merge.family.expected.fit import fit_to_config
from merge.json_files import read_json
from merge.plan.compat import WHOLE_HINT
from merge.reader.checkpoint import Checkpoint, read_checkpoint
from merge.reader.intake import take_in
from merge.sources.select import has_weights, select_weights

_NOT_LOADED = ("safety_checker",)


def check_folder(folder: Path, index: Mapping[str, Any]) -> None:
    """Hold the components of a pipeline folder against their configs.

    Args:
        folder: A diffusers pipeline.
        index: Its model_index.json.

    Raises:
        CheckpointError: a weight is missing or has another shape, or values have scales that
            diffusers does not apply.
    """
    problems: list[str] = []
    for name, entry in sorted(index.items()):
        is_component = isinstance(entry, list) and len(entry) == 2 and isinstance(entry[1], str)
        if not is_component or name in _NOT_LOADED:
            continue
        part = folder / name
        checkpoint, config = _read(part), part / "config.json"
        if checkpoint is None or not config.is_file():
            continue
        try:
            tree = read_json(config)
        except CheckpointError as error:
            raise CheckpointError(f"{folder} does not load: {error.message}") from error
        problems += _scaled(name, checkpoint)
        problems += fit_to_config(name, checkpoint.shapes, tree, entry[1]).problems
    if problems:
        raise CheckpointError(
            "\n  ".join([f"{folder} does not load as it is meant:", *problems]), hint=WHOLE_HINT
        )


def check_file(file: Path, configs: Path) -> None:
    """Hold a single file against the folder of its configs.

    Raises:
        CheckpointError: as for `check_folder`, or it predicts something else than its scheduler.
    """
    single = read_single_file(file, configs, allow_pickle=True)
    if problems := _scaled("", single.checkpoint):
        raise CheckpointError(
            f"{file}: {problems[0]}", hint="`instruct-merge convert` makes a folder of its values"
        )


def _read(part: Path) -> Checkpoint | None:
    """Return the tensors of a component; None for one that has no weights, such as a tokenizer."""
    names = {path.name for path in part.iterdir() if path.is_file()} if part.is_dir() else set()
    if not has_weights(names):
        return None
    try:
        weights = select_weights(names, None, str(part), allow_pickle=True)
    except SourceError:
        # Not loadable in a plain way, which diffusers says in its own words.
        return None
    checkpoint = read_checkpoint([part / name for name in weights.names], allow_pickle=True)
    try:
        return take_in(checkpoint).checkpoint
    except CheckpointError as error:
        raise CheckpointError(f"{part}: {error.message}", hint=error.hint) from None


def _scaled(name: str, checkpoint: Checkpoint) -> list[str]:
    if not checkpoint.scales:
        return []
    key = next(iter(checkpoint.scales))
    where = f"{name}: " if name else ""
    return [f"{where}{key} has a scale beside it, which diffusers does not apply"]
