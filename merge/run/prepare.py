"""The first half of a run: everything that is read and hashed, once, whatever is merged then."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from merge.background.digest_process import DigestProcess
from merge.errors import NoRangesError
from merge.plan.build import build_plan
from merge.plan.export import ExportFiles, plan_export
from merge.plan.model import MergePlan
from merge.reader.checkpoint import verify_records
from merge.recipe.schema import Models, Recipe
from merge.records.lock.model import Lock
from merge.records.manifest import recipe_digest
from merge.run.doubts import tell_doubts
from merge.run.inputs import InputFile, check_digest, tell_links
from merge.run.model import Laps, Progress
from merge.sources.fetch import fetch_sources
from merge.sources.model import Sources
from merge.sources.resolve import resolve_sources
from merge.writer.overlap import refuse_overlap

if TYPE_CHECKING:
    from merge.engine.origin import Origin

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class PreparedRun:
    """A recipe whose inputs are on this disk, understood and hashed.

    Attributes:
        recipe: With what the architecture decides filled in.
        sources: Its models.
        plan: What happens to every tensor.
        export: What an output holds besides.
        digests: Role and file name to SHA-256, of every input that is read and not copied.
        origins: What was measured of the target's descent.
    """

    recipe: Recipe
    sources: Sources
    plan: MergePlan
    export: ExportFiles
    digests: Mapping[tuple[str, str], str]
    origins: tuple[Origin, ...]

    @cached_property
    def digest(self) -> str:
        """Return the SHA-256 of everything that decides the merged weights."""
        return recipe_digest(self.recipe, self.sources, self.digests)

    def with_recipe(self, recipe: Recipe) -> PreparedRun:
        """Return the same inputs with other values of the recipe; no file is hashed again.

        Args:
            recipe: Over the same models.

        Raises:
            PlanError: its values do not fit the models.
            ValueError: it names other models, or components whose files were not hashed.
        """
        same = _without_weights(recipe.models) == _without_weights(self.recipe.models)
        if not same or recipe.allow_pickle != self.recipe.allow_pickle:
            raise ValueError("the recipe has other models than those that were prepared")
        plan = build_plan(recipe, self.sources)
        if not set(plan.merged) <= set(self.plan.merged):
            raise ValueError("the recipe merges components that were not prepared")
        recipe = plan.complete(recipe)
        export = plan_export(recipe, plan, self.sources.target)
        return replace(self, recipe=recipe, plan=plan, export=export)


def prepare_run(
    recipe: Recipe,
    *,
    out: Path | None = None,
    lock: Lock | None = None,
    check_space: Callable[[int], None] = lambda count: None,
    laps: Laps | None = None,
    on_progress: Progress | None = None,
    known: Mapping[Path, str] | None = None,
) -> PreparedRun:
    """Resolve a recipe's models, fetch what is missing, plan, and hash every input.

    Args:
        recipe: From `load_recipe`.
        out: Where an output is going to be: no input may be there.
        lock: Use exactly the files that it names.
        check_space: Told the bytes of an output, before anything slow.
        laps: Takes the times of the stages.
        on_progress: Called with stage, done and total, from any thread.
        known: SHA-256 of files that were hashed a moment ago.

    Raises:
        MergeError: of the family that fits; see `merge.errors`.
    """
    laps = laps or Laps()
    tell = on_progress or (lambda stage, done, total: None)
    with laps.lap("resolve"):
        tell("resolve", 0, 1)
        sources = _resolve(recipe, out, lock, tell)
    mark = time.perf_counter()
    plan = build_plan(recipe, sources)
    for note in plan.notes:
        _LOG.info("note: %s", note)
    for warning in plan.warnings:
        _LOG.warning("%s", warning)
    check_space(plan.write_bytes)
    recipe = plan.complete(recipe)
    export = plan_export(recipe, plan, sources.target)
    every, hashed = _hashed(sources, export), known or {}
    files = [item for item in every if item[1].path not in hashed]
    # A process of its own, which works while torch is imported and the models are compared.
    process = DigestProcess([file.path for _, file in files])
    try:
        origins = tell_doubts(recipe, plan)
        for warning in export.warnings:
            _LOG.warning("%s", warning)
        laps.add("plan", mark)
        mark = time.perf_counter()
        import merge.engine.execute  # noqa: F401

        laps.add("import", mark)
        digests = _wait(process, files, tell)
        for role, file in every:
            if file.path in hashed:
                check_digest(file, hashed[file.path])
                digests[role, file.name] = hashed[file.path]
        laps.add("import_and_hash", mark)
    finally:
        process.close()
    _check_pickles(plan)
    return PreparedRun(recipe, sources, plan, export, digests, origins)


def _without_weights(models: Models) -> Models:
    """Return models without their own weights, which are values like any other."""
    distilled = [replace(ref, weight=1.0) for ref in models.distilled]
    return replace(models, distilled=distilled)


def sketch_run(recipe: Recipe) -> PreparedRun:
    """Return what `prepare_run` would, from headers alone: nothing is downloaded or hashed.

    Names and sizes stand in for digests, so that the same files are known as the same; no bytes
    may be merged with them.

    Args:
        recipe: From `load_recipe`.

    Raises:
        MergeError: of the family that fits; see `merge.errors`.
    """
    sources = resolve_sources(recipe, download=False)
    plan = build_plan(recipe, sources)
    recipe = plan.complete(recipe)
    digests = {
        (model.role, file.name): f"{model.label}/{file.name} {file.size_bytes}"
        for model in sources.models
        for file in model.files
    }
    return PreparedRun(
        recipe, sources, plan, plan_export(recipe, plan, sources.target), digests, ()
    )


def _resolve(recipe: Recipe, out: Path | None, lock: Lock | None, tell: Progress) -> Sources:
    if lock is not None:
        lock.check_version()
    sources = resolve_sources(recipe, download=False)
    files = [file for model in sources.models for file in model.files]
    if out is not None:
        refuse_overlap(out, (file.path for file in files))
    tell_links(sources.target)
    if lock is not None:
        sources = lock.pin(sources)
    if not all(file.is_present for file in files):
        # What does not fit together is said now, from headers, and not after gigabytes.
        with contextlib.suppress(NoRangesError):
            build_plan(recipe, sources)
        fetch_sources(sources, lambda done, total: tell("download", done, total))
    return sources


def _hashed(sources: Sources, export: ExportFiles) -> list[InputFile]:
    """Return every input file that is read and not copied: large ones first."""
    copied = {file.name for file in export.copies.values()}
    files = [
        (model.role, file)
        for model in sources.models
        for file in model.files
        if model.role != "target" or file.name not in copied
    ]
    return sorted(files, key=lambda file: -file[1].size_bytes)


def _wait(
    process: DigestProcess, files: Sequence[InputFile], tell: Progress
) -> dict[tuple[str, str], str]:
    """Return the digests of input files, compared with those that are expected."""
    total = sum(file.size_bytes for _, file in files)
    done = 0

    def count_bytes(count: int) -> None:
        nonlocal done
        done += count
        tell("hash", done, total)

    found = {}
    for (role, file), digest in zip(files, process.result(count_bytes), strict=True):
        check_digest(file, digest)
        found[role, file.name] = digest
    return found


def _check_pickles(plan: MergePlan) -> None:
    """Compare the checksums inside of pickles, which torch itself does not look at.

    Raises:
        CheckpointError: a record is damaged.
        IntegrityError: a file changed since it was planned.
    """
    relaid = (copy for copies in plan.relaid.values() for copy in copies)
    inputs = (part for copy in relaid for piece in copy.pieces for part in piece.inputs)
    stamps = {part.path: part.stamp for part in inputs}
    for path, stamp in (stamps | {file.path: file.stamp for file in plan.files}).items():
        verify_records(path, stamp)
