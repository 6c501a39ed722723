"""The closing edits: in a child process, so that the merge's memory and threads stay its own."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from merge.errors import ImageError, VerificationError
from merge.recipe.schema import EditSpec
from merge.sources import ResolvedModel


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
        VerificationError: a check failed, or the model cannot edit.
    """
    command = [sys.executable, "-m", "merge", "verify", str(folder), "--device", device]
    if target.is_folder:
        for file in target.weights:
            command += ["--target-weights", str(file.path)]
    with tempfile.TemporaryDirectory() as scratch:
        if edits:
            path = Path(scratch) / "edits.json"
            trees = [dataclasses.asdict(edit) for edit in edits]
            path.write_text(json.dumps(trees), encoding="utf-8")
            command += ["--edits", str(path)]
        _run_child(command)


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
