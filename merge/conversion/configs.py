"""The folder that gives a single file's tensors their configs and tokenizers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from merge.errors import CheckpointError, SourceError, SourceNotFoundError
from merge.layout import TensorCopy, copies_of, fit_copies
from merge.plan.compat import WHOLE_HINT
from merge.reader import read_checkpoint
from merge.sources.components import refuse_own_code
from merge.sources.select import companion_files, has_weights, plain_name, select_weights

_CONVERTED = ("unet", "vae", "text_encoder", "text_encoder_2")
# Component, key of its config, tensor, and which of its dimensions the key gives.
_SIZES = (
    ("unet", "in_channels", "conv_in.weight", 1),
    ("unet", "out_channels", "conv_out.weight", 0),
    ("unet", "cross_attention_dim", ".attn2.to_k.weight", 1),
    ("unet", "projection_class_embeddings_input_dim", "add_embedding.linear_1.weight", 1),
    ("vae", "latent_channels", "decoder.conv_in.weight", 1),
    ("text_encoder", "hidden_size", "text_model.embeddings.token_embedding.weight", 1),
    ("text_encoder", "vocab_size", "text_model.embeddings.token_embedding.weight", 0),
    ("text_encoder_2", "hidden_size", "text_model.embeddings.token_embedding.weight", 1),
    ("text_encoder_2", "projection_dim", "text_projection.weight", 0),
)


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
        if not isinstance(entry, list) or len(entry) != 2 or entry[0] is None:
            continue
        part = folder / name
        refuse_own_code(name, entry, str(folder))
        if "/" in name or name.startswith(".") or not part.is_dir():
            raise SourceNotFoundError(f"{folder} lacks the folder of its component {name}")
        names = {str(p.relative_to(part)) for p in part.rglob("*") if p.is_file()}
        if name not in _CONVERTED and "config.json" in names:
            weights = _weights(part, names)
            if weights is None:
                missing.append(name)
                continue
            files |= {f"{name}/{new}": part / old for new, old in weights.items()}
        files |= {f"{name}/{other}": part / other for other in companion_files(names)}
        if (part / "config.json").is_file():
            components[name] = read_json(part / "config.json")
    return Configs(folder, index, files, tuple(missing), components)


def check_configs(configs: Configs, parts: Mapping[str, Sequence[TensorCopy]]) -> None:
    """Compare the sizes that the configs state with the tensors.

    Args:
        configs: Of a pipeline folder.
        parts: Component to its tensors.

    Raises:
        CheckpointError: the folder describes another model; the message lists every difference.
    """
    wanted = {name for name in _CONVERTED if _is_listed(configs.index, name)}
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
    for component, key, suffix, axis in _SIZES:
        stated = configs.components.get(component, {}).get(key)
        shape = next((c.shape for c in parts.get(component, ()) if c.name.endswith(suffix)), ())
        if isinstance(stated, int) and len(shape) > axis and shape[axis] != stated:
            problems.append(
                f"{component}: {key} is {stated} in the config and {shape[axis]} in the file"
            )
    if configs.components.get("unet", {}).get("time_cond_proj_dim") is not None:
        problems.append("unet: the config asks for a guidance embedding, which no single file has")
    if problems:
        raise CheckpointError(
            "\n  ".join([f"{configs.folder} is not the config of this file:", *problems]),
            hint="--config takes a pipeline folder of the same architecture and channels",
        )


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON object.

    Raises:
        CheckpointError: the file cannot be read or holds something else.
    """
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(tree, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return tree


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
        for name in configs.components.keys() - parts.keys()
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
    if problems:
        raise CheckpointError(
            "\n  ".join(["it is not whole, or not of its configs:", *problems]), hint=WHOLE_HINT
        )
    return shaped, tuple(notes)


def _is_weight(name: str, component: str) -> bool:
    return name.startswith(f"{component}/") and name.endswith(".safetensors")
