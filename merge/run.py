"""The whole job: resolve, plan, merge, export, verify. The only module that knows all stages."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import logging
import os
import platform
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from merge._version import __version__
from merge.digest import DigestProcess, FileDigest
from merge.errors import ImageError, IntegrityError, OutputError, VerificationError
from merge.export import WEIGHTS_NAME, plan_export
from merge.manifest import (
    LOCK_NAME,
    MANIFEST_NAME,
    FileRecord,
    build_lock,
    build_manifest,
    json_bytes,
    recipe_digest,
)
from merge.plan import MergePlan, build_plan, default_threads
from merge.recipe import Recipe
from merge.sources import SourceFile, Sources, resolve_sources
from merge.writer import OutputFolder, TensorFileWriter

_LOG = logging.getLogger(__name__)
RUN_NAME = "run.json"
_PACKAGES = ("torch", "diffusers", "transformers", "safetensors", "huggingface_hub", "numpy")

# stage, done, total; bytes while merging
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class RunResult:
    """What a run made.

    Attributes:
        folder: The output.
        plan: What was done.
        recipe_digest: 64 hexadecimal digits.
        files: Every file of the reproducible set but the manifest.
        seconds: Wall time per stage.
        verified: True when the closing edits ran and passed; None when there were none.
    """

    folder: Path
    plan: MergePlan
    recipe_digest: str
    files: Mapping[str, FileRecord]
    seconds: Mapping[str, float]
    verified: bool | None


def run_recipe(
    recipe: Recipe,
    out: str | Path | None = None,
    *,
    device: str = "auto",
    threads: int | None = None,
    overwrite: bool = False,
    verify: bool = True,
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
        verify: Edit a picture with the result, in a child process.
        on_progress: Called with stage, done and total, from any thread.

    Raises:
        MergeError: of the family that fits; see `merge.errors`.
        VerificationError: the export is there and fails a check.
    """
    final = Path(out or recipe.output.folder).expanduser()
    return _Run(recipe, final, on_progress).run(device, threads, overwrite, verify)


@dataclass
class _Run:
    recipe: Recipe
    final: Path
    on_progress: Progress | None
    seconds: dict[str, float] = field(default_factory=dict)

    def run(self, device: str, threads: int | None, overwrite: bool, verify: bool) -> RunResult:
        started = time.perf_counter()
        folder = OutputFolder(self.final, overwrite=overwrite)
        folder.check()
        for leftover in folder.leftovers():
            _LOG.warning("%s is left over from an earlier run and can be removed", leftover)
        if verify:
            self._check_pictures()
        self._progress("resolve", 0, 1)
        sources = resolve_sources(self.recipe)
        _check_not_an_input(self.final, sources)
        self._lap("resolve", started)
        mark = time.perf_counter()
        plan = build_plan(self.recipe, sources)
        for note in plan.notes:
            _LOG.info("note: %s", note)
        folder.check_space(plan.write_bytes)
        self._lap("plan", mark)
        with folder:
            digest, files = self._build(folder, sources, plan, device, threads)
            folder.publish()
        self._lap("total", started)
        verified = self._verify(sources, device) if verify else None
        return RunResult(self.final, plan, digest, files, self.seconds, verified)

    def _build(
        self,
        folder: OutputFolder,
        sources: Sources,
        plan: MergePlan,
        device: str,
        threads: int | None,
    ) -> tuple[str, dict[str, FileRecord]]:
        export = plan_export(self.recipe, plan, sources.target)
        digests = self._digest_inputs(sources)
        with _Background() as background:
            mark = time.perf_counter()
            copies = {
                name: background.submit(_copy_checked, folder, file, name, background.stop)
                for name, file in export.copies.items()
            }
            digest = recipe_digest(self.recipe, sources, digests)
            weights, overflows, device, threads = self._merge(
                folder, plan, plan.header_bytes(digest), device, threads
            )
            files = {WEIGHTS_NAME: weights}
            for name, future in copies.items():
                source = export.copies[name]
                files[name] = FileRecord(source.size_bytes, future.result())
                digests["target", source.name] = files[name].sha256
            self._lap("merge_and_copy", mark)
        mark = time.perf_counter()
        written = {**export.written, LOCK_NAME: build_lock(self.recipe, sources, digests)}
        for name, data in written.items():
            folder.write_file(name, data)
            files[name] = FileRecord(len(data), _sha256(data))
        manifest = build_manifest(plan, sources, digests, digest, files, overflows)
        folder.write_file(MANIFEST_NAME, manifest)
        self._lap("records", mark)
        run = self._run_record(device, threads, plan)
        folder.write_file(RUN_NAME, json_bytes(run))
        return digest, files

    def _digest_inputs(self, sources: Sources) -> dict[tuple[str, str], str]:
        """Hash every weight file, importing torch meanwhile.

        The output's header holds a digest of the inputs, and its own digest starts with the header:
        so the inputs are hashed first, by all cores, and the output beside the merge.
        """
        mark = time.perf_counter()
        files = [(model.role, file) for model in sources.models for file in model.weights]
        total = sum(file.size_bytes for _, file in files)
        done = 0

        def on_bytes(count: int) -> None:
            nonlocal done
            done += count
            self._progress("hash", done, total)

        process = DigestProcess([file.path for _, file in files])
        try:
            import merge.engine  # noqa: F401

            self._lap("import", mark)
            digests = process.result(on_bytes)
        finally:
            process.close()
        self._lap("import_and_hash", mark)
        for (_, file), digest in zip(files, digests, strict=True):
            _check_digest(file, digest)
        return {
            (role, file.name): digest for (role, file), digest in zip(files, digests, strict=True)
        }

    def _merge(
        self, folder: OutputFolder, plan: MergePlan, header: bytes, device: str, threads: int | None
    ) -> tuple[FileRecord, dict[str, int], str, int]:
        """Write the merged weights, hashing them beside the merge."""
        from merge.engine import choose_device, device_words, execute_plan

        where = choose_device(device)
        workers = threads or default_threads(str(where))
        path = folder.partial / WEIGHTS_NAME
        path.parent.mkdir()
        total = plan.out_header.file_bytes
        with TensorFileWriter(path, total) as writer:
            digest = FileDigest(writer.read_into, header, total)

            def on_frontier(position: int) -> None:
                digest.advance(position)
                self._progress("merge", position, total)

            mark = time.perf_counter()
            try:
                result = execute_plan(
                    plan,
                    self.recipe,
                    writer,
                    device=where,
                    threads=workers,
                    on_frontier=on_frontier,
                )
                self._lap("merge", mark)
                mark = time.perf_counter()
                sha256 = digest.result()
                self._lap("hash_output", mark)
            except BaseException:
                digest.stop()
                raise
            mark = time.perf_counter()
            writer.finish(header)
            self._lap("fsync", mark)
        for key, count in result.overflows.items():
            _LOG.warning(
                "%s: %d values were too large for its dtype (on_overflow=%s)",
                key,
                count,
                self.recipe.on_overflow,
            )
        if result.unchanged:
            _LOG.info("%d tensors have a delta of zero and stay as they are", len(result.unchanged))
        return FileRecord(total, sha256), result.overflows, device_words(where), workers

    def _check_pictures(self) -> None:
        """Refuse closing edits without their pictures now, and not after the merge."""
        edits = self.recipe.verify.edits
        names = [name for edit in edits for name in (edit.image, *edit.expected)]
        missing = [name for name in names if not Path(name).is_file()]
        if missing:
            raise ImageError(
                f"verify.edits: there is no picture {', '.join(missing)}",
                hint="paths are relative to the recipe file; --no-verify leaves the edits out",
            )

    def _verify(self, sources: Sources, device: str) -> bool | None:
        if sources.target.pipeline is None:
            _LOG.warning("not verified: the output is a UNet folder, which cannot edit by itself")
            return None
        mark = time.perf_counter()
        self._progress("verify", 0, 1)
        edits = [dataclasses.asdict(edit) for edit in self.recipe.verify.edits]
        command = [sys.executable, "-m", "merge", "verify", str(self.final), "--device", device]
        for file in sources.target.weights:
            # What the report's chart of the blocks is measured against; no report names it.
            command += ["--target-weights", str(file.path)]
        with tempfile.TemporaryDirectory() as scratch:
            if edits:
                path = Path(scratch) / "edits.json"
                path.write_text(json.dumps(edits), encoding="utf-8")
                command += ["--edits", str(path)]
            _run_child(command)
        self._progress("verify", 1, 1)
        self._lap("verify", mark)
        return True

    def _run_record(self, device: str, workers: int, plan: MergePlan) -> dict[str, Any]:
        merge_s = self.seconds["merge"]
        moved = plan.read_bytes + plan.write_bytes - 2 * plan.copy_bytes
        return {
            "schema_version": 1,
            "tool_version": __version__,
            "device": device,
            "threads": workers,
            "seconds": {stage: round(value, 3) for stage, value in self.seconds.items()},
            "merge_bytes_per_s": round(moved / merge_s) if merge_s else None,
            "peak_rss_bytes": _peak_rss_bytes(),
            "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
            "python": platform.python_version(),
            "platform": platform.platform(),
        }

    def _lap(self, stage: str, since: float) -> None:
        self.seconds[stage] = time.perf_counter() - since

    def _progress(self, stage: str, done: int, total: int) -> None:
        if self.on_progress is not None:
            self.on_progress(stage, done, total)


class _Background:
    """Threads that copy files beside the merge; all are gone when the block ends."""

    def __init__(self) -> None:
        self.stop = threading.Event()
        # Two at a time: more would only take cores from the merge.
        self._pool = ThreadPoolExecutor(max_workers=2, thread_name_prefix="files")

    def __enter__(self) -> _Background:
        return self

    def __exit__(self, *exception: object) -> None:
        self.cancel()

    def submit(self, function: Callable[..., str], *arguments: Any) -> Future[str]:
        return self._pool.submit(function, *arguments)

    def cancel(self) -> None:
        self.stop.set()
        self._pool.shutdown(wait=True, cancel_futures=True)


def _copy_checked(folder: OutputFolder, file: SourceFile, name: str, stop: threading.Event) -> str:
    digest = folder.copy_file(file.path, name, stop)
    _check_digest(file, digest)
    return digest


def _check_digest(file: SourceFile, digest: str) -> None:
    if digest and file.expected_sha256 and digest != file.expected_sha256:
        raise IntegrityError(
            f"{file.name} has SHA-256 {digest}, and {file.expected_sha256} is expected",
            hint="download it again, or correct sha256 in the recipe",
        )


def _check_not_an_input(final: Path, sources: Sources) -> None:
    """Refuse an output folder that is, or holds, a model that is read."""
    output = final.resolve()
    for model in sources.models:
        parts = model.pipeline.components if model.pipeline is not None else ()
        files = [*model.weights, *(file for part in parts for file in part.files)]
        for file in files:
            if output in (file.path.resolve().parents) or output in file.path.absolute().parents:
                raise OutputError(
                    f"the output folder {final} is the {model.role} model, or holds it",
                    hint="choose another folder with --out; inputs are never written to",
                )


def _run_child(command: list[str]) -> None:
    """Run the closing edits in a process of their own and pass its verdict on."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "DIFFUSERS_DISABLE_REMOTE_CODE": "1"}
    child = subprocess.run(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    lines = [line for line in child.stderr.splitlines() if line.strip()]
    if child.returncode == 0:
        return
    message, hint = "the closing edit failed", ""
    for line in lines:
        if line.startswith("error: "):
            message = line.removeprefix("error: ")
        elif line.startswith("hint: "):
            hint = line.removeprefix("hint: ")
        elif line.startswith("  ") and message != "the closing edit failed":
            # One line for each check that failed.
            message += f"\n{line}"
    if child.returncode == VerificationError.exit_code:
        raise VerificationError(message, hint=hint)
    if message == "the closing edit failed" and lines:
        message = f"the closing edit failed: {lines[-1]}"
    raise VerificationError(message, hint=hint or "see `instruct-merge edit --help` to try it")


def _peak_rss_bytes() -> int:
    """Return the largest memory that this process held so far."""
    status = Path("/proc/self/status")
    if status.exists():
        # getrusage would count what the parent held when it forked.
        lines = status.read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
