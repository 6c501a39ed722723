"""`sweep`."""

from __future__ import annotations

from pathlib import Path

import click

from merge.cli.options import (
    PATH,
    command,
    edit_device_option,
    json_option,
    overwrite_option,
)
from merge.cli.output import Bars, is_quiet, print_json, remark, silence_libraries
from merge.cli.searches import executor_options, inputs_options


@command(
    "sweep",
    "sweep demo weight=0:1.5:0.25",
    "sweep demo weight=0.5:1:0.25 timesteps=999/659/319/59,999/499/249/99 guidance_scale=1,1.5",
    "sweep my.yaml weight=0:1:0.25 steps=2,4 --edits edits.yaml --out outputs/grid",
    "sweep my.yaml weight=0:1:0.1 --images photos --instructions words.txt --samples 64",
    "sweep my.yaml weight=0:1:0.1 --executor ray",
)
@click.argument("recipe")
@click.argument("words", nargs=-1, metavar="AXIS... [KEY=VALUE]...")
@click.option("--out", type=PATH, help="The folder for it; default: outputs/NAME-sweep.")
@inputs_options
@click.option(
    "--metrics",
    metavar="LIST",
    help="Of path,endpoint,residual,l1,psnr,ssim; default: path,residual.",
)
@click.option(
    "--clip", metavar="MODEL", help="CLIP model to measure edits with: a folder or org/name."
)
@edit_device_option
@click.option("--threads", type=click.IntRange(1, 64), help="Workers of a merge.")
@executor_options
@overwrite_option
@click.option("--resume", is_flag=True, help="Keep the finished cells of an interrupted sweep.")
@click.option("--dry-run", is_flag=True, help="Say cells, UNet rows, seconds and memory; no more.")
@json_option
def sweep_command(
    recipe: str,
    words: tuple[str, ...],
    out: Path | None,
    edits: Path | None,
    images: Path | None,
    instructions: Path | None,
    samples: int | None,
    metrics: str | None,
    clip: str | None,
    device: str,
    threads: int | None,
    executor: str,
    address: str,
    jobs: int | None,
    overwrite: bool,
    resume: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Merge, edit with and measure every combination of some of a RECIPE's values.

    An AXIS is KEY=A,B,C or KEY=START:STOP:STEP: any key of the recipe, as in weight=0:1.5:0.25 or
    block_weights[M00]=0,1, or a setting of the edits: steps, guidance_scale, image_guidance_scale,
    timesteps=999/599/299/99,999/759/499/259, seed, resolution. One to three axes; a word with a
    single value is the same for every cell.

    Nothing is exported. The folder gets sweep.html with pictures and curves, sweep.csv, sweep.json
    and images/; each finished cell is kept at once. The last line on stdout is the folder.
    """
    silence_libraries(is_offline=False)
    from merge.background.pool.options import ExecutorOptions
    from merge.grid.inputs import Inputs
    from merge.grid.measures import DEFAULT
    from merge.grid.sweep import plan_sweep, sweep

    inputs = Inputs(edits, images, instructions, samples)
    names = DEFAULT if metrics is None else metrics.replace(" ", "").split(",")
    with Bars(quiet=is_quiet()) as bars:
        if dry_run:
            found = plan_sweep(
                recipe, words, inputs=inputs, metrics=names, device=device, threads=threads
            )
            print_json(found.tree) if as_json else click.echo("\n".join(found.lines))
            return
        result = sweep(
            recipe,
            words,
            out=out,
            inputs=inputs,
            metrics=names,
            clip=clip,
            device=device,
            threads=threads,
            executor=ExecutorOptions(executor, address, jobs),
            overwrite=overwrite,
            resume=resume,
            on_progress=bars,
        )
    if as_json:
        click.echo((result.folder / "sweep.json").read_text(encoding="utf-8"), nl=False)
        return
    remark(*result.lines)
    click.echo(result.folder)
