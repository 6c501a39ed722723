"""`verify`."""

from __future__ import annotations

from pathlib import Path

import click

from merge.cli.output import Bars, common_options, examples, is_quiet, silence_libraries


@click.command(
    "verify",
    epilog=examples("verify outputs/demo", "verify outputs/demo --files"),
)
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--files", is_flag=True, help="Recompute every hash of the manifest; no edits.")
@click.option(
    "--edits",
    type=click.Path(path_type=Path),
    help="YAML list of {image, instruction, seed}; default: a picture that comes with the tool.",
)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:N or mps.")
@common_options
def verify_command(folder: Path, files: bool, edits: Path | None, device: str) -> None:
    """Check an exported FOLDER: edit with it, or recompute the hash of every file.

    Edits use the settings of the recipe in the folder and end in report.json and images/. The last
    line on stdout is the folder.
    """
    bars = Bars(quiet=is_quiet())
    try:
        if files:
            from merge.verify import verify_files

            count = verify_files(folder, lambda done, total: bars("hash", done, total))
            bars.close()
            if not is_quiet():
                click.echo(f"{count} files are as the manifest says", err=True)
        else:
            silence_libraries()
            from merge.verify import read_edits, verify_folder

            wanted = read_edits(edits) if edits is not None else []
            verify_folder(
                folder,
                edits=wanted,
                device=device,
                on_edit=lambda done, total: bars("verify", done, total),
            )
    finally:
        bars.close()
    click.echo(folder)
