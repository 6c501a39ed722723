"""Everything that is decided and checked before a byte goes to the Hub."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from merge.card.facts import HUB_ID
from merge.card.metadata import CardLicence
from merge.card.render import CARD_NAME
from merge.errors import CheckpointError, PublishError, VerificationError, first_lines
from merge.family.registry import family_named
from merge.publication.card import final_card, stated_licence
from merge.publication.model import PreparedUpload
from merge.publication.parents import decide
from merge.publication.scan import scan
from merge.records.folder import (
    IMAGES_NAME,
    MANIFEST_NAME,
    PAGE_NAME,
    PROVENANCE_NAME,
    REPORT_NAME,
    RUN_NAME,
    OutputRecords,
)
from merge.sources.store import is_inside
from merge.verify.files import verify_files

_LOG = logging.getLogger(__name__)
# Beside the reproducible set.
_RECORDS = (
    *(MANIFEST_NAME, PROVENANCE_NAME, RUN_NAME, REPORT_NAME, PAGE_NAME, CARD_NAME),
    # What model_signing writes.
    "model.sig",
)
_SHOWN = 10


def prepare(
    folder: str | Path,
    repo_id: str,
    *,
    license: str | None = None,
    only: str | None = None,
    on_bytes: Callable[[int, int], None] | None = None,
) -> PreparedUpload:
    """Check an export and decide what of it is published, and under which licence.

    Args:
        folder: An output of `run` that was verified and passed.
        repo_id: `org/name`.
        license: Id of the licence, where that of a parent is unknown or another one is wanted.
        only: `folder`, `single-file`, or None for all that there is.
        on_bytes: Told how many bytes were hashed, and of how many.

    Raises:
        PublishError: it must not be published as it is, with every reason.
    """
    folder = Path(folder)
    if not HUB_ID.fullmatch(repo_id):
        raise PublishError(f"{repo_id!r} is no Hub id", hint="give it as --repo-id ORG/NAME")
    records = OutputRecords(folder)
    manifest = _check_folder(records, on_bytes)
    names = _choose(folder, manifest, only)
    local = records.run_table("licences", str)
    decision = decide(manifest, license or stated_licence(folder), local)
    licence = CardLicence.of(decision.licence, decision.notes)
    card = final_card(folder, repo_id, licence, frozenset(names))
    findings = scan(folder, names, card)
    if findings:
        summary = "the export holds what must not be published:"
        raise PublishError(
            "\n".join([summary, *first_lines(findings)]),
            hint="remove it at its origin (the recipe, a model's config or metadata) and run the "
            "recipe again; a token that was shared must be revoked",
        )
    sizes = {name: (folder / name).stat().st_size for name in names}
    sizes[CARD_NAME] = len(card.encode())
    return PreparedUpload(
        folder=folder,
        repo_id=repo_id,
        sizes=dict(sorted(sizes.items())),
        sha256={n: r["sha256"] for n, r in manifest["files"].items() if n in sizes},
        card=card,
        title=f"{manifest['recipe']} ({str(manifest['recipe_digest'])[:16]})",
        notes=(*decision.notes, *_left_behind(folder, names, manifest)),
    )


def _check_folder(
    records: OutputRecords, on_bytes: Callable[[int, int], None] | None
) -> Mapping[str, Any]:
    """Return the manifest of a folder that was verified, passed and is unchanged since."""
    folder = records.folder
    takes = "publish takes an output of `run`"
    if not folder.is_dir():
        raise PublishError(f"there is no folder {folder}", hint=takes)
    if missing := records.missing:
        raise PublishError(f"{folder} has no {missing}", hint=takes)
    manifest = records.manifest or {}
    for name in manifest["files"]:
        if not is_inside(name) or name.startswith("/"):
            raise PublishError(
                f"the manifest names a file outside of the folder: {name!r}",
                hint="the manifest was not written by this tool: run the recipe again",
            )
    _check_links(folder)
    _check_report(records, manifest)
    try:
        verify_files(folder, on_bytes)
    except VerificationError as error:
        raise PublishError(
            f"the folder changed after it was made: {error.message}",
            hint="run the recipe again; what is published must be what the manifest says",
        ) from error
    return manifest


def _check_links(folder: Path) -> None:
    """Refuse links out of the folder; those of the Hub's own cache lead to its blobs."""
    root = folder.resolve()
    blobs = root.parent.parent / "blobs"
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            actual = path.resolve()
            if not actual.is_relative_to(root) and not (
                root.parent.name == "snapshots" and actual.parent == blobs
            ):
                raise PublishError(
                    f"{path.relative_to(folder)} is a link that leads out of the folder",
                    hint="put the file itself there, or run the recipe again",
                )


def _check_report(records: OutputRecords, manifest: Mapping[str, Any]) -> None:
    folder = records.folder
    hint = f"`instruct-merge verify {folder}` edits with it and writes the report"
    try:
        report = records.report
    except CheckpointError as error:
        raise PublishError(error.message, hint=hint) from error
    if report is None:
        what = "it"
        if not (folder / "model_index.json").is_file():
            family = family_named(str(manifest.get("architecture")))
            what = f"a {family.main.title if family is not None else 'network'} alone, which"
        raise PublishError(f"{folder} is not verified: {what} has no {REPORT_NAME}", hint=hint)
    if report.get("passed") is not True:
        raise PublishError(f"{folder} failed its verification, so it is not published", hint=hint)
    summary = report.get("summary")
    digest = summary.get("recipe_digest") if isinstance(summary, dict) else None
    if digest != manifest.get("recipe_digest"):
        what = f"{folder / REPORT_NAME} is the report of another merge"
        raise PublishError(what, hint=hint)
    warnings = report.get("warnings")
    for text in warnings if isinstance(warnings, list) else []:
        _LOG.warning("the verification of %s warns: %s", folder, text)


def _choose(folder: Path, manifest: Mapping[str, Any], only: str | None) -> list[str]:
    """Return the names of the files that are uploaded."""
    recipe = str(manifest.get("recipe"))
    single = f"{recipe}.safetensors"
    files = set(manifest["files"])
    if only == "single-file":
        if single not in files:
            raise PublishError(
                f"{folder} has no single file",
                hint="run the recipe with output.single_file=true",
            )
        # With the configs and tokenizers, without which nothing can load it.
        files = {name for name in files if name == single or not name.endswith(".safetensors")}
    elif only == "folder":
        files.discard(single)
    elif only is not None:
        raise PublishError(f"only={only!r} is neither folder nor single-file")
    files |= {name for name in _RECORDS if (folder / name).is_file()}
    images = folder / IMAGES_NAME
    if images.is_dir():
        files |= {
            f"{IMAGES_NAME}/{path.name}" for path in images.iterdir() if path.suffix == ".png"
        }
    return sorted(files | {CARD_NAME})


def _left_behind(folder: Path, names: list[str], manifest: Mapping[str, Any]) -> tuple[str, ...]:
    known = {*names, *manifest["files"]}
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    extra = sorted(found - known)
    if not extra:
        return ()
    shown = listed(extra, _SHOWN)
    return (f"Not uploaded, since no run or verification wrote it: {shown}.",)


def listed(names: Sequence[str], most: int) -> str:
    """Return the first names in one line, and whether there are more."""
    return ", ".join(names[:most]) + (" ..." if len(names) > most else "")
