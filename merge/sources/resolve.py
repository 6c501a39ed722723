"""Find each model's layout and list the files it needs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from merge.errors import OfflineError, SourceError, SourceNotFoundError
from merge.pickles import PICKLE_SUFFIXES
from merge.recipe.bundled import bundled_folder
from merge.recipe.schema import ModelRef, Recipe
from merge.sources.components import (
    Scope,
    below,
    component_files,
    direct_files,
    select,
    select_components,
    source_files,
    where_of,
)
from merge.sources.model import Pipeline, ResolvedModel, Sources
from merge.sources.select import PICKLE_HINT, Weights, has_weights
from merge.sources.store import HubStore, LocalStore, Store

_IN_NO_SINGLE_FILE = ("safety_checker", "feature_extractor", "image_encoder")
TEXT_ENCODERS = ("text_encoder", "text_encoder_2")
_MAX_JSON_BYTES = 16 * 1024 * 1024


def resolve_sources(recipe: Recipe) -> Sources:
    """Turn the models of a recipe into files of this disk, downloading what is missing.

    Only the files that the merge and the export need are fetched from the Hub, all of one commit.

    Raises:
        SourceError: a model is not there, not readable or not of a known layout.
    """
    models, scope = recipe.models, Scope(recipe.components, recipe.allow_pickle)
    base = None if models.base is None else _resolve(models.base, "base", scope)
    several = len(models.distilled) > 1
    distilled = tuple(
        _resolve(ref, f"distilled[{index}]" if several else "distilled", scope)
        for index, ref in enumerate(models.distilled)
    )
    return Sources(_resolve(models.target, "target", scope), distilled, base)


def _resolve(ref: ModelRef, role: str, scope: Scope) -> ResolvedModel:
    try:
        model = _resolve_layout(ref, role, scope)
        if unused := _unused_digests(ref, model):
            raise SourceError(f"sha256 names files that are not used: {', '.join(unused)}")
        return model
    except SourceError as error:
        error.message = f"models.{role}: {error.message}"
        raise


def _resolve_layout(ref: ModelRef, role: str, scope: Scope) -> ResolvedModel:
    if ref.path is not None:
        path = Path(ref.path)
        if path.is_file():
            return _resolve_file(ref, role, path, scope)
        if not path.is_dir():
            hint = "paths are relative to the recipe file, those of overrides to this folder"
            if path.is_relative_to(bundled_folder()):
                hint = "the demo's models are made by `make demo` in a clone of the repository"
            raise SourceNotFoundError(f"there is no file or folder {path}", hint=hint)
        return _resolve_folder(ref, role, LocalStore.open(path), path.name or str(path), scope)
    assert ref.repo is not None
    store = HubStore.open(ref.repo, ref.revision)
    try:
        return _resolve_folder(ref, role, store, ref.repo, scope)
    except SourceNotFoundError as error:
        if store.offline:
            # The cache holds only what was downloaded before, so a gap says nothing of the repo.
            raise OfflineError(
                f"the cache lacks files of {ref.repo}: {error.message}",
                hint=f"on a machine with a network run `hf download {ref.repo} "
                f"--revision {store.commit}`",
            ) from error
        raise


def _resolve_file(ref: ModelRef, role: str, path: Path, scope: Scope) -> ResolvedModel:
    _check_suffix(path.name, scope)
    store = LocalStore(path.parent, frozenset({path.name}))
    weights = source_files(ref, store, "", (path.name,))
    configs = _open_configs(ref.config, role) if ref.config is not None else _NO_CONFIGS
    return ResolvedModel(
        role=role,
        label=path.name,
        repo=None,
        commit=None,
        root=path.parent,
        is_folder=False,
        weights=weights,
        variant="",
        config=configs.unet,
        scheduler=configs.scheduler,
        pipeline=configs.pipeline,
        config_label=configs.label,
        allow_pickle=scope.allow_pickle,
    )


def _check_suffix(name: str, scope: Scope) -> None:
    if name.endswith(PICKLE_SUFFIXES) and not scope.allow_pickle:
        raise SourceError(f"{name} is no .safetensors file but a pickle", hint=PICKLE_HINT)
    if not name.endswith((".safetensors", *PICKLE_SUFFIXES)):
        raise SourceError(f"{name} is no .safetensors file")


@dataclass(frozen=True, slots=True)
class _Configs:
    """What a single file lacks: configs, tokenizers, and the names of the components."""

    unet: Mapping[str, Any] | None = None
    scheduler: Mapping[str, Any] | None = None
    pipeline: Pipeline | None = None
    label: str = ""


_NO_CONFIGS = _Configs()


def _open_configs(text: str, role: str) -> _Configs:
    """Read the folder or repository that a single file takes its configs from; no weights."""
    store: LocalStore | HubStore
    if text.startswith((".", "/", "~")):
        store = LocalStore.open(Path(text).expanduser())
        label = Path(text).name
    else:
        repo, _, revision = text.partition("@")
        store = HubStore.open(repo, revision or None)
        label = f"{repo}@{store.commit}"
    candidates = [name for name in ("unet/config.json", "config.json") if name in store.names]
    if not candidates:
        raise SourceNotFoundError(f"config: there is no config.json of a UNet in {text}")
    scheduler_name = "scheduler/scheduler_config.json"
    needed = {candidates[0], *({scheduler_name, "model_index.json"} & store.names)}
    store.fetch(needed)
    scheduler = _read_json(store.path(scheduler_name)) if scheduler_name in store.names else None
    pipeline = None
    if role == "target" and "model_index.json" in store.names:
        pipeline = _pipeline_without_weights(store, label)
    return _Configs(_read_json(store.path(candidates[0])), scheduler, pipeline, label)


def _pipeline_without_weights(store: Store, label: str) -> Pipeline:
    """Take a pipeline's configs; its weights come from the single file."""
    index = _read_json(store.path("model_index.json"))
    for name, entry in list(index.items()):
        # A safety checker is in no single file.
        if name in _IN_NO_SINGLE_FILE and isinstance(entry, list):
            index[name] = [None, None]
            index["requires_safety_checker"] = False
    selected = select_components(index, store, "", None, label, None)
    store.fetch([f"{name}/{file}" for name, (_, files) in selected.items() for file in files])
    return Pipeline(index, component_files(ModelRef(), store, "", selected))


def _resolve_folder(
    ref: ModelRef, role: str, store: Store, label: str, scope: Scope
) -> ResolvedModel:
    prefix = f"{ref.subfolder.strip('/')}/" if ref.subfolder else ""
    inside = below(store.names, prefix)
    if ref.subfolder and not inside:
        raise SourceNotFoundError(f"it has no folder {ref.subfolder}")
    if ref.file is not None:
        return _resolve_repo_file(ref, role, store, label, prefix, scope)
    is_pipeline = "model_index.json" in inside
    unet = f"{prefix}unet/" if is_pipeline or below(inside, "unet/") else prefix
    weights = select(
        store, direct_files(store.names, unet), ref.variant, where_of(label, unet), scope
    )
    needed = {f"{unet}{name}" for name in weights.names}
    config_name = f"{unet}config.json"
    scheduler_name = f"{prefix}scheduler/scheduler_config.json"
    needed |= {config_name, scheduler_name} & store.names
    if weights.index:
        needed.add(f"{unet}{weights.index}")
    selected: dict[str, tuple[Weights | None, list[str]]] = {}
    index: Mapping[str, Any] = {}
    if is_pipeline and role == "target":
        index_name = f"{prefix}model_index.json"
        store.fetch([index_name])
        index = _read_json(store.path(index_name))
        selected = select_components(index, store, prefix, ref.variant, label, scope)
        for component, (chosen, companions) in selected.items():
            names = [*(chosen.names if chosen else ()), *companions]
            needed |= {f"{prefix}{component}/{name}" for name in names}
            if chosen and chosen.index:
                needed.add(f"{prefix}{component}/{chosen.index}")
    text = _select_text_encoders(ref, role, store, prefix, label, scope)
    for name, chosen in text.items():
        needed |= {f"{prefix}{name}/{file}" for file in chosen.names}
    store.fetch(needed)
    if weights.index:
        _check_index(store.path(f"{unet}{weights.index}"), weights)
    for component, (chosen, _) in selected.items():
        if chosen and chosen.index:
            _check_index(store.path(f"{prefix}{component}/{chosen.index}"), chosen)
    pipeline = None
    text_encoders = {
        name: source_files(ref, store, f"{prefix}{name}/", chosen.names)
        for name, chosen in text.items()
    }
    if is_pipeline and role == "target":
        pipeline = Pipeline(index, component_files(ref, store, prefix, selected))
        text_encoders = {
            part.name: part.weights for part in pipeline.components if part.name in TEXT_ENCODERS
        }
    return ResolvedModel(
        role=role,
        label=label,
        repo=ref.repo,
        commit=store.commit if isinstance(store, HubStore) else None,
        root=store.path(""),
        is_folder=True,
        weights=source_files(ref, store, unet, weights.names),
        variant=weights.variant,
        config=_read_json(store.path(config_name)) if config_name in store.names else None,
        scheduler=(
            _read_json(store.path(scheduler_name)) if scheduler_name in store.names else None
        ),
        pipeline=pipeline,
        text_encoders=text_encoders,
        allow_pickle=scope.allow_pickle,
    )


def _select_text_encoders(
    ref: ModelRef, role: str, store: Store, prefix: str, label: str, scope: Scope
) -> dict[str, Weights]:
    """Choose the text encoders of base and distilled that the recipe merges; a target has all."""
    if role == "target":
        return {}
    chosen = {}
    for name in TEXT_ENCODERS:
        names = direct_files(store.names, f"{prefix}{name}/")
        if name in scope.components and has_weights(names):
            where = where_of(label, f"{prefix}{name}/")
            chosen[name] = select(store, names, ref.variant, where, scope)
    return chosen


def _resolve_repo_file(
    ref: ModelRef, role: str, store: Store, label: str, prefix: str, scope: Scope
) -> ResolvedModel:
    assert ref.file is not None
    name = f"{prefix}{ref.file}"
    if name not in store.names:
        raise SourceNotFoundError(f"{label} has no file {name}")
    _check_suffix(name, scope)
    store.fetch([name])
    commit = store.commit if isinstance(store, HubStore) else None
    weights = source_files(ref, store, "", (name,))
    root = store.path("")
    return ResolvedModel(
        role=role,
        label=label,
        repo=ref.repo,
        commit=commit,
        root=root,
        is_folder=False,
        weights=weights,
        variant="",
        config=None,
        scheduler=None,
        pipeline=None,
        allow_pickle=scope.allow_pickle,
    )


def _check_index(path: Path, weights: Weights) -> None:
    """Check that an index names the shards that are there and nothing outside the folder."""
    entries = _read_json(path).get("weight_map")
    if not isinstance(entries, dict) or not all(isinstance(v, str) for v in entries.values()):
        raise SourceError(f"{path.name}: it has no weight_map from tensors to files")
    for name in sorted(set(entries.values())):
        if PurePosixPath(name).name != name or name in ("", ".", ".."):
            raise SourceError(f"{path.name}: {name!r} is not the name of a file beside it")
        if name not in weights.names:
            raise SourceNotFoundError(f"{path.name} names the shard {name}, which is missing")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise SourceError(f"{path} is too large for a config")
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise SourceError(f"{path} cannot be read: {error}") from error
    if not isinstance(tree, dict):
        raise SourceError(f"{path} is not a JSON object")
    return tree


def _unused_digests(ref: ModelRef, model: ResolvedModel) -> list[str]:
    used = {file.name for file in model.weights}
    if model.pipeline is not None:
        used |= {file.name for part in model.pipeline.components for file in part.files}
    return sorted(set(ref.sha256) - used)
