"""Commands, and the options that several of them have."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from merge.cli.output import configure_logging

_F = TypeVar("_F", bound=Callable[..., Any])

PATH = click.Path(path_type=Path)
# Of a schedule: the models were trained with 1000 timesteps.
STEPS = click.IntRange(1, 1000)
_STATE = {"debug": False}

overrides_argument = click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
overwrite_option = click.option("--overwrite", is_flag=True, help="Replace an earlier output.")
# A merge runs on fewer kinds of devices than an edit.
merge_device_option = click.option("--device", default="auto", help="auto, cpu, cuda or cuda:N.")
edit_device_option = click.option(
    "--device", default="auto", help="auto, cpu, cuda, cuda:N or mps."
)


def choice_option(name: str, choices: Sequence[str], help: str) -> Callable[[_F], _F]:
    """Return an option that takes one of a few words; the first is its default."""
    return click.option(name, type=click.Choice(choices), default=choices[0], help=help)


def command(name: str, *lines: str) -> Callable[[Callable[..., Any]], click.Command]:
    """Return a decorator that makes a command of a function, with -q, -v and --debug.

    Args:
        name: Of the command.
        lines: What `examples` shows at the end of its help.
    """

    def decorate(function: Callable[..., Any]) -> click.Command:
        made = click.command(name, epilog=examples(*lines))(function)
        common: dict[str, Any] = {"is_flag": True, "expose_value": False, "callback": _obey}
        made.params += [
            click.Option(["-q", "--quiet"], help="Only errors, no bars.", **common),
            click.Option(["-v", "--verbose"], help="Say more.", **common),
            click.Option(["--debug"], help="Show tracebacks.", **common),
        ]
        return made

    return decorate


def _obey(ctx: click.Context, parameter: click.Parameter, value: bool) -> None:
    """Do what -q, -v or --debug asks for, before the command runs."""
    if value and parameter.name == "quiet":
        configure_logging(logging.ERROR)
        ctx.meta["merge.quiet"] = True
    elif value and parameter.name == "verbose":
        configure_logging(logging.INFO)
    elif value:
        _STATE["debug"] = True


def wants_debug() -> bool:
    """Return True after `--debug`: errors then show their traceback."""
    return _STATE["debug"]


def examples(*lines: str) -> str:
    """Return an epilog that shows commands, one a line."""
    # Click rewraps a paragraph unless it starts with this character.
    return "\n".join(["\b", "Examples:", *(f"  instruct-merge {line}" for line in lines)])


def check_scale(value: float, param_hint: str | None = None) -> float:
    """Return a guidance scale.

    Args:
        value: What was given.
        param_hint: The option's name in the message, where click does not know it.

    Raises:
        click.BadParameter: it is negative or not finite.
    """
    if not (math.isfinite(value) and value >= 0):
        message = f"{value} is not a finite number of at least 0"
        raise click.BadParameter(message, param_hint=param_hint)
    return value
