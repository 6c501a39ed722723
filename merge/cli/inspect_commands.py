"""`show` and `env`."""

from __future__ import annotations

from pathlib import Path

import click

from merge.cli.options import PATH, command, json_option
from merge.cli.output import print_json


@command("show", "show outputs/demo", "show lora.safetensors --json")
@click.argument("path", metavar="FILE_OR_FOLDER", type=PATH)
@json_option
def show_command(path: Path, as_json: bool) -> None:
    """Say what a checkpoint is: architecture, layout, dtypes, parents, recipe, hashes."""
    from merge.records.describe import describe_path, render_description

    description = describe_path(path)
    if as_json:
        print_json(description)
    else:
        click.echo(render_description(description))


@command("env", "env", "env --json")
@json_option
def env_command(as_json: bool) -> None:
    """Show versions, devices, cache and offline settings, for bug reports."""
    from merge.records.environment import describe_environment

    facts = describe_environment()
    if as_json:
        print_json(facts)
        return
    width = max(map(len, facts))
    for name, value in facts.items():
        click.echo(f"{name:<{width}}  {value}")
