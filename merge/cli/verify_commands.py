"""`verify`."""

from __future__ import annotations

import os
from pathlib import Path

import click

from merge.cli.options import PATH, STEPS, check_scale, command, edit_device_option, json_option
from merge.cli.output import Bars, is_quiet, print_json, remark, silence_libraries


@command(
    "verify",
    "verify outputs/demo",
    "verify outputs/demo --files",
    "verify outputs/demo --strict",
    "verify outputs/mine --edits edits.yaml --compare timbrooks/instruct-pix2pix",
)
@click.argument("folder", type=PATH)
@click.option("--files", is_flag=True, help="Recompute every hash of the manifest; no edits.")
@click.option(
    "--edits",
    type=PATH,
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
    type=STEPS,
    help="Of the target's own scheduler; default: verify.compare of the recipe.",
)
@click.option(
    "--compare-guidance-scale", type=float, help="Of the target at those steps; likewise."
)
@click.option(
    "--compare-image-guidance-scale", type=float, help="Of the target at those steps; likewise."
)
@click.option("--no-cache", is_flag=True, help="Make the target's pictures anew and keep none.")
@click.option(
    "--clip", metavar="MODEL", help="CLIP model to measure edits with: a folder or org/name."
)
@click.option("--strict", is_flag=True, help="Exit 9 for a warning too, such as for noise.")
@edit_device_option
@click.option(
    "--target-weights",
    type=PATH,
    multiple=True,
    hidden=True,
    help="The unmerged UNet's files, to measure how far it moved and what it thinks of the edits.",
)
@json_option
def verify_command(
    folder: Path,
    files: bool,
    edits: Path | None,
    compare: str | None,
    compare_steps: int | None,
    compare_guidance_scale: float | None,
    compare_image_guidance_scale: float | None,
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
    if files:
        _verify_files(folder, as_json)
        return
    if any(name and not Path(name).expanduser().is_dir() for name in (compare, clip)):
        # On the Hub, then; an export by itself needs nothing from there.
        os.environ.setdefault("HF_HUB_OFFLINE", "0")
    silence_libraries()
    from merge.errors import VerificationError
    from merge.json_files import json_bytes
    from merge.verify.compare import compare_options
    from merge.verify.edits import read_edits
    from merge.verify.folder import verify_folder
    from merge.verify.report import report_to_json

    options = None
    if compare is not None:
        scales = (
            (compare_guidance_scale, "--compare-guidance-scale"),
            (compare_image_guidance_scale, "--compare-image-guidance-scale"),
        )
        text, image = (
            None if scale is None else check_scale(scale, name) for scale, name in scales
        )
        options = compare_options(folder, compare, compare_steps, text, image, cache=not no_cache)
    try:
        with Bars(quiet=is_quiet()) as bars:
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
    tree = report_to_json(report)
    if as_json:
        click.echo(json_bytes(tree).decode(), nl=False)
        return
    remark(*filter(None, (tree["verdict"], tree["not_judged"])))
    click.echo(folder)


def _verify_files(folder: Path, as_json: bool) -> None:
    from merge.verify.files import verify_files

    with Bars(quiet=is_quiet()) as bars:
        count = verify_files(folder, lambda done, total: bars("hash", done, total))
    if as_json:
        print_json({"folder": str(folder), "files": count, "passed": True})
        return
    remark(f"{count} files are as the manifest says")
    click.echo(folder)
