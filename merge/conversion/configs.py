"""The folder that gives a single file's tensors their configs and tokenizers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from merge.conversion.problems import refuse
from merge.errors import SourceError, SourceNotFoundError
from merge.family.model import Family
from merge.family.registry import component_named
from merge.json_files import read_json
from merge.reader.checkpoint import read_checkpoint
from merge.sources.components import refuse_own_code
from merge.sources.select import companion_files, has_weights, plain_name, select_weights
from merge.writer.copies.fit import fit_copies
from merge.writer.copies.model import TensorCopy, copies_of


@dataclass(frozen=True, slots=True)
class Configs:
    """What a pipeline folder has besides the weights that a single file brings.

    Attributes:
        folder: The folder.
        index: Its model_index.json.
        files: Name in a new folder to the file that is copied there.
        missing: Components whose weights neither of the two has.
        components: Parsed config.json of each component that has one.
    """

    folder: Path
    index: Mapping[str, Any]
    files: Mapping[str, Path]
    missing: tuple[str, ...] = ()
    components: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def read_configs(folder: Path) -> Configs:
    """Collect the files of a pipeline folder that a conversion copies.

    Components that no single file can hold, such as a safety checker, keep their weights.

    Raises:
        SourceNotFoundError: it is no pipeline folder, or a component's folder is not there.
        SourceError: a component is code of its own.
        CheckpointError: a JSON file cannot be read.
    """
    path = folder / "model_index.json"
    if not path.is_file():
        raise SourceNotFoundError(
            f"{folder} is no pipeline folder: it has no model_index.json",
            hint="--config takes a diffusers pipeline folder of the same architecture",
        )
    index = read_json(path)
    files = {"model_index.json": path}
    missing: list[str] = []
    components: dict[str, Mapping[str, Any]] = {}
    for name, entry in sorted(index.items()):
        if not _is_listed(index, name):
            continue
        part = folder / name
        refuse_own_code(name, entry, str(folder))
        if "/" in name or name.startswith(".") or not part.is_dir():
            raise SourceNotFoundError(f"{folder} lacks the folder of its component {name}")
        names = {str(p.relative_to(part)) for p in part.rglob("*") if p.is_file()}
        if component_named(name) is None and "config.json" in names:
            weights = _weights(part, names)
            if weights is None:
                missing.append(name)
                continue
            files |= {f"{name}/{new}": part / old for new, old in weights.items()}
        files |= {f"{name}/{other}": part / other for other in companion_files(names)}
        if "config.json" in names:
            components[name] = read_json(part / "config.json")
    return Configs(folder, index, files, tuple(missing), components)


def check_configs(
    configs: Configs, parts: Mapping[str, Sequence[TensorCopy]], family: Family
) -> None:
    """Compare the sizes that the configs state with the tensors.

    Args:
        configs: Of a pipeline folder.
        parts: Component to its tensors.
        family: The file's architecture.

    Raises:
        CheckpointError: the folder describes another model; the message lists every difference.
    """
    wanted = {part.name for part in family.components if _is_listed(configs.index, part.name)}
    problems = [
        f"the file has no {name}, and the folder's pipeline has one"
        for name in sorted(wanted - set(parts))
    ]
    problems += [
        f"the file has {name}, and the folder's pipeline has none"
        for name in sorted(set(parts) - wanted)
    ]
    for name in sorted(wanted & set(parts)):
        if name not in configs.components:
            problems.append(f"the folder has no {name}/config.json")
    for part in family.components:
        config, copies = configs.components.get(part.name, {}), parts.get(part.name, ())
        for key, suffix, axis in part.sizes:
            stated = config.get(key)
            shape = next((copy.shape for copy in copies if copy.name.endswith(suffix)), ())
            if isinstance(stated, int) and len(shape) > axis and shape[axis] != stated:
                problems.append(
                    f"{part.name}: {key} is {stated} in the config and {shape[axis]} in the file"
                )
    main, guidance = family.main.name, family.guidance
    if guidance is not None and configs.components.get(main, {}).get(guidance.field) is not None:
        what = "the config asks for a guidance embedding, which no single file has"
        problems.append(f"{main}: {what}")
    refuse(
        problems,
        f"{configs.folder} is not the config of this file:",
        hint="--config takes a pipeline folder of the same architecture and channels",
    )


def _weights(part: Path, names: set[str]) -> dict[str, str] | None:
    """Return new to old name of a component's weight files; None when it has none to copy."""
    direct = {name for name in names if "/" not in name}
    if not has_weights(direct):
        return None
    try:
        weights = select_weights(direct, None, str(part))
    except SourceError:
        # Pickles only, which are never copied.
        return None
    if weights.is_sharded and (weights.index is None or weights.variant):
        # Not loadable under other names.
        return None
    chosen = [*weights.names, *([weights.index] if weights.index else [])]
    return {plain_name(name, weights.variant): name for name in chosen}


def _is_listed(index: Mapping[str, Any], name: str) -> bool:
    entry = index.get(name)
    return isinstance(entry, list) and len(entry) == 2 and entry[0] is not None


def fit_parts(
    configs: Configs, parts: Mapping[str, Sequence[TensorCopy]]
) -> tuple[dict[str, tuple[TensorCopy, ...]], tuple[str, ...]]:
    """Give the tensors of every component the shapes of its config.

    Components that keep their own weights are held against theirs too.

    Args:
        configs: Of a pipeline folder, checked.
        parts: Component to its tensors.

    Returns:
        The tensors in these shapes, and a line for each thing that a user should know.

    Raises:
        CheckpointError: a weight is missing, or its numbers are not those of the shape.
    """
    shaped: dict[str, tuple[TensorCopy, ...]] = {}
    problems: list[str] = []
    notes: list[str] = []
    kept = {
        name: copies_of(read_checkpoint(paths))
        for name in sorted(configs.components.keys() - parts.keys())
        if (paths := [p for n, p in configs.files.items() if _is_weight(n, name)])
    }
    for name, copies in {**parts, **kept}.items():
        class_name = str(configs.index[name][1])
        found, fit = fit_copies(name, copies, configs.components.get(name), class_name)
        if name in parts:
            shaped[name] = found
        elif fit.shapes:
            problems.append(f"{name}: its tensors have other shapes than its config asks for")
        problems += fit.problems
        notes += fit.notes
    refuse(problems, "it is not whole, or not of its configs:")
    return shaped, tuple(notes)


def _is_weight(name: str, component: str) -> bool:
    return name.startswith(f"{component}/") and name.endswith(".safetensors")
