"""The options that `sweep` and `tune` have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from merge.cli.options import PATH, choice_option

_F = TypeVar("_F", bound=Callable[..., Any])


def inputs_options(function: _F) -> _F:
    """Add the options that say what is edited."""
    for option in (
        click.option(
            "--samples",
            type=click.IntRange(1, 4096),
            help="Edits in all: more than there are repeat them with new noise.",
        ),
        click.option(
            "--instructions",
            type=PATH,
            help="Text file: an instruction on each line, for --images.",
        ),
        click.option(
            "--images", type=PATH, help="Folder of pictures to edit, with --instructions."
        ),
        click.option(
            "--edits", type=PATH, help="YAML list of {image, instruction}; default: the recipe's."
        ),
    ):
        function = option(function)
    return function


def executor_options(function: _F) -> _F:
    """Add the options that say where cells are measured."""
    for option in (
        click.option("--jobs", type=click.IntRange(1), help="The most workers of --executor ray."),
        click.option(
            "--address",
            default="auto",
            help="Of a Ray cluster, HOST:PORT; auto: this machine's, or a new one.",
        ),
        choice_option("--executor", ["local", "ray"], help="Where: in this process, or on Ray."),
    ):
        function = option(function)
    return function
