"""`extract-lora`."""

from __future__ import annotations

from pathlib import Path

import click

from merge.cli.output import Bars, common_options, examples, is_quiet, json_option, print_json


@click.command(
    "extract-lora",
    epilog=examples(
        "extract-lora my.yaml lcm.safetensors",
        "extract-lora my.yaml lcm.safetensors weight=1 --energy 0.95 --form peft",
    ),
)
@click.argument("recipe")
@click.argument("out", metavar="OUT.safetensors", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--rank", type=click.IntRange(min=1), help="Of every layer.  [default: 64]")
@click.option(
    "--energy",
    type=click.FloatRange(0, 1, min_open=True),
    help="Instead: the smallest rank per layer that keeps this part of its squared norm.",
)
@click.option(
    "--max-rank",
    type=click.IntRange(min=1),
    default=512,
    show_default=True,
    help="The most that --energy may take.",
)
@click.option(
    "--form",
    type=click.Choice(["kohya", "peft"]),
    default="kohya",
    show_default=True,
    help="How the tensors are named.",
)
@click.option(
    "--dtype",
    type=click.Choice(["float16", "bfloat16", "float32"]),
    default="float16",
    show_default=True,
    help="Of the factors.",
)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option("--overwrite", is_flag=True, help="Replace an earlier output.")
@click.option("--layers", is_flag=True, help="Show every layer, not only blocks.")
@json_option
@common_options
def extract_lora_command(
    recipe: str,
    out: Path,
    overrides: tuple[str, ...],
    rank: int | None,
    energy: float | None,
    max_rank: int,
    form: str,
    dtype: str,
    device: str,
    overwrite: bool,
    layers: bool,
    as_json: bool,
) -> None:
    """Write what a RECIPE adds to its target as a LoRA, and how far that is off.

    The error of a block is the norm of what the LoRA lacks over the norm of the delta. What no
    LoRA can hold, such as a bias, is named with its share. The last line on stdout is the file.
    """
    from merge.extract.extraction import extract_lora
    from merge.extract.report import extraction_to_json, render_extraction
    from merge.recipe.load import load_recipe

    if rank is not None and energy is not None:
        raise click.UsageError("give either --rank or --energy")
    bars = Bars(quiet=is_quiet())
    try:
        result = extract_lora(
            load_recipe(recipe, overrides),
            out,
            rank=rank,
            energy=energy,
            max_rank=max_rank,
            form=form,
            dtype=dtype,
            device=device,
            overwrite=overwrite,
            on_progress=bars,
        )
    finally:
        bars.close()
    if as_json:
        print_json(extraction_to_json(result))
        return
    if not is_quiet():
        click.echo(render_extraction(result, with_layers=layers))
    click.echo(result.path)
