"""`convert`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import click

from merge.cli.options import PATH, choice_option, command, overwrite_option
from merge.cli.output import Bars, is_quiet, remark
from merge.errors import list_first

_SHOWN_KEYS = 3


@command(
    "convert",
    "convert outputs/mine mine.safetensors",
    "convert v1-5.safetensors v1-5 --config models/stable-diffusion-v1-5",
    "convert edit.ckpt edit --config outputs/mine --allow-pickle",
)
@click.argument("source", metavar="IN", type=PATH)
@click.argument("out", metavar="OUT", type=PATH)
@click.option(
    "--layout",
    type=click.Choice(["diffusers", "single-file"]),
    help="What OUT is; by default a single file when its name ends in .safetensors.",
)
@click.option(
    "--config",
    type=PATH,
    help="For a single file: the pipeline folder whose tokenizers and configs OUT gets.",
)
@overwrite_option
@click.option(
    "--allow-pickle", is_flag=True, help="Read .ckpt and .bin too; nothing in them is run."
)
@choice_option(
    "--ema",
    ["auto", "true", "false"],
    help="Take the moving average of the UNet in a training's file, where it is beside the plain "
    "weights; auto takes one that is whole, as published folders do.",
)
@click.option(
    "--exclude",
    multiple=True,
    metavar="GLOB",
    help="Leave out keys of a single file that belong to no part of it; may be repeated.",
)
def convert_command(
    source: Path,
    out: Path,
    layout: str | None,
    config: Path | None,
    overwrite: bool,
    allow_pickle: bool,
    ema: str,
    exclude: tuple[str, ...],
) -> None:
    """Turn the diffusers folder IN into one LDM/SGM file OUT, or a single file into a folder.

    Tensors are renamed and copied in a stream, and no value changes. What the other layout cannot
    hold is named with the reason. The last line on stdout is OUT, which appears only when it is
    complete.
    """
    from merge.conversion.directions import convert

    with Bars(quiet=is_quiet()) as bars:
        result = convert(
            source,
            out,
            layout,
            config=config,
            overwrite=overwrite,
            allow_pickle=allow_pickle,
            ema={"true": True, "false": False}.get(ema, ema),
            exclude=exclude,
            on_progress=bars,
        )
    remark(*_left_out_lines(result.left_out), *result.notes)
    click.echo(result.path)


def _left_out_lines(left_out: Mapping[str, str]) -> list[str]:
    """Return a line for each reason, with its first keys: a training file has hundreds."""
    by_reason: dict[str, list[str]] = {}
    for key, reason in left_out.items():
        by_reason.setdefault(reason, []).append(key)
    return [
        f"left out: {list_first(keys, _SHOWN_KEYS)}: {reason}" for reason, keys in by_reason.items()
    ]
