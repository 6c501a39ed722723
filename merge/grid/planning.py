"""Which cells a grid has: every recipe checked and planned before anything slow begins."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from merge.editor.settings import EditSettings
from merge.errors import PlanError, ProblemsError, RecipeError, VerificationError
from merge.grid.axes import Axis, AxisValue, combinations
from merge.grid.inputs import make_samples
from merge.grid.jobs import BenchSpec
from merge.grid.model import Cell, Sample
from merge.json_files import canonical_bytes
from merge.recipe.load import override_recipe
from merge.recipe.schema import Recipe
from merge.records.lock.model import Lock
from merge.run.model import Progress
from merge.run.prepare import PreparedRun, prepare_run, sketch_run
from merge.verify.model import Edit

Found = TypeVar("Found")


class CellPlanner:
    """Makes cells of overrides, over models that are resolved, read and hashed once."""

    def __init__(
        self,
        recipe: Recipe,
        edits: Sequence[Edit],
        *,
        overrides: Sequence[str] = (),
        count: int | None = None,
        lock: Lock | None = None,
        on_progress: Progress | None = None,
        is_dry: bool = False,
    ) -> None:
        """Prepare nothing yet.

        Args:
            recipe: What every cell begins with.
            edits: What every cell edits.
            overrides: Those that are in the recipe already.
            count: Samples; None: every edit with every seed of the recipe.
            lock: Use exactly the files that it names.
            on_progress: As for `prepare_run`.
            is_dry: Look at headers alone; nothing can be measured then.
        """
        # A weight of 0 belongs into a curve, and decides no bytes.
        self.recipe = dataclasses.replace(recipe, allow_noop=True)
        self.edits = tuple(edits)
        self._overrides = tuple(overrides)
        self._count = count
        self._lock = lock
        self._tell = on_progress
        self._is_dry = is_dry
        self._prepared: dict[bytes, PreparedRun] = {}
        self._digests: dict[tuple[int, bytes], str] = {}

    @property
    def prepared(self) -> tuple[PreparedRun, ...]:
        """Return the models, once for each set of them that a cell has."""
        return tuple(self._prepared.values())

    def spec(
        self, device: str, threads: int | None, metrics: Sequence[str], clip: str | None = None
    ) -> BenchSpec:
        """Return what workers have to know of the cells that are planned by now.

        Args:
            device: As for `load_editor`.
            threads: Workers of a merge; None for the default.
            metrics: What is measured.
            clip: Folder or Hub id of a CLIP model; None for none.
        """
        compare = self.recipe.verify.compare
        guidance = compare.guidance_scale, compare.image_guidance_scale
        return BenchSpec(self.prepared, device, threads, guidance, tuple(metrics), clip)

    def plan_grid(self, axes: Sequence[Axis]) -> tuple[Cell, ...]:
        """Return the cells of a grid.

        Raises:
            RecipeError: values are not valid, all of them at once.
            PlanError: values do not fit the models.
            MergeError: a model cannot be had; see `prepare_run`.
        """
        return self.plan([(axes, values) for values in combinations(axes)])

    def plan(
        self, wanted: Sequence[tuple[Sequence[Axis], Sequence[AxisValue]]], first: int = 0
    ) -> tuple[Cell, ...]:
        """Return cells.

        Args:
            wanted: For each cell the axes, and its value of each.
            first: Index of the first of them.

        Raises:
            MergeError: as for `plan_grid`.
        """
        drafts = _collected(
            RecipeError,
            "values of the grid are not valid:",
            [functools.partial(self._draft, *each) for each in wanted],
        )
        return tuple(
            _collected(
                PlanError,
                "values of the grid do not fit the models:",
                [
                    functools.partial(self._cell, first + index, draft)
                    for index, draft in enumerate(drafts)
                ],
            )
        )

    def _draft(self, axes: Sequence[Axis], values: Sequence[AxisValue]) -> _Draft:
        words = tuple(f"{axis.key}={v.label}" for axis, v in zip(axes, values, strict=True))
        overrides = [word for value in values for word in value.words]
        try:
            recipe = override_recipe(self.recipe, overrides)
        except ProblemsError as error:
            # They name key and value, and many cells share them.
            raise RecipeError("", error.problems or [error.message], hint=error.hint) from error
        keys = tuple(axis.key for axis in axes)
        said = {word.partition("=")[0] for word in (*self._overrides, *overrides)}
        samples = make_samples(
            self.edits, recipe.verify.seeds, self._count, is_seed_fixed="verify.seeds" in said
        )
        labels = tuple(value.label for value in values)
        is_placed = not said.isdisjoint(("verify.steps", "verify.timesteps"))
        settings = _settings(recipe, samples, is_placed=is_placed)
        return _Draft(recipe, keys, labels, words, tuple(overrides), samples, settings)

    def _cell(self, index: int, draft: _Draft) -> Cell:
        recipe = draft.recipe
        models = self._models_of(recipe)
        # Edits and their scheduler decide no weights.
        tree = dataclasses.asdict(recipe)
        for name in ("verify", "scheduler", "output"):
            del tree[name]
        # But all models have to predict the same.
        predicts = recipe.scheduler.config.get("prediction_type")
        key = models, canonical_bytes([tree, predicts])
        if key not in self._digests:
            try:
                self._digests[key] = self.prepared[models].with_recipe(recipe).digest
            except PlanError as error:
                where = " ".join(draft.words)
                problems = [f"{where}: {problem}" for problem in error.problems]
                raise PlanError("", problems or [error.message], hint=error.hint) from error
        values = {key: _typed(label) for key, label in zip(draft.keys, draft.labels, strict=True)}
        if "timesteps" in values:
            values["timesteps"] = recipe.verify.timesteps
        return Cell(
            index,
            values,
            draft.labels,
            draft.words,
            (*self._overrides, *draft.overrides),
            recipe,
            draft.samples,
            draft.settings,
            models,
            self._digests[key],
        )

    def _models_of(self, recipe: Recipe) -> int:
        """Return which prepared models a recipe merges; prepare them where they are new."""
        key = _models_key(recipe)
        if key not in self._prepared:
            if key == _models_key(self.recipe):
                # What is said of it is said of no outermost value of the grid.
                recipe = self.recipe
            found = sketch_run(recipe) if self._is_dry else self._prepare(recipe)
            _check_editing(found)
            self._prepared[key] = found
        return list(self._prepared).index(key)

    def _prepare(self, recipe: Recipe) -> PreparedRun:
        known: dict[Path, str] = {}
        for prepared in self._prepared.values():
            known |= _hashed_files(prepared)
        return prepare_run(recipe, lock=self._lock, on_progress=self._tell, known=known)


@dataclasses.dataclass(frozen=True, slots=True)
class _Draft:
    recipe: Recipe
    keys: tuple[str, ...]
    labels: tuple[str, ...]
    words: tuple[str, ...]
    overrides: tuple[str, ...]
    samples: tuple[Sample, ...]
    settings: tuple[EditSettings, ...]


def _models_key(recipe: Recipe) -> bytes:
    """Return what decides which files are read."""
    tree = dataclasses.asdict(recipe)
    for ref in tree["models"]["distilled"]:
        # Its own weight is a value like any other.
        del ref["weight"]
    return canonical_bytes([tree["models"], recipe.allow_pickle, recipe.components])


def _collected(
    kind: type[ProblemsError], summary: str, calls: Sequence[Callable[[], Found]]
) -> list[Found]:
    """Return what the calls give; show the problems of all of them together."""
    found: list[Found] = []
    problems: list[str] = []
    hint = ""
    for call in calls:
        try:
            found.append(call())
        except kind as error:
            problems += error.problems
            hint = hint or error.hint
    if problems:
        raise kind(summary, list(dict.fromkeys(problems)), hint=hint)
    return found


def _check_editing(prepared: PreparedRun) -> None:
    """Refuse models whose merge cannot edit.

    Raises:
        VerificationError: there is no pipeline, or this version cannot edit with it.
    """
    family = prepared.plan.family
    if prepared.sources.target.pipeline is None:
        raise VerificationError(
            f"the target is a {family.main.title} without a pipeline, which cannot edit",
            hint="name a whole pipeline folder as models.target, or give a file its `config`",
        )
    if not family.can_edit:
        raise VerificationError(
            f"this version cannot edit with {family.title}",
            hint="`instruct-merge run --no-verify` merges it",
        )


def _hashed_files(prepared: PreparedRun) -> Mapping[Path, str]:
    paths = {
        (model.role, file.name): file.path
        for model in prepared.sources.models
        for file in model.files
    }
    return {paths[key]: digest for key, digest in prepared.digests.items()}


def _settings(
    recipe: Recipe, samples: Sequence[Sample], *, is_placed: bool
) -> tuple[EditSettings, ...]:
    """Return how each sample is edited.

    Args:
        recipe: Its `verify`.
        samples: What is edited.
        is_placed: The words of the grid say which steps there are, and no edit says otherwise.
    """
    verify = recipe.verify
    timesteps = None if verify.timesteps is None else tuple(verify.timesteps)
    shared = EditSettings(
        steps=verify.steps if timesteps is None else len(timesteps),
        guidance_scale=verify.guidance_scale,
        image_guidance_scale=verify.image_guidance_scale,
        resolution=verify.resolution,
        original_inference_steps=verify.original_inference_steps,
        timesteps=timesteps,
    )
    if is_placed:
        return tuple(dataclasses.replace(shared, seed=sample.seed) for sample in samples)
    return tuple(sample.edit.settings(shared, sample.seed) for sample in samples)


def _typed(label: str) -> Any:
    """Return a value as JSON has it: a number, or the text."""
    for kind in (int, float):
        try:
            return kind(label)
        except ValueError:
            continue
    return {"true": True, "false": False, "null": None}.get(label, label)
