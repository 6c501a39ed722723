"""Run an output's lock again and compare: the proof that a merge can be repeated."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merge._version import __version__
from merge.errors import SourceNotFoundError, VerificationError, first_lines
from merge.records.folder import LOCK_NAME, MANIFEST_NAME, PROVENANCE_NAME, OutputRecords
from merge.records.lock.find import open_lock
from merge.records.provenance import check_provenance
from merge.run.model import Progress
from merge.run.stages import run_recipe


@dataclass(frozen=True, slots=True)
class Reproduction:
    """A run that gave the same bytes.

    Attributes:
        folder: The output that was repeated.
        out: The new output, or None when it was removed after the comparison.
        recipe_digest: 64 hexadecimal digits, of both.
        sha256: Every file of the reproducible set and its digest, in both.
    """

    folder: Path
    out: Path | None
    recipe_digest: str
    sha256: Mapping[str, str]


def reproduce(
    folder: str | Path,
    out: str | Path | None = None,
    *,
    overrides: Sequence[str] = (),
    device: str = "auto",
    threads: int | None = None,
    resume: bool = False,
    on_progress: Progress | None = None,
) -> Reproduction:
    """Run the lock of an output again and compare every file of the reproducible set.

    Compared are the SHA-256 in the manifests, and the manifests and provenance statements
    themselves. The folder's weights are not read: `verify_files` compares them with its manifest.

    Args:
        folder: An output of `run`, or a download of one.
        out: Where to; default: a temporary folder in the current one, removed afterwards.
        overrides: Where local models are, e.g. `models.target.path=./ip2p`.
        device: As for `run_recipe`.
        threads: As for `run_recipe`.
        resume: Go on with what an interrupted repetition to `out` left.
        on_progress: As for `run_recipe`.

    Raises:
        SourceNotFoundError: the folder is no output of `run`.
        VerificationError: its records contradict each other, it was written by another version of
            this tool, or a file differs; all are named.
        MergeError: of the run, as for `run_recipe`.
    """
    folder = Path(folder)
    records = OutputRecords(folder)
    if missing := records.missing:
        raise SourceNotFoundError(
            f"{folder} has no {missing}", hint="only outputs of `run` can be reproduced"
        )
    manifest = records.manifest or {}
    _check_records(folder, manifest)
    # A convenience, and not part of the reproducible set: where local models were then.
    places = {
        role: folder.absolute() / path for role, path in records.run_table("inputs", str).items()
    }
    lock = open_lock(folder / LOCK_NAME, overrides, places)

    def run(final: Path) -> None:
        run_recipe(
            lock.recipe,
            final,
            device=device,
            threads=threads,
            resume=resume,
            verify=False,
            lock=lock,
            on_progress=on_progress,
        )
        _refuse_differences(folder, manifest, final)

    if out is not None:
        run(Path(out).expanduser())
    else:
        # On the disk that outputs go to: they are too large for most systems' /tmp.
        with tempfile.TemporaryDirectory(prefix="reproduce-", dir=Path.cwd()) as scratch:
            try:
                run(Path(scratch) / lock.recipe.name)
            except BaseException as error:
                # That a part is kept: it is not, and cannot be gone on with.
                getattr(error, "__notes__", []).clear()
                raise
    return Reproduction(
        folder=folder,
        out=None if out is None else Path(out).expanduser(),
        recipe_digest=str(manifest.get("recipe_digest")),
        sha256={name: record["sha256"] for name, record in manifest["files"].items()},
    )


def _check_records(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Refuse records that were changed: a run could only show that they were."""
    wrong = check_provenance(folder)
    if wrong:
        raise VerificationError(
            f"the records of {folder} are not as they were written: {'; '.join(wrong)}",
            hint="download the folder again",
        )
    version = manifest.get("tool", {}).get("version")
    if version != __version__:
        raise VerificationError(
            f"{folder} was written by instruct-merge {version}, and this is {__version__}: the "
            "bytes are promised for the same version only",
            hint=f"`pip install instruct-merge=={version}` in an environment of its own",
        )


def _refuse_differences(folder: Path, manifest: Mapping[str, Any], out: Path) -> None:
    """Refuse a repetition that gave other bytes."""
    wrong = _compare(folder, manifest, out)
    if not wrong:
        return
    summary = f"{folder} is not reproduced; {len(wrong)} file(s) differ:"
    raise VerificationError(
        "\n".join([summary, *first_lines(wrong)]),
        hint="--out keeps the new output, to compare; "
        "`verify FOLDER --files` tells whether the old one was changed",
    )


def _compare(folder: Path, manifest: Mapping[str, Any], out: Path) -> list[str]:
    """Return a line for each file of the reproducible set that is not the same in both."""
    other = OutputRecords(out).manifest
    assert other is not None
    ours, theirs = manifest["files"], other["files"]
    lines = []
    for name in sorted(ours.keys() | theirs.keys()):
        if name not in theirs:
            lines.append(f"{name} is not made again")
        elif name not in ours:
            lines.append(f"{name} is new")
        elif ours[name] != theirs[name]:
            lines.append(f"{name} has SHA-256 {theirs[name]['sha256']}, not {ours[name]['sha256']}")
    return lines + [
        f"{name} differs"
        for name in (MANIFEST_NAME, PROVENANCE_NAME)
        if (folder / name).read_bytes() != (out / name).read_bytes()
    ]
