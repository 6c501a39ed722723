"""`extract-lora`."""

from __future__ import annotations

from pathlib import Path

import click

from merge.cli.options import (
    PATH,
    choice_option,
    command,
    json_option,
    merge_device_option,
    overrides_argument,
    overwrite_option,
)
from merge.cli.output import Bars, is_quiet, print_json


@command(
    "extract-lora",
    "extract-lora my.yaml lcm.safetensors",
    "extract-lora my.yaml lcm.safetensors weight=1 --energy 0.95 --form peft",
)
@click.argument("recipe")
@click.argument("out", metavar="OUT.safetensors", type=PATH)
@overrides_argument
@click.option("--rank", type=click.IntRange(min=1), help="Of every layer.  [default: 64]")
@click.option(
    "--energy",
    type=click.FloatRange(0, 1, min_open=True),
    help="Instead: the smallest rank per layer that keeps this part of its squared norm.",
)
@click.option(
    "--max-rank", type=click.IntRange(min=1), default=512, help="The most that --energy may take."
)
@choice_option("--form", ["kohya", "peft"], help="How the tensors are named.")
@choice_option("--dtype", ["float16", "bfloat16", "float32"], help="Of the factors.")
@merge_device_option
@overwrite_option
@click.option("--layers", is_flag=True, help="Show every layer, not only blocks.")
@json_option
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
    with Bars(quiet=is_quiet()) as bars:
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
    if as_json:
        print_json(extraction_to_json(result))
        return
    if not is_quiet():
        click.echo(render_extraction(result, with_layers=layers))
    click.echo(result.path)
