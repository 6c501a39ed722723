"""The closing edits: in a child process, so that the merge's memory and threads stay its own."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from merge.background.child import child_command
from merge.errors import ImageError, MergeError, VerificationError
from merge.json_files import json_bytes, read_json, read_json_if_any
from merge.recipe.schema import EditSpec
from merge.records.folder import REPORT_NAME
from merge.sources.model import ResolvedModel

# What the child runs: its only word is the file with the job.
_CODE = "import sys; from merge.run.closing_edits import answer; answer(sys.argv[1])"
_EDITS, _VERDICT = "edits.json", "verdict.json"


def check_pictures(edits: Sequence[EditSpec]) -> None:
    """Refuse closing edits without their pictures now, and not after the merge."""
    names = [name for edit in edits for name in (edit.image, *edit.expected)]
    missing = [name for name in names if not Path(name).is_file()]
    if missing:
        raise ImageError(
            f"verify.edits: there is no picture {', '.join(missing)}",
            hint="paths are relative to the recipe file; --no-verify leaves the edits out",
        )


def verify_output(
    folder: Path, edits: Sequence[EditSpec], target: ResolvedModel, device: str
) -> dict[str, Any]:
    """Edit pictures with an output and judge them.

    Args:
        folder: The output.
        edits: Empty: those that come with the tool.
        target: What the report's chart of the blocks is measured against; no report names it.
        device: As for the merge.

    Returns:
        The report, which is in the folder too.

    Raises:
        VerificationError: a check failed, the model cannot edit, or there is no verdict.
    """
    job = {
        "folder": str(folder.absolute()),
        "device": device,
        "target_weights": (
            [str(file.path) for file in target.main_files] if target.is_folder else []
        ),
    }
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "job.json"
        path.write_text(json.dumps(job), encoding="utf-8")
        if edits:
            trees = [dataclasses.asdict(edit) for edit in edits]
            path.with_name(_EDITS).write_text(json.dumps(trees), encoding="utf-8")
        # Offline by design, and no code of a model's.
        quiet = {"HF_HUB_OFFLINE": "1", "DIFFUSERS_DISABLE_REMOTE_CODE": "1"}
        quiet |= {f"{name}_VERBOSITY": "error" for name in ("TRANSFORMERS", "DIFFUSERS")}
        child = subprocess.run(
            child_command(_CODE, [str(path)]),
            env={**os.environ, **quiet},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        verdict = read_json_if_any(path.with_name(_VERDICT))
    return _report_of(folder, verdict, child)


def answer(job_file: str) -> None:
    """Make the closing edits of a job, in the child; leave the verdict beside the job.

    Args:
        job_file: JSON from `verify_output`.
    """
    from merge.verify.edits import read_edits
    from merge.verify.folder import verify_folder
    from merge.verify.report import report_to_json

    path = Path(job_file)
    job = read_json(path)
    edits = path.with_name(_EDITS)
    try:
        report = verify_folder(
            job["folder"],
            edits=read_edits(edits) if edits.is_file() else (),
            device=job["device"],
            target_weights=[Path(name) for name in job["target_weights"]],
        )
        verdict: dict[str, Any] = {"report": report_to_json(report)}
    except MergeError as error:
        verdict = {"message": error.message, "hint": error.hint}
    path.with_name(_VERDICT).write_text(json.dumps(verdict), encoding="utf-8")


def _report_of(
    folder: Path, verdict: dict[str, Any], child: subprocess.CompletedProcess[str]
) -> dict[str, Any]:
    """Return the report of a good verdict, which the folder must have as well."""
    hint = "the merge itself is whole; `instruct-merge verify` edits with it again"
    if not verdict:
        lines = [line for line in child.stderr.splitlines() if line.strip()]
        last = f": {lines[-1]}" if lines else ""
        raise VerificationError(
            f"the closing edits ended without a verdict (status {child.returncode}){last}",
            hint=hint,
        )
    if "message" in verdict:
        raise VerificationError(verdict["message"], hint=verdict["hint"])
    report: dict[str, Any] = verdict.get("report") or {}
    path = folder / REPORT_NAME
    is_there = path.is_file() and path.read_bytes() == json_bytes(report)
    if not is_there or report.get("passed") is not True:
        raise VerificationError(f"the closing edits left no report in {folder}", hint=hint)
    return report
