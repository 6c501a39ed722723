"""`tune`."""

from __future__ import annotations

from pathlib import Path

import click

from merge.cli.options import (
    PATH,
    STEPS,
    command,
    edit_device_option,
    json_option,
    overrides_argument,
    overwrite_option,
)
from merge.cli.output import Bars, is_quiet, print_json, remark, silence_libraries
from merge.cli.searches import executor_options, inputs_options


@command(
    "tune",
    "tune demo",
    "tune demo --over weight,guidance_scale,timesteps --steps 2",
    "tune my.yaml --edits edits.yaml --out outputs/tuned",
    "tune my.yaml --images photos --instructions words.txt --dry-run",
)
@click.argument("recipe")
@overrides_argument
@click.option(
    "--over",
    default="weight",
    metavar="LIST",
    help="What is chosen: weight,guidance_scale,timesteps,groups.",
)
@click.option("--steps", type=STEPS, help="Of the edits; default: the recipe's.")
@click.option("--weights", default="0:1.5:0.25", metavar="RANGE", help="To try.")
@click.option("--budget", default=48, type=click.IntRange(3), help="The most settings measured.")
@click.option("--out", type=PATH, help="The folder for it; default: outputs/NAME-tune.")
@inputs_options
@edit_device_option
@click.option("--threads", type=click.IntRange(1, 64), help="Workers of a merge.")
@executor_options
@overwrite_option
@click.option("--resume", is_flag=True, help="Keep what an interrupted tuning measured.")
@click.option("--dry-run", is_flag=True, help="Say UNet rows, seconds and memory; no more.")
@json_option
def tune_command(
    recipe: str,
    overrides: tuple[str, ...],
    over: str,
    steps: int | None,
    weights: str,
    budget: int,
    out: Path | None,
    edits: Path | None,
    images: Path | None,
    instructions: Path | None,
    samples: int | None,
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
    """Choose a RECIPE's weight by measuring, and with --over guidance and timesteps too.

    Few-step edits are compared with where the unmerged target itself leads from the same noise, and
    with what the target would still change, so no right answers are needed. verify.compare says
    how the target edits by itself.

    The folder gets tuned.yaml, a recipe for `run`, tune.html with the curves, and tune.json. The
    exit code is 9 where the samples tell no weight from another. The last line on stdout is the
    folder.
    """
    silence_libraries(is_offline=False)
    from merge.background.pool.options import ExecutorOptions
    from merge.grid.inputs import Inputs
    from merge.tuning.tune import plan_tune, tune

    inputs = Inputs(edits, images, instructions, samples)
    names = over.replace(" ", "").split(",")
    with Bars(quiet=is_quiet()) as bars:
        if dry_run:
            found = plan_tune(
                recipe,
                overrides,
                over=names,
                steps=steps,
                weights=weights,
                budget=budget,
                inputs=inputs,
                device=device,
                threads=threads,
            )
            print_json(found.tree) if as_json else click.echo("\n".join(found.lines))
            return
        result = tune(
            recipe,
            overrides,
            over=names,
            steps=steps,
            weights=weights,
            budget=budget,
            out=out,
            inputs=inputs,
            device=device,
            threads=threads,
            executor=ExecutorOptions(executor, address, jobs),
            overwrite=overwrite,
            resume=resume,
            on_progress=bars,
        )
    if as_json:
        click.echo((result.folder / "tune.json").read_text(encoding="utf-8"), nl=False)
        return
    remark(*result.lines)
    click.echo(result.folder)
