"""Find each model's layout and list the files it needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from merge.errors import OfflineError, SourceError, SourceNotFoundError
from merge.family.registry import main_among, main_names, mergeable_names
from merge.lora.metadata import CONFIG_NAME
from merge.reader.pickles.archive import PICKLE_SUFFIXES
from merge.recipe.bundled import bundled_folder
from merge.recipe.schema import ModelRef, Recipe
from merge.sources.components import (
    Listed,
    Scope,
    below,
    component_configs,
    component_files,
    direct_files,
    select,
    select_components,
    source_files,
)
from merge.sources.configs import check_index, read_configs
from merge.sources.fetch import fetch_sources
from merge.sources.hub_errors import naming
from merge.sources.model import Pipeline, ResolvedModel, SourceFile, Sources
from merge.sources.select import PICKLE_HINT, has_weights
from merge.sources.store import HubStore, LocalStore, Store

_IN_NO_SINGLE_FILE = ("safety_checker", "feature_extractor", "image_encoder")
# As peft names the weights of an adapter.
_PEFT_STEM = "adapter_model"
# Of a model that only gives its configs.
_NO_WEIGHTS = Scope((), allow_pickle=False)


def resolve_sources(recipe: Recipe, *, download: bool = True) -> Sources:
    """Turn the models of a recipe into files of this disk.

    Every branch and tag becomes a commit once, before anything is read, and all files of a model
    are of that commit. Only the files that the merge and the export need are fetched.

    Args:
        recipe: A checked recipe.
        download: False: fetch only the small JSON files that tell a model's layout. Headers of
            the rest can still be read, and `fetch_sources` gets it later.

    Raises:
        SourceError: a model is not there, not readable or not of a known layout.
    """
    resolver = _Resolver(Scope(recipe.components or (), recipe.allow_pickle))
    refs = recipe.models.by_role
    # The target last: it is the largest, and what is wrong with the others is said before.
    refs["target"] = refs.pop("target")
    for role, ref in refs.items():
        resolver.pin(ref, role)
    sources = Sources.by_role({role: resolver.resolve(ref, role) for role, ref in refs.items()})
    if download:
        fetch_sources(sources)
    return sources


class _Resolver:
    """Resolves the models of one recipe, each revision of a repository once."""

    def __init__(self, scope: Scope) -> None:
        self._scope = scope
        self._stores: dict[tuple[str, str | None], HubStore] = {}

    def pin(self, ref: ModelRef, role: str) -> None:
        """Find the commits of a model and of its configs."""
        with naming(role):
            if ref.repo is not None:
                self._open(ref.repo, ref.revision)
            if ref.config is not None and not _is_local(ref.config):
                self._config_store(ref.config)

    def resolve(self, ref: ModelRef, role: str) -> ResolvedModel:
        """Find the files of a model."""
        with naming(role):
            model = self._resolve_layout(ref, role)
            if unused := sorted(set(ref.sha256) - {file.name for file in model.files}):
                raise SourceError(f"sha256 names files that are not used: {', '.join(unused)}")
            return model

    def _open(self, repo: str, revision: str | None) -> HubStore:
        key = (repo, revision)
        if key not in self._stores:
            self._stores[key] = HubStore.open(repo, revision)
        return self._stores[key]

    def _resolve_layout(self, ref: ModelRef, role: str) -> ResolvedModel:
        if ref.path is not None:
            path = Path(ref.path)
            if path.is_file():
                beside = {CONFIG_NAME} if (path.parent / CONFIG_NAME).is_file() else set()
                store = LocalStore(path.parent, frozenset({path.name, *beside}))
                return self._resolve_file(
                    Listed(ref, store, path.name, self._scope), role, path.name
                )
            if not path.is_dir():
                hint = "paths are relative to the recipe file, those of overrides to this folder"
                if path.is_relative_to(bundled_folder()):
                    hint = "the demo's models are made by `make demo` in a clone of the repository"
                raise SourceNotFoundError(f"there is no file or folder {path}", hint=hint)
            store = LocalStore.open(path)
            return _resolve_folder(Listed(ref, store, path.name or str(path), self._scope), role)
        assert ref.repo is not None
        hub = self._open(ref.repo, ref.revision)
        opened = Listed(ref, hub, ref.repo, self._scope)
        try:
            if ref.file is None:
                return _resolve_folder(opened, role)
            name = f"{opened.prefix}{ref.file}"
            if name not in hub.names:
                raise SourceNotFoundError(f"{ref.repo} has no file {name}")
            return self._resolve_file(opened, role, name)
        except SourceNotFoundError as error:
            if hub.is_partial:
                # The cache holds only what was downloaded before: a gap says nothing of the repo.
                raise OfflineError(
                    f"the cache lacks files of {ref.repo}: {error.message}",
                    hint=f"on a machine with a network run `hf download {ref.repo} "
                    f"--revision {hub.commit}`",
                ) from error
            raise

    def _resolve_file(self, opened: Listed, role: str, name: str) -> ResolvedModel:
        _check_suffix(name, self._scope)
        weights = source_files(opened, "", (name,))
        model = _begun(opened, role, is_folder=False)
        if opened.ref.config is not None:
            store = self._config_store(opened.ref.config)
            model = _with_configs(model, store, opened.ref.config)
        adapter = read_configs(opened, _adapter_config(name, opened.store))
        return replace(
            model,
            weights={"": weights},
            config_files=(*model.config_files, *adapter.files),
            adapter_config=next(iter(adapter.trees.values()), None),
        )

    def _config_store(self, text: str) -> Store:
        if _is_local(text):
            return LocalStore.open(Path(text).expanduser())
        repo, _, revision = text.partition("@")
        return self._open(repo, revision or None)


def _is_local(config: str) -> bool:
    return config.startswith((".", "/", "~"))


def _begun(opened: Listed, role: str, *, is_folder: bool) -> ResolvedModel:
    """Return what is known of a model before any of its files is looked at."""
    return ResolvedModel(
        role=role,
        label=opened.label,
        repo=opened.ref.repo,
        commit=opened.store.commit,
        root=opened.store.root,
        is_folder=is_folder,
        weights={},
        allow_pickle=opened.scope.allow_pickle,
        ema=opened.ref.ema,
    )


def _adapter_config(weights: str, store: Store) -> set[str]:
    """Return peft's config beside a file of its own name, where it is."""
    folder, _, name = weights.rpartition("/")
    config = f"{folder}/{CONFIG_NAME}" if folder else CONFIG_NAME
    return {config} & store.names if name.startswith(_PEFT_STEM) else set()


def _check_suffix(name: str, scope: Scope) -> None:
    suffix = Path(name).suffix.lower()
    if suffix in PICKLE_SUFFIXES and not scope.allow_pickle:
        raise SourceError(f"{name} is no .safetensors file but a pickle", hint=PICKLE_HINT)
    if suffix not in (".safetensors", *PICKLE_SUFFIXES):
        raise SourceError(f"{name} is no .safetensors file")


def _with_configs(model: ResolvedModel, store: Store, text: str) -> ResolvedModel:
    """Give a single file what it lacks, from a folder or repository: configs and tokenizers."""
    label = Path(text).name if store.commit is None else f"{text.partition('@')[0]}@{store.commit}"
    places = [*(f"{name}/config.json" for name in main_names()), "config.json"]
    candidates = [name for name in places if name in store.names]
    if not candidates:
        raise SourceNotFoundError(f"config: there is no config.json of a UNet in {text}")
    scheduler_name = "scheduler/scheduler_config.json"
    needed = {candidates[0], *({scheduler_name, "model_index.json"} & store.names)}
    opened = Listed(ModelRef(), store, label, _NO_WEIGHTS)
    configs = read_configs(opened, needed)
    pipeline = None
    if model.role == "target" and "model_index.json" in configs.trees:
        pipeline = _pipeline_without_weights(opened, configs.trees["model_index.json"])
    return replace(
        model,
        config=configs.trees[candidates[0]],
        scheduler=configs.trees.get(scheduler_name),
        pipeline=pipeline,
        config_label=label,
        config_files=configs.files,
    )


def _pipeline_without_weights(opened: Listed, found: Mapping[str, Any]) -> Pipeline:
    """Take a pipeline's configs; its weights come from the single file."""
    index = dict(found)
    for name, entry in list(index.items()):
        # A safety checker is in no single file.
        if name in _IN_NO_SINGLE_FILE and isinstance(entry, list):
            index[name] = [None, None]
            index["requires_safety_checker"] = False
    selected = select_components(opened, index, with_weights=False)
    configs = read_configs(opened, component_configs(opened, selected))
    return Pipeline(index, component_files(opened, selected, index, configs.trees))


def _resolve_folder(opened: Listed, role: str) -> ResolvedModel:
    """Find the files of a folder, which is a pipeline or a network alone."""
    ref, store, prefix = opened.ref, opened.store, opened.prefix
    inside = below(store.names, prefix)
    if ref.subfolder and not inside:
        raise SourceNotFoundError(f"it has no folder {ref.subfolder}")
    is_pipeline = "model_index.json" in inside
    is_target = is_pipeline and role == "target"
    main = _main_component(inside, is_pipeline)
    folder = f"{prefix}{main}/" if main else prefix
    weights = select(opened, folder)
    config_name = f"{folder}config.json"
    scheduler_name = f"{prefix}scheduler/scheduler_config.json"
    index_name = f"{prefix}model_index.json"
    needed = {config_name, scheduler_name} & store.names
    adapter = _adapter_config(f"{folder}{weights.names[0]}", store)
    needed |= adapter
    if weights.index:
        needed.add(f"{folder}{weights.index}")
    if is_target:
        needed.add(index_name)
    configs = read_configs(opened, needed)
    if weights.index:
        name = f"{folder}{weights.index}"
        check_index(name, configs.trees[name], weights)
    pipeline = None
    others = {} if role == "target" else _other_weights(opened)
    if is_target:
        index = configs.trees[index_name]
        selected = select_components(opened, index, with_weights=True)
        for component, (chosen, _) in selected.items():
            if chosen and chosen.index:
                name = f"{prefix}{component}/{chosen.index}"
                check_index(name, read_configs(opened, [name]).trees[name], chosen)
        parts = read_configs(opened, component_configs(opened, selected))
        pipeline = Pipeline(index, component_files(opened, selected, index, parts.trees))
        merged = _other_mergeable()
        others = {part.name: part.weights for part in pipeline.components if part.name in merged}
    return replace(
        _begun(opened, role, is_folder=True),
        weights={main: source_files(opened, folder, weights.names), **others},
        variant=weights.variant,
        config=configs.trees.get(config_name),
        scheduler=configs.trees.get(scheduler_name),
        pipeline=pipeline,
        config_files=configs.files,
        adapter_config=next((configs.trees[name] for name in adapter), None),
    )


def _main_component(inside: frozenset[str], is_pipeline: bool) -> str:
    """Return the folder of the main component; empty where the model is that folder itself."""
    found = main_among(lambda name: bool(below(inside, f"{name}/")))
    return found or (main_names()[0] if is_pipeline else "")


def _other_mergeable() -> list[str]:
    """Return the components that a recipe may merge beside a main one."""
    return [name for name in mergeable_names() if name not in main_names()]


def _other_weights(opened: Listed) -> dict[str, tuple[SourceFile, ...]]:
    """Return the files of the other components that the recipe merges, where they are."""
    found = {}
    for name in _other_mergeable():
        folder = f"{opened.prefix}{name}/"
        names = direct_files(opened.store.names, folder)
        if name in opened.scope.components and has_weights(names):
            found[name] = source_files(opened, folder, select(opened, folder).names)
    return found
