"""The files of a pipeline's components: which weights, and what goes beside them."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from merge.errors import IntegrityError, SourceError, SourceNotFoundError
from merge.family.registry import main_names
from merge.recipe.schema import ModelRef
from merge.sources.model import ComponentFiles, SourceFile
from merge.sources.select import (
    Weights,
    companion_files,
    converted_name,
    has_weights,
    plain_name,
    select_weights,
)
from merge.sources.store import Store

# Libraries whose classes a pipeline may name; anything else is code that came with the model.
_KNOWN_LIBRARIES = ("diffusers", "transformers", "stable_diffusion")
# Classes whose folders hold no weights.
_WEIGHTLESS = ("Tokenizer", "TokenizerFast", "Processor", "FeatureExtractor")


@dataclass(frozen=True, slots=True)
class Scope:
    """What of a recipe decides which files are used.

    Attributes:
        components: What the recipe merges.
        allow_pickle: Pickles are taken where there is no safetensors file.
    """

    components: Collection[str]
    allow_pickle: bool


@dataclass(frozen=True, slots=True)
class Listed:
    """A model whose files are listed.

    Attributes:
        ref: What the recipe says of it.
        store: Its files.
        label: Its name in messages.
        scope: Which files are used.
    """

    ref: ModelRef
    store: Store
    label: str
    scope: Scope

    @property
    def prefix(self) -> str:
        """Return the folder of the repository that the model is, with `/`; mostly empty."""
        return f"{self.ref.subfolder.strip('/')}/" if self.ref.subfolder else ""


def select(model: Listed, folder: str) -> Weights:
    """Choose the weights of one folder of a model."""
    return select_weights(
        direct_files(model.store.names, folder),
        model.ref.variant,
        where_of(model.label, folder),
        is_partial=model.store.is_partial,
        allow_pickle=model.scope.allow_pickle,
    )


def select_components(
    model: Listed, index: Mapping[str, Any], *, with_weights: bool
) -> dict[str, tuple[Weights | None, list[str]]]:
    """Choose the files of every component but the main one and the scheduler."""
    label, store = model.label, model.store
    selected: dict[str, tuple[Weights | None, list[str]]] = {}
    for name, entry in sorted(index.items()):
        if not isinstance(entry, list) or len(entry) != 2 or entry[0] is None:
            continue
        refuse_own_code(name, entry, label)
        if name in (*main_names(), "scheduler"):
            continue
        if "/" in name or name.startswith("."):
            raise SourceError(f"component {name!r} of {label} is no folder name")
        folder = f"{model.prefix}{name}/"
        names, direct = below(store.names, folder), direct_files(store.names, folder)
        if not names:
            raise SourceNotFoundError(f"{label} lacks the folder of its component {name}")
        is_model = has_weights(direct) or (
            "config.json" in direct and not str(entry[1]).endswith(_WEIGHTLESS)
        )
        weights = select(model, folder) if is_model and with_weights else None
        if weights and weights.is_sharded and not weights.is_pickle:
            _check_copied_shards(weights, where_of(label, folder))
        selected[name] = (weights, companion_files(names))
    return selected


def refuse_own_code(name: str, entry: Sequence[Any], label: str) -> None:
    """Refuse a component whose class came with the model.

    Args:
        name: The component.
        entry: What the pipeline's index says of it: library and class.
        label: The pipeline's name in messages.

    Raises:
        SourceError: its library is none of those that are installed.
    """
    if entry[0] not in _KNOWN_LIBRARIES:
        raise SourceError(
            f"component {name} of {label} is code of its own ({entry[0]}.{entry[1]})",
            hint="only components of diffusers and transformers can be exported",
        )


def _check_copied_shards(weights: Weights, where: str) -> None:
    """Refuse shards that could not be loaded from an export, which copies them with their index."""
    if not weights.index:
        raise SourceNotFoundError(f"{where} has shards and lacks their index")
    if weights.variant:
        raise SourceError(
            f"{where} has its {weights.variant} weights in shards, whose index would name files "
            "that an export, where the variant's suffix is taken off, does not have",
            hint="take the plain weights, or save the model again in one file",
        )


def component_files(
    model: Listed,
    selected: Mapping[str, tuple[Weights | None, list[str]]],
    index: Mapping[str, Any],
    configs: Mapping[str, Mapping[str, Any]],
) -> tuple[ComponentFiles, ...]:
    """Return the files of the chosen components, with their names in an export.

    Args:
        model: What they are of.
        selected: Component to its weights and the files beside them.
        index: The pipeline's model_index.json.
        configs: File name to what it holds, with the components' own configs.
    """
    components = []
    for name, (weights, companions) in selected.items():
        folder = f"{model.prefix}{name}/"
        exports = {companion: f"{name}/{companion}" for companion in companions}
        converted = index_name = ""
        if weights and weights.is_pickle:
            converted = f"{name}/{converted_name(weights.names[0], weights.variant)}"
            exports |= dict.fromkeys(weights.names, converted)
        elif weights:
            index_name = weights.index or ""
            chosen = [*weights.names, *([index_name] if index_name else [])]
            exports |= {file: f"{name}/{plain_name(file, weights.variant)}" for file in chosen}
        files = source_files(model, folder, exports)
        by_name = dict(zip(exports, files, strict=True))
        holding = tuple(by_name[file] for file in (weights.names if weights else ()))
        components.append(
            ComponentFiles(
                name,
                files,
                tuple(exports.values()),
                holding,
                by_name[index_name] if index_name else None,
                converted,
                str(index[name][1]),
                configs.get(f"{folder}config.json"),
            )
        )
    return tuple(components)


def source_files(model: Listed, folder: str, names: Iterable[str]) -> tuple[SourceFile, ...]:
    """Return files of a folder with their sizes and what their digests should be.

    Raises:
        SourceNotFoundError: a file cannot be read.
        IntegrityError: the recipe states another digest than the Hub.
    """
    files = []
    for name in names:
        file = model.store.file(f"{folder}{name}")
        wanted = model.ref.sha256.get(file.name)
        if wanted and file.hub is not None and file.hub.sha256 not in ("", wanted):
            raise IntegrityError(
                f"{file.name} has SHA-256 {file.hub.sha256} on the Hub, and {wanted} is expected",
                hint="correct sha256 in the recipe, or name the revision that it is of",
            )
        files.append(dataclasses.replace(file, expected_sha256=wanted or file.expected_sha256))
    return tuple(files)


def component_configs(model: Listed, selected: Iterable[str]) -> set[str]:
    """Return the config files of the chosen components, where they are."""
    return {f"{model.prefix}{name}/config.json" for name in selected} & model.store.names


def below(names: frozenset[str], prefix: str) -> frozenset[str]:
    """Return the names below a folder, relative to it."""
    return frozenset(name.removeprefix(prefix) for name in names if name.startswith(prefix))


def direct_files(names: frozenset[str], prefix: str) -> frozenset[str]:
    """Return the names in a folder, without those of its folders."""
    return frozenset(name for name in below(names, prefix) if "/" not in name)


def where_of(label: str, prefix: str) -> str:
    """Return a folder's name in messages."""
    return f"{label}/{prefix.rstrip('/')}" if prefix else label
