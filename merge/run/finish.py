"""The second half of a run: one set of values, merged into an output folder."""

from __future__ import annotations

import dataclasses
import hashlib
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass

from merge._version import __version__
from merge.card.refresh import draft_card
from merge.card.render import CARD_NAME
from merge.conversion.metadata import single_file_metadata
from merge.family.registry import recognise
from merge.json_files import json_bytes
from merge.plan.model import DIGEST_KEY, MergePlan
from merge.recipe.schema import Recipe
from merge.records.folder import LOCK_NAME, MANIFEST_NAME, PROVENANCE_NAME, RUN_NAME
from merge.records.lock.write import build_lock, portable_recipe
from merge.records.manifest import FileRecord, build_manifest
from merge.records.provenance import build_provenance
from merge.records.run import local_inputs, local_licences, run_record
from merge.run.copies import FileCopies, write_relaid, write_single_file
from merge.run.inputs import check_digest
from merge.run.merging import MergedFiles, merge_components
from merge.run.model import Laps, Progress
from merge.run.prepare import PreparedRun
from merge.sources.model import SourceFile
from merge.writer.folder import OutputFolder
from merge.writer.journal import Journal


@dataclass(frozen=True, slots=True)
class Output:
    """What was written.

    Attributes:
        digest: Of the recipe, 64 hexadecimal digits.
        files: Every file of the reproducible set but the manifest.
        pinned: The bytes of a lock for `run RECIPE --locked`.
    """

    digest: str
    files: Mapping[str, FileRecord]
    pinned: bytes


def write_output(
    folder: OutputFolder,
    prepared: PreparedRun,
    *,
    device: str,
    threads: int | None,
    laps: Laps,
    on_progress: Progress,
) -> Output:
    """Write the whole output and give it its name.

    Args:
        folder: Where to.
        prepared: What is merged.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        threads: Workers; None for the default.
        laps: Takes the times of the stages.
        on_progress: Called with stage, done and total, from any thread.

    Raises:
        EngineError: the merge failed, or nothing changed and the recipe does not allow that.
        OutputError: it cannot be written.
    """
    facts = _resume_facts(prepared)
    # Locked to the end: until the folder has its name nobody else may go on with it.
    with Journal.open(folder.journal_path, facts, is_resumed=folder.is_resumed) as journal:
        if folder.is_resumed:
            folder.take_over([component.file_name for component in prepared.plan.components])
        job = _Job(folder, prepared, dict(prepared.digests), laps, on_progress)
        merged = job.write_weights(device, threads, journal)
        pinned = job.write_records(merged)
        folder.publish()
    return Output(prepared.digest, job.files, pinned)


@dataclass
class _Job:
    folder: OutputFolder
    prepared: PreparedRun
    digests: dict[tuple[str, str], str]
    laps: Laps
    on_progress: Progress
    files: dict[str, FileRecord] = dataclasses.field(default_factory=dict)

    def write_weights(self, device: str, threads: int | None, journal: Journal) -> MergedFiles:
        """Merge, and copy and rewrite beside it; `digests` gets those of what is copied."""
        mark = time.perf_counter()
        plan, recipe, export = self.prepared.plan, self.prepared.recipe, self.prepared.export
        digest = self.prepared.digest
        with FileCopies() as beside:
            copies = {
                name: beside.submit(_copy_checked, self.folder, file, name, beside.stop)
                for name, file in export.copies.items()
            }
            conversions = {
                name: beside.submit(write_relaid, self.folder, parts, name, beside.stop)
                for name, parts in plan.relaid.items()
            }
            merged = merge_components(
                self.folder,
                self.prepared,
                device=device,
                threads=threads,
                journal=journal,
                on_bytes=lambda done, total: self.on_progress("merge", done, total),
            )
            self.files |= merged.files
            for name, future in copies.items():
                source = export.copies[name]
                self.files[name] = FileRecord(source.size_bytes, future.result())
                self.digests["target", source.name] = self.files[name].sha256
            self.files |= {name: future.result() for name, future in conversions.items()}
        self.laps.add("merge_and_copy", mark)
        self.laps.seconds.update(merged.seconds)
        if recipe.output.single_file:
            with self.laps.lap("single_file"):
                name, metadata = f"{recipe.name}.safetensors", _metadata(plan, recipe, digest)
                self.files[name] = write_single_file(
                    self.folder, name, self.files, plan.family, metadata
                )
        return merged

    def write_records(self, merged: MergedFiles) -> bytes:
        """Write what is known of the run; return the bytes of a lock for the recipe."""
        folder, plan, recipe = self.folder, self.prepared.plan, self.prepared.recipe
        sources, digests = self.prepared.sources, self.digests
        with self.laps.lap("records"):
            lock = build_lock(recipe, sources, digests)
            for name, data in {**self.prepared.export.written, LOCK_NAME: lock}.items():
                folder.write_file(name, data)
                self.files[name] = FileRecord(len(data), hashlib.sha256(data).hexdigest())
            manifest = build_manifest(
                plan, sources, digests, self.prepared.digest, self.files, merged.overflows
            )
            folder.write_file(MANIFEST_NAME, manifest)
            folder.write_file(PROVENANCE_NAME, build_provenance(manifest, lock))
        run = run_record(plan, self.laps.seconds, merged.device, merged.workers)
        run["inputs"] = local_inputs(sources, folder.final)
        run["licences"] = local_licences(sources)
        run["origins"] = [dataclasses.asdict(origin) for origin in self.prepared.origins]
        folder.write_file(RUN_NAME, json_bytes(run))
        folder.write_file(CARD_NAME, draft_card(folder.partial).encode())
        return build_lock(recipe, sources, digests, with_requested=True)


def _resume_facts(prepared: PreparedRun) -> dict[str, str]:
    """Return what decides the output's bytes, in words: a run goes on only where it is the same."""
    resolved = {model.role: model for model in prepared.sources.models}
    recipe = portable_recipe(prepared.recipe, resolved)
    inputs = {f"{role}/{name}": sha256 for (role, name), sha256 in prepared.digests.items()}
    return {
        "the tool's version": __version__,
        "the recipe": hashlib.sha256(json_bytes(recipe)).hexdigest(),
        "an input": hashlib.sha256(json_bytes(inputs)).hexdigest(),
    }


def _metadata(plan: MergePlan, recipe: Recipe, digest: str) -> dict[str, str]:
    """Return the header strings of the single file."""
    found = recognise({spec.name: spec.shape for spec in plan.main.out_header.tensors})
    assert found is not None
    return single_file_metadata(
        found,
        recipe.name,
        prediction_type=str(recipe.scheduler.config.get("prediction_type", "epsilon")),
        inherited={**plan.main.metadata, DIGEST_KEY: digest},
    )


def _copy_checked(folder: OutputFolder, file: SourceFile, name: str, stop: threading.Event) -> str:
    digest = folder.copy_file(file.path, name, stop)
    check_digest(file, digest)
    return digest
