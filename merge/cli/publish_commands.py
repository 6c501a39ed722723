"""`publish`."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from merge.cli.options import PATH, command, json_option
from merge.cli.output import Bars, is_quiet, print_json, remark

if TYPE_CHECKING:
    from merge.publication.model import PreparedUpload


@command(
    "publish",
    "publish outputs/mine --repo-id me/fast-edits --dry-run",
    "publish outputs/mine --repo-id me/fast-edits",
    "publish outputs/mine --repo-id me/fast-edits --public --license openrail++",
)
@click.argument("folder", type=PATH)
@click.option("--repo-id", required=True, metavar="ORG/NAME", help="Created when it is not there.")
@click.option("--public", is_flag=True, help="For all to see; without it, a private repository.")
@click.option("--create-pr", is_flag=True, help="Open a pull request instead of committing.")
@click.option("--license", metavar="ID", help="Where the parents' licences do not decide it.")
@click.option(
    "--only",
    type=click.Choice(["folder", "single-file"]),
    help="Leave the other layout out, if the export has both.",
)
@click.option("--dry-run", is_flag=True, help="Check, then print every file and the card.")
@json_option
def publish_command(
    folder: Path,
    repo_id: str,
    public: bool,
    create_pr: bool,
    license: str | None,
    only: str | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Upload an exported FOLDER to the Hub, with its card.

    It must be verified, passed and unchanged, and hold no token and no home folder's path. The
    token comes from HF_TOKEN or `hf auth login`. The last line on stdout is the commit's URL.
    """
    if is_quiet():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from merge.publication.prepare import prepare
    from merge.publication.publish import publish

    bars = Bars(quiet=is_quiet())

    def on_bytes(done: int, total: int) -> None:
        bars("hash", done, total)

    with bars:
        if dry_run:
            prepared = prepare(folder, repo_id, license=license, only=only, on_bytes=on_bytes)
        else:
            published = publish(
                folder,
                repo_id,
                public=public,
                create_pr=create_pr,
                license=license,
                only=only,
                on_bytes=on_bytes,
            )
    if dry_run:
        _print_prepared(prepared, as_json)
        return
    _remark_notes(published.notes)
    if as_json:
        print_json(dataclasses.asdict(published))
    else:
        click.echo(published.url)


def _print_prepared(prepared: PreparedUpload, as_json: bool) -> None:
    from merge.plan.render import format_bytes

    if as_json:
        print_json(
            {
                "repo_id": prepared.repo_id,
                "files": dict(prepared.sizes),
                "size_bytes": prepared.size_bytes,
                "card": prepared.card,
                "notes": list(prepared.notes),
            }
        )
        return
    _remark_notes(prepared.notes)
    for name, size in prepared.sizes.items():
        click.echo(f"{size:>15,}  {name}")
    total = format_bytes(prepared.size_bytes)
    click.echo(f"{prepared.size_bytes:>15,}  in all, {len(prepared.sizes)} files, {total}\n")
    click.echo(prepared.card, nl=False)


def _remark_notes(notes: tuple[str, ...]) -> None:
    remark(*(f"note: {note}" for note in notes))
