"""The closing edits: in a child process, so that the merge's memory and threads stay its own."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from merge.child import child_command
from merge.errors import ImageError, MergeError, VerificationError
from merge.recipe.schema import EditSpec
from merge.sources import ResolvedModel

# What the child runs: its only word is the file with the job.
_CODE = "import sys; from merge.run.closing import answer; answer(sys.argv[1])"
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
) -> None:
    """Edit pictures with an output and judge them.

    Args:
        folder: The output.
        edits: Empty: those that come with the tool.
        target: What the report's chart of the blocks is measured against; no report names it.
        device: As for the merge.

    Raises:
        VerificationError: a check failed, the model cannot edit, or there is no verdict.
    """
    job = {
        "folder": str(folder.absolute()),
        "device": device,
        "target_weights": [str(file.path) for file in target.weights] if target.is_folder else [],
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
        verdict = _read(path.with_name(_VERDICT))
    _check(folder, verdict, child)


def answer(job_file: str) -> None:
    """Make the closing edits of a job, in the child; leave the verdict beside the job.

    Args:
        job_file: JSON from `verify_output`.
    """
    from merge.verify import read_edits, verify_folder

    path = Path(job_file)
    job: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    edits = path.with_name(_EDITS)
    try:
        report = verify_folder(
            job["folder"],
            edits=read_edits(edits) if edits.is_file() else (),
            device=job["device"],
            target_weights=[Path(name) for name in job["target_weights"]],
        )
        verdict = {"report": _digest(report)}
    except MergeError as error:
        verdict = {"message": error.message, "hint": error.hint}
    path.with_name(_VERDICT).write_text(json.dumps(verdict), encoding="utf-8")


def _check(
    folder: Path, verdict: dict[str, str] | None, child: subprocess.CompletedProcess[str]
) -> None:
    """Raise unless the verdict is good and the report that it promises is there."""
    if verdict is None:
        lines = [line for line in child.stderr.splitlines() if line.strip()]
        last = f": {lines[-1]}" if lines else ""
        raise VerificationError(
            f"the closing edits ended without a verdict (status {child.returncode}){last}",
            hint="the merge itself is whole; `instruct-merge verify` edits with it again",
        )
    if "message" in verdict:
        raise VerificationError(verdict["message"], hint=verdict["hint"])
    report = folder / "report.json"
    tree = _read(report)
    if tree is None or _digest(report) != verdict.get("report") or tree.get("passed") is not True:
        raise VerificationError(
            f"the closing edits left no report in {folder}",
            hint="the merge itself is whole; `instruct-merge verify` edits with it again",
        )


def _read(path: Path) -> dict[str, Any] | None:
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return tree if isinstance(tree, dict) else None


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
