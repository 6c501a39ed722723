"""`verify`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from merge.cli.output import (
    Bars,
    common_options,
    examples,
    is_quiet,
    json_option,
    print_json,
    silence_libraries,
)

if TYPE_CHECKING:
    from merge.verify.model import CompareOptions


@click.command(
    "verify",
    epilog=examples(
        "verify outputs/demo",
        "verify outputs/demo --files",
        "verify outputs/demo --strict",
        "verify outputs/mine --edits edits.yaml --compare timbrooks/instruct-pix2pix",
    ),
)
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--files", is_flag=True, help="Recompute every hash of the manifest; no edits.")
@click.option(
    "--edits",
    type=click.Path(path_type=Path),
    help="YAML list of {image, instruction, seed, before_caption, after_caption, expected}; "
    "default: pictures that come with the tool.",
)
@click.option(
    "--compare",
    metavar="TARGET",
    help="Also the pictures of this unmerged model: a folder, or org/name[@revision] on the Hub.",
)
@click.option(
    "--compare-steps",
    default=50,
    show_default=True,
    type=click.IntRange(1, 1000),
    help="Of the target's own scheduler.",
)
@click.option(
    "--compare-guidance-scale", default=7.5, show_default=True, help="Of the target at those steps."
)
@click.option(
    "--compare-image-guidance-scale",
    default=1.5,
    show_default=True,
    help="Of the target at those steps.",
)
@click.option("--no-cache", is_flag=True, help="Make the target's pictures anew and keep none.")
@click.option(
    "--clip", metavar="MODEL", help="CLIP model to measure edits with: a folder or org/name."
)
@click.option("--strict", is_flag=True, help="Exit 9 for a warning too, such as for noise.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:N or mps.")
@click.option(
    "--target-weights",
    type=click.Path(path_type=Path),
    multiple=True,
    hidden=True,
    help="The unmerged UNet's files, to measure how far it moved and what it thinks of the edits.",
)
@json_option
@common_options
def verify_command(
    folder: Path,
    files: bool,
    edits: Path | None,
    compare: str | None,
    compare_steps: int,
    compare_guidance_scale: float,
    compare_image_guidance_scale: float,
    no_cache: bool,
    clip: str | None,
    strict: bool,
    device: str,
    target_weights: tuple[Path, ...],
    as_json: bool,
) -> None:
    """Check an exported FOLDER: edit with it, or recompute the hash of every file.

    Edits use the settings of the recipe in the folder and end in report.html, report.json and
    images/. The last line on stdout is the folder.
    """
    if files and (edits or compare or clip or strict):
        raise click.UsageError(
            "--files runs no edits, so --edits, --compare, --clip and --strict have no use"
        )
    bars = Bars(quiet=is_quiet())
    if files:
        _verify_files(folder, bars, as_json)
        return
    if any(name and not Path(name).expanduser().is_dir() for name in (compare, clip)):
        # On the Hub, then; an export by itself needs nothing from there.
        os.environ.setdefault("HF_HUB_OFFLINE", "0")
    silence_libraries()
    from merge.errors import VerificationError
    from merge.json_files import json_bytes
    from merge.verify.edits import read_edits
    from merge.verify.folder import verify_folder
    from merge.verify.model import CompareOptions
    from merge.verify.report import report_to_json

    options = None
    if compare is not None:
        options = CompareOptions(
            compare,
            compare_steps,
            compare_guidance_scale,
            compare_image_guidance_scale,
            not no_cache,
        )
        _check_scales(options)
    try:
        report = verify_folder(
            folder,
            edits=read_edits(edits) if edits is not None else [],
            device=device,
            compare=options,
            clip=clip,
            target_weights=target_weights,
            strict=strict,
            on_edit=lambda done, total: bars("verify", done, total),
        )
    except VerificationError:
        if as_json:
            click.echo((folder / "report.json").read_text(encoding="utf-8"), nl=False)
        raise
    finally:
        bars.close()
    tree = report_to_json(report)
    if as_json:
        click.echo(json_bytes(tree).decode(), nl=False)
        return
    if not is_quiet():
        for line in filter(None, (tree["verdict"], tree["not_judged"])):
            click.echo(line, err=True)
    click.echo(folder)


def _verify_files(folder: Path, bars: Bars, as_json: bool) -> None:
    from merge.verify.files import verify_files

    try:
        count = verify_files(folder, lambda done, total: bars("hash", done, total))
    finally:
        bars.close()
    if as_json:
        print_json({"folder": str(folder), "files": count, "passed": True})
        return
    if not is_quiet():
        click.echo(f"{count} files are as the manifest says", err=True)
    click.echo(folder)


def _check_scales(options: CompareOptions) -> None:
    for name in ("guidance_scale", "image_guidance_scale"):
        value = getattr(options, name)
        if not 0 <= value < float("inf"):
            raise click.BadParameter(
                f"{value} is not a finite number of at least 0",
                param_hint=f"--compare-{name.replace('_', '-')}",
            )
