"""`validate` and `recipes`."""

from __future__ import annotations

import shutil
from pathlib import Path

import click

from merge.cli.options import PATH, command, json_option
from merge.cli.output import print_json
from merge.errors import OutputExistsError, RecipeError
from merge.writer.tensors import write_error


@command("validate", "validate my.yaml sdxl-turbo")
@click.argument("recipes", nargs=-1, required=True, metavar="RECIPE...")
def validate_command(recipes: tuple[str, ...]) -> None:
    """Check recipes and locks: schema and values only, no model is looked at."""
    from merge.records.lock.find import load_recipe_or_lock

    failures = 0
    for name in recipes:
        try:
            loaded, _ = load_recipe_or_lock(name)
            click.echo(f"{name}: ok ({loaded.name})")
        except RecipeError as error:
            if len(recipes) == 1:
                raise
            failures += 1
            click.echo(f"error: {error}", err=True)
    if failures:
        raise RecipeError(f"{failures} of {len(recipes)} recipes are not valid", [])


@command(
    "recipes",
    "recipes",
    "recipes sdxl-turbo",
    "recipes sdxl-turbo --copy my.yaml",
)
@click.argument("name", required=False)
@click.option(
    "--copy",
    "destination",
    type=PATH,
    help="Copy the recipe to a file or into a folder instead of printing it.",
)
@json_option
def recipes_command(name: str | None, destination: Path | None, as_json: bool) -> None:
    """List the bundled recipes, or print or copy the one called NAME."""
    from merge.recipe.bundled import bundled_recipes, describe_recipe, find_recipe

    if name is None:
        if destination is not None:
            raise click.UsageError("--copy needs the NAME of a recipe.")
        found = {key: describe_recipe(path) for key, path in bundled_recipes().items()}
        if as_json:
            print_json([{"name": key, "description": text} for key, text in found.items()])
            return
        width = max(map(len, found), default=0)
        for key, text in found.items():
            click.echo(f"{key:<{width}}  {text}")
        return
    path = find_recipe(name)
    if destination is None:
        text = path.read_text(encoding="utf-8")
        if as_json:
            print_json({"name": name, "text": text})
        else:
            click.echo(text, nl=False)
        return
    target = destination / path.name if destination.is_dir() else destination
    if target.exists():
        raise OutputExistsError(f"{target} exists already", hint="choose another name")
    try:
        shutil.copyfile(path, target)
    except OSError as error:
        raise write_error(target, error) from error
    click.echo(target)
