"""What a resolved model is: names and sizes of files, no bytes and no open handles."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class HubFile:
    """What the Hub says of one file of a repository.

    Attributes:
        repo: Hub id.
        revision: Branch, tag or commit as the recipe has it.
        commit: The 40 hexadecimal digits that the revision was resolved to.
        name: Path inside the repository.
        sha256: Of a large file; empty for small ones, and offline.
        blob_id: Git's SHA-1 of a small file; empty for large ones, and offline.
        size_bytes: None offline, and where a mirror does not say.
    """

    repo: str
    revision: str
    commit: str
    name: str
    sha256: str = ""
    blob_id: str = ""
    size_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One file of a model.

    Attributes:
        name: Path inside the model with `/`, e.g. `unet/config.json`.
        path: Where it is on this disk, or will be once it is fetched.
        size_bytes: Its size when it was resolved.
        expected_sha256: From the recipe, a lock or the Hub; empty when none states one.
        hub: What the Hub says of it; None for local files.
    """

    name: str
    path: Path
    size_bytes: int
    expected_sha256: str = ""
    hub: HubFile | None = None

    @property
    def is_present(self) -> bool:
        """Return False for a file of the Hub that is not in the cache yet."""
        return self.hub is None or self.path.exists()


@dataclass(frozen=True, slots=True)
class ComponentFiles:
    """The files of one pipeline component that an export needs.

    Attributes:
        name: Folder name, e.g. `vae`.
        files: Weights and everything beside them, without duplicates in other formats.
        export_names: For each file its name in an export: the variant suffix taken off.
        weights: Those of the files that hold its tensors.
        index: The file that says which shard holds which tensor.
        converted_name: The safetensors file of an export that pickled weights are converted to;
            empty for weights that are copied.
        class_name: What the pipeline says that it is, e.g. `AutoencoderKL`.
        config: Its parsed `config.json`, if it has one.
    """

    name: str
    files: tuple[SourceFile, ...]
    export_names: tuple[str, ...]
    weights: tuple[SourceFile, ...] = ()
    index: SourceFile | None = None
    converted_name: str = ""
    class_name: str = ""
    config: Mapping[str, Any] | None = None

    @property
    def copies(self) -> Mapping[str, SourceFile]:
        """Return name in an export to file, of everything that is copied byte for byte."""
        if self.converted_name:
            return self.companions
        return dict(zip(self.export_names, self.files, strict=True))

    @property
    def companions(self) -> Mapping[str, SourceFile]:
        """Return name in an export to file, of everything but the weights and their index."""
        weights = {file.name for file in (*self.weights, self.index) if file is not None}
        pairs = zip(self.export_names, self.files, strict=True)
        return {name: file for name, file in pairs if file.name not in weights}


@dataclass(frozen=True, slots=True)
class Pipeline:
    """A whole diffusers pipeline folder.

    Attributes:
        model_index: Parsed `model_index.json`.
        components: Every component but the main one and the scheduler, sorted by name.
    """

    model_index: Mapping[str, Any]
    components: tuple[ComponentFiles, ...]


@dataclass(frozen=True, slots=True)
class ResolvedModel:
    """A model of the recipe and the files that stand for it.

    Attributes:
        role: `target`, `base`, `distilled`, or `distilled[1]` when there are several.
        label: Hub id, or the name of the local folder or file; never a machine's path.
        repo: Hub id, or None for a local model.
        commit: The 40 hexadecimal digits that `repo` was resolved to.
        root: Local folder that file names are relative to.
        is_folder: False when the recipe names one weight file.
        weights: Component to the files of its tensors, the main component's first; one entry
            without a name for a LoRA, and for a network or a single file that stands alone.
        variant: The weight variant that was taken, empty for plain files.
        config: Parsed `config.json` of the main component, if there is one.
        scheduler: Parsed scheduler config, if there is one.
        pipeline: For a target that is a whole pipeline.
        config_label: Where a single file's configs are from: a folder's name, or a Hub id and
            commit.
        config_files: The JSON files that `config`, `scheduler` and `pipeline` were read from.
        allow_pickle: The recipe lets its weights be pickles.
        adapter_config: Parsed `adapter_config.json` of peft, for a LoRA that has one.
        ema: Whether a moving average beside its plain weights is taken: True, False or `auto`.
    """

    role: str
    label: str
    repo: str | None
    commit: str | None
    root: Path
    is_folder: bool
    weights: Mapping[str, tuple[SourceFile, ...]]
    variant: str = ""
    config: Mapping[str, Any] | None = None
    scheduler: Mapping[str, Any] | None = None
    pipeline: Pipeline | None = None
    config_label: str = ""
    config_files: tuple[SourceFile, ...] = ()
    allow_pickle: bool = False
    adapter_config: Mapping[str, Any] | None = None
    ema: str | bool = "auto"

    @property
    def main_files(self) -> tuple[SourceFile, ...]:
        """Return the files of the main component, or of all that there is."""
        return next(iter(self.weights.values()))

    @property
    def files(self) -> tuple[SourceFile, ...]:
        """Return every file of the model that is used, once, sorted by name."""
        parts = self.pipeline.components if self.pipeline is not None else ()
        groups = (
            self.config_files,
            *self.weights.values(),
            *(part.files for part in parts),
        )
        by_name = {file.name: file for group in groups for file in group}
        return tuple(by_name[name] for name in sorted(by_name))

    def expecting(self, sha256: Mapping[str, str]) -> ResolvedModel:
        """Return the model with other digests expected of its files, by name."""

        def pin(files: tuple[SourceFile, ...]) -> tuple[SourceFile, ...]:
            return tuple(replace(file, expected_sha256=sha256[file.name]) for file in files)

        pipeline = self.pipeline
        if pipeline is not None:
            components = tuple(
                replace(
                    part,
                    files=pin(part.files),
                    weights=pin(part.weights),
                    index=pin((part.index,))[0] if part.index is not None else None,
                )
                for part in pipeline.components
            )
            pipeline = replace(pipeline, components=components)
        return replace(
            self,
            weights={name: pin(files) for name, files in self.weights.items()},
            pipeline=pipeline,
            config_files=pin(self.config_files),
        )

    def merged_files(self, components: Collection[str]) -> tuple[SourceFile, ...]:
        """Return the files that decide merged weights when these components are merged."""
        first, *others = self.weights
        names = (first, *(name for name in others if name in components))
        scales = self.config_files if self.adapter_config is not None else ()
        return (*(file for name in names for file in self.weights[name]), *scales)


@dataclass(frozen=True, slots=True)
class Sources:
    """All models of a recipe.

    Attributes:
        target: Receives the delta.
        distilled: In recipe order.
        base: What the full distilled models started from.
    """

    target: ResolvedModel
    distilled: tuple[ResolvedModel, ...]
    base: ResolvedModel | None

    @staticmethod
    def by_role(models: Mapping[str, ResolvedModel]) -> Sources:
        """Return the models of a recipe, given by their roles."""
        distilled = (model for role, model in models.items() if role not in ("target", "base"))
        return Sources(models["target"], tuple(distilled), models.get("base"))

    @property
    def models(self) -> tuple[ResolvedModel, ...]:
        """Return target, base if there is one, then distilled."""
        base = (self.base,) if self.base is not None else ()
        return (self.target, *base, *self.distilled)
