"""The stages of a run, in order."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import logging
import shlex
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from merge._version import __version__
from merge.card import CARD_NAME, draft_card
from merge.conversion.metadata import single_file_metadata
from merge.errors import NoRangesError
from merge.export import ExportFiles, plan_export
from merge.keymap import detect_unet
from merge.lock import Lock, build_lock
from merge.lock.write import portable_recipe
from merge.manifest import (
    LOCK_NAME,
    MANIFEST_NAME,
    FileRecord,
    build_manifest,
    json_bytes,
    recipe_digest,
)
from merge.plan import MergePlan, build_plan
from merge.plan.model import DIGEST_KEY
from merge.provenance import PROVENANCE_NAME, build_provenance
from merge.recipe import Recipe
from merge.run.background import Background
from merge.run.checkpoints import (
    check_records,
    write_relaid,
    write_single_file,
)
from merge.run.closing import check_pictures, verify_output
from merge.run.doubts import tell_doubts, tell_verdict
from merge.run.inputs import InputFile, check_digest, digest_inputs, tell_links
from merge.run.merging import MergedFiles, merge_components
from merge.run.model import Progress, RunResult
from merge.run.record import RUN_NAME, local_inputs, local_licences, run_record
from merge.sources import SourceFile, Sources, fetch_sources, resolve_sources
from merge.writer import Journal, OutputFolder, refuse_overlap, write_atomically

if TYPE_CHECKING:
    from merge.engine import Origin

_LOG = logging.getLogger(__name__)


def run_recipe(
    recipe: Recipe,
    out: str | Path | None = None,
    *,
    device: str = "auto",
    threads: int | None = None,
    overwrite: bool = False,
    resume: bool = False,
    verify: bool = True,
    lock: Lock | None = None,
    write_lock: str | Path | None = None,
    on_progress: Progress | None = None,
) -> RunResult:
    """Merge a recipe's models and export a standalone checkpoint.

    The same inputs, recipe and tool version give the same bytes on any device and with any number
    of threads. Nothing appears under the output's name until everything is on the disk.

    Args:
        recipe: From `load_recipe`.
        out: The output folder; default: the recipe's `output.folder`.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        threads: Workers; default: one per core, at most 8, or 4 lanes on CUDA.
        overwrite: Replace an earlier output of this tool.
        resume: Go on with what an interrupted run of the same recipe left, if there is any.
        verify: Edit a picture with the result, in a child process.
        lock: Use exactly the files that it names; see `load_lock`.
        write_lock: Where to keep a lock of this run, for `run RECIPE --locked`.
        on_progress: Called with stage, done and total, from any thread.

    Raises:
        MergeError: of the family that fits; see `merge.errors`.
        VerificationError: the export is there and fails a check.
    """
    final = Path(out or recipe.output.folder).expanduser()
    lock_path = Path(write_lock) if write_lock is not None else None
    run = _Run(recipe, final, lock, lock_path, on_progress)
    return run.run(device, threads, overwrite, resume, verify)


@dataclass
class _Run:
    recipe: Recipe
    final: Path
    lock: Lock | None
    lock_path: Path | None
    on_progress: Progress | None
    seconds: dict[str, float] = field(default_factory=dict)
    _pinned: bytes = b""
    _origins: tuple[Origin, ...] = ()

    def run(
        self, device: str, threads: int | None, overwrite: bool, resume: bool, verify: bool
    ) -> RunResult:
        started = time.perf_counter()
        folder = OutputFolder(self.final, overwrite=overwrite, resume=resume)
        folder.check()
        for leftover in folder.leftovers():
            what = "a whole output, left by a run that was killed while it replaced one"
            if ".partial-" in leftover.name:
                what = "left over from another run and can be removed"
            _LOG.warning("%s is %s", leftover, what)
        if resume and not folder.is_resumed:
            _LOG.warning("there is nothing to resume at %s: beginning anew", self.final)
        if verify:
            check_pictures(self.recipe.verify.edits)
        self._progress("resolve", 0, 1)
        sources = self._resolve()
        self._lap("resolve", started)
        mark = time.perf_counter()
        plan = build_plan(self.recipe, sources)
        for note in plan.notes:
            _LOG.info("note: %s", note)
        for warning in plan.warnings:
            _LOG.warning("%s", warning)
        folder.check_space(plan.write_bytes)
        self._origins = tell_doubts(self.recipe, plan)
        self._lap("plan", mark)
        try:
            with folder, folder.told_of_others():
                digest, files = self._build(folder, sources, plan, device, threads)
        except BaseException as error:
            if not isinstance(error, Exception) and folder.journal_path.is_file():
                error.add_note(f"{folder.partial} is kept")
            raise
        if self.lock_path is not None:
            write_atomically(self.lock_path, self._pinned)
        self._lap("total", started)
        verified = self._verify(sources, device) if verify else None
        verdict = tell_verdict(self.final) if verified else ""
        return RunResult(self.final, plan, digest, files, self.seconds, verified, verdict)

    def _resolve(self) -> Sources:
        if self.lock is not None:
            self.lock.check_version()
        sources = resolve_sources(self.recipe, download=False)
        inputs = (file.path for model in sources.models for file in model.files)
        refuse_overlap(self.final, inputs)
        tell_links(sources.target)
        if self.lock is not None:
            sources = self.lock.pin(sources)
        if not all(file.is_present for model in sources.models for file in model.files):
            # What does not fit together is said now, from headers, and not after gigabytes.
            with contextlib.suppress(NoRangesError):
                build_plan(self.recipe, sources)
            fetch_sources(sources, lambda done, total: self._progress("download", done, total))
        return sources

    def _build(
        self,
        folder: OutputFolder,
        sources: Sources,
        plan: MergePlan,
        device: str,
        threads: int | None,
    ) -> tuple[str, dict[str, FileRecord]]:
        """Write the whole output and give it its name."""
        export = plan_export(self.recipe, plan, sources.target)
        for warning in export.warnings:
            _LOG.warning("%s", warning)
        digests = digest_inputs(
            self._hashed(sources, export),
            lambda done, total: self._progress("hash", done, total),
            self._lap,
        )
        check_records(plan)
        digest = recipe_digest(self.recipe, sources, digests)
        facts = self._facts(sources, digests)
        # Locked to the end: until the folder has its name nobody else may go on with it.
        with Journal.open(folder.journal_path, facts, is_resumed=folder.is_resumed) as journal:
            if folder.is_resumed:
                folder.take_over([component.file_name for component in plan.components])
            merged, files = self._write_weights(
                folder, plan, export, digests, digest, device, threads, journal
            )
            self._write_records(folder, sources, plan, export, digests, digest, merged, files)
            folder.publish()
        return digest, files

    def _write_weights(
        self,
        folder: OutputFolder,
        plan: MergePlan,
        export: ExportFiles,
        digests: dict[tuple[str, str], str],
        digest: str,
        device: str,
        threads: int | None,
        journal: Journal,
    ) -> tuple[MergedFiles, dict[str, FileRecord]]:
        """Merge, and copy and rewrite beside it; `digests` gets those of what is copied."""
        mark = time.perf_counter()
        with Background() as background:
            copies = {
                name: background.submit(_copy_checked, folder, file, name, background.stop)
                for name, file in export.copies.items()
            }
            conversions = {
                name: background.submit(write_relaid, folder, parts, name, background.stop)
                for name, parts in plan.relaid.items()
            }
            merged = merge_components(
                folder,
                plan,
                self.recipe,
                digest,
                device=device,
                threads=threads,
                journal=journal,
                on_bytes=lambda done, total: self._progress("merge", done, total),
            )
            files = dict(merged.files)
            for name, future in copies.items():
                source = export.copies[name]
                files[name] = FileRecord(source.size_bytes, future.result())
                digests["target", source.name] = files[name].sha256
            files |= {name: future.result() for name, future in conversions.items()}
        self._lap("merge_and_copy", mark)
        self.seconds |= merged.seconds
        if self.recipe.output.single_file:
            mark = time.perf_counter()
            name = f"{self.recipe.name}.safetensors"
            files[name] = write_single_file(folder, name, files, self._metadata(plan, digest))
            self._lap("single_file", mark)
        return merged, files

    def _write_records(
        self,
        folder: OutputFolder,
        sources: Sources,
        plan: MergePlan,
        export: ExportFiles,
        digests: dict[tuple[str, str], str],
        digest: str,
        merged: MergedFiles,
        files: dict[str, FileRecord],
    ) -> None:
        """Write what is known of the run; `files` gets what is of the reproducible set."""
        mark = time.perf_counter()
        written = {**export.written, LOCK_NAME: build_lock(self.recipe, sources, digests)}
        for name, data in written.items():
            folder.write_file(name, data)
            files[name] = FileRecord(len(data), hashlib.sha256(data).hexdigest())
        manifest = build_manifest(plan, sources, digests, digest, files, merged.overflows)
        folder.write_file(MANIFEST_NAME, manifest)
        folder.write_file(PROVENANCE_NAME, build_provenance(manifest, written[LOCK_NAME]))
        self._lap("records", mark)
        run = run_record(plan, self.seconds, merged.device, merged.workers)
        run["inputs"] = local_inputs(sources, self.final)
        run["licences"] = local_licences(sources)
        run["origins"] = [dataclasses.asdict(origin) for origin in self._origins]
        folder.write_file(RUN_NAME, json_bytes(run))
        folder.write_file(CARD_NAME, draft_card(folder.partial).encode())
        if self.lock_path is not None:
            self._pinned = build_lock(self.recipe, sources, digests, with_requested=True)

    def _facts(self, sources: Sources, digests: Mapping[tuple[str, str], str]) -> dict[str, str]:
        """Return what decides the output's bytes, for a journal."""
        recipe = portable_recipe(self.recipe, {model.role: model for model in sources.models})
        inputs = {f"{role}/{name}": sha256 for (role, name), sha256 in digests.items()}
        return {
            "the tool's version": __version__,
            "the recipe": hashlib.sha256(json_bytes(recipe)).hexdigest(),
            "an input": hashlib.sha256(json_bytes(inputs)).hexdigest(),
        }

    def _metadata(self, plan: MergePlan, digest: str) -> dict[str, str]:
        """Return the header strings of the single file."""
        unet = plan.components[0]
        shapes = {spec.name: spec.shape for spec in unet.out_header.tensors}
        architecture = detect_unet(shapes)
        assert architecture is not None
        return single_file_metadata(
            architecture,
            self.recipe.name,
            prediction_type=str(self.recipe.scheduler.config.get("prediction_type", "epsilon")),
            inherited={**unet.metadata, DIGEST_KEY: digest},
        )

    def _hashed(self, sources: Sources, export: ExportFiles) -> list[InputFile]:
        """Return every input file that is read and not copied: large ones first."""
        copied = {file.name for file in export.copies.values()}
        files = [
            (model.role, file)
            for model in sources.models
            for file in model.files
            if model.role != "target" or file.name not in copied
        ]
        return sorted(files, key=lambda file: -file[1].size_bytes)

    def _verify(self, sources: Sources, device: str) -> bool | None:
        if sources.target.pipeline is None:
            _LOG.warning("not verified: the output is a UNet folder, which cannot edit by itself")
            return None
        mark = time.perf_counter()
        self._progress("verify", 0, 1)
        try:
            verify_output(self.final, self.recipe.verify.edits, sources.target, device)
        except BaseException as error:
            if not isinstance(error, Exception):
                error.add_note(f"{self.final} is complete, but not verified")
                error.add_note(f"`instruct-merge verify {shlex.quote(str(self.final))}` does that")
            raise
        self._progress("verify", 1, 1)
        self._lap("verify", mark)
        return True

    def _lap(self, stage: str, since: float) -> None:
        self.seconds[stage] = time.perf_counter() - since

    def _progress(self, stage: str, done: int, total: int) -> None:
        if self.on_progress is not None:
            self.on_progress(stage, done, total)


def _copy_checked(folder: OutputFolder, file: SourceFile, name: str, stop: threading.Event) -> str:
    digest = folder.copy_file(file.path, name, stop)
    check_digest(file, digest)
    return digest
