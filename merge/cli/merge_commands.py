"""`run` and `plan`."""

from __future__ import annotations

from pathlib import Path

import click

from merge.cli.output import Bars, common_options, examples, is_quiet, json_option, print_json


@click.command(
    "run",
    epilog=examples(
        "run demo",
        "run sd15-lcm-lora weight=0.8 --out outputs/mine",
        "run my.yaml models.target=./ip2p out_dtype=bfloat16 --device cuda",
    ),
)
@click.argument("recipe")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--out", type=click.Path(path_type=Path), help="The output folder itself.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option(
    "--threads", type=click.IntRange(1, 64), help="Workers; the bytes do not depend on it."
)
@click.option("--overwrite", is_flag=True, help="Replace an earlier output.")
@click.option("--no-verify", is_flag=True, help="Leave out the closing edit.")
@common_options
def run_command(
    recipe: str,
    overrides: tuple[str, ...],
    out: Path | None,
    device: str,
    threads: int | None,
    overwrite: bool,
    no_verify: bool,
) -> None:
    """Merge a RECIPE's models, export a standalone checkpoint and edit a picture with it.

    RECIPE is a YAML file or the name of a bundled recipe. KEY=VALUE words change its values, e.g.
    weight=0.8 or block_weights[mid_block.*]=0.5. The last line on stdout is the output folder,
    which appears only when it is complete.
    """
    from merge.recipe import load_recipe
    from merge.run import run_recipe

    bars = Bars(quiet=is_quiet())
    loaded = load_recipe(recipe, overrides)
    try:
        result = run_recipe(
            loaded,
            out,
            device=device,
            threads=threads,
            overwrite=overwrite,
            verify=not no_verify,
            on_progress=bars,
        )
    finally:
        bars.close()
    if not is_quiet():
        counts = result.plan.counts
        applied = counts["delta"] + counts["lora"] + counts["bake"]
        click.echo(
            f"merged {applied} of {len(result.plan.tensors)} tensors in "
            f"{result.seconds['merge']:.1f} s, {result.seconds['total']:.1f} s in all; "
            f"recipe digest {result.recipe_digest[:16]}",
            err=True,
        )
    click.echo(result.folder)


@click.command(
    "plan",
    epilog=examples("plan demo", "plan demo weight=0.5 --json"),
)
@click.argument("recipe")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@json_option
@common_options
def plan_command(recipe: str, overrides: tuple[str, ...], as_json: bool) -> None:
    """Show what a RECIPE will do to every tensor, from the files' headers alone.

    Lists what is merged, copied, cast and left out, each with its reason, the bytes read and
    written and the peak memory. Writes nothing.
    """
    from merge.plan import build_plan, default_threads, peak_bytes, plan_to_json, render_plan
    from merge.recipe import load_recipe
    from merge.sources import resolve_sources

    loaded = load_recipe(recipe, overrides)
    plan = build_plan(loaded, resolve_sources(loaded))
    peak = peak_bytes(plan.tensors, default_threads())
    if as_json:
        print_json(plan_to_json(plan, peak))
    else:
        click.echo(render_plan(plan, peak))
