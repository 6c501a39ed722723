"""The whole job: prepare, finish, and prove by edits that the result works."""

from __future__ import annotations

import logging
import shlex
from pathlib import Path

from merge.recipe.schema import Recipe
from merge.records.lock.model import Lock
from merge.run.closing_edits import check_pictures, verify_output
from merge.run.doubts import tell_verdict
from merge.run.finish import write_output
from merge.run.model import Laps, Progress, RunResult
from merge.run.prepare import PreparedRun, prepare_run
from merge.writer.file import write_atomically
from merge.writer.folder import OutputFolder

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
        threads: Workers; default: one per core, at most 8, or 4 on CUDA.
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
    laps, tell = Laps(), on_progress or (lambda stage, done, total: None)
    folder = OutputFolder(final, overwrite=overwrite, resume=resume)
    folder.check()
    _tell_leftovers(folder, resume)
    if verify:
        check_pictures(recipe.verify.edits)
    prepared = prepare_run(
        recipe,
        out=final,
        lock=lock,
        check_space=folder.check_space,
        laps=laps,
        on_progress=tell,
    )
    try:
        with folder, folder.told_of_others():
            output = write_output(
                folder, prepared, device=device, threads=threads, laps=laps, on_progress=tell
            )
    except BaseException as error:
        if not isinstance(error, Exception) and folder.journal_path.is_file():
            error.add_note(f"{folder.partial} is kept")
        raise
    if write_lock is not None:
        write_atomically(Path(write_lock), output.pinned)
    laps.add("total", laps.started)
    verdict = _verify(final, prepared, device, laps, tell) if verify else None
    return RunResult(
        final,
        prepared.plan,
        output.digest,
        output.files,
        laps.seconds,
        None if verdict is None else True,
        verdict or "",
    )


def _tell_leftovers(folder: OutputFolder, resume: bool) -> None:
    """Warn of what killed runs left, and of nothing to go on with."""
    for leftover in folder.leftovers():
        what = "a whole output, left by a run that was killed while it replaced one"
        if ".partial-" in leftover.name:
            what = "left over from another run and can be removed"
        _LOG.warning("%s is %s", leftover, what)
    if resume and not folder.is_resumed:
        _LOG.warning("there is nothing to resume at %s: beginning anew", folder.final)


def _verify(
    final: Path, prepared: PreparedRun, device: str, laps: Laps, tell: Progress
) -> str | None:
    """Run the closing edits; return what they prove, or None where there can be none."""
    target, family = prepared.sources.target, prepared.plan.family
    if target.pipeline is None:
        _LOG.warning(
            "not verified: the output is a %s folder, which cannot edit by itself",
            family.main.title,
        )
        return None
    if not family.can_edit:
        _LOG.warning("not verified: this version cannot edit with %s", family.title)
        return None
    with laps.lap("verify"):
        tell("verify", 0, 1)
        try:
            report = verify_output(final, prepared.recipe.verify.edits, target, device)
        except BaseException as error:
            if not isinstance(error, Exception):
                error.add_note(f"{final} is complete, but not verified")
                error.add_note(f"`instruct-merge verify {shlex.quote(str(final))}` does that")
            raise
        tell("verify", 1, 1)
    return tell_verdict(report)
