"""The recipes that come with the tool, found by name from any folder."""

from __future__ import annotations

import difflib
from pathlib import Path

from merge.errors import RecipeError

_PACKAGE = Path(__file__).resolve().parent.parent
RECIPE_SUFFIXES = (".yaml", ".yml")
_HINT = "`instruct-merge recipes` lists the bundled ones and copies them"


def bundled_folder() -> Path:
    """Return the folder of bundled recipes: inside the wheel, or beside the package in a clone."""
    installed = _PACKAGE / "bundled"
    return installed if installed.is_dir() else _PACKAGE.parent / "recipes"


def bundled_recipes() -> dict[str, Path]:
    """Return recipe name to file, sorted by name."""
    return {path.stem: path for path in sorted(bundled_folder().glob("*.yaml"))}


def expand_home(text: str) -> Path:
    """Return a path with `~` replaced; one of an unknown user stays as it is, as in a shell."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        return Path(text)


def find_recipe(name_or_path: str) -> Path:
    """Return the file of a recipe given as a path or as a bundled name.

    Raises:
        RecipeError: there is no such file and no such name.
    """
    path = expand_home(name_or_path)
    try:
        is_file = path.is_file()
    except OSError as error:
        message = f"there is no recipe {name_or_path[:80]}: {error.strerror}"
        raise RecipeError(message, [], hint=_HINT) from None
    if is_file:
        return path
    if path.suffix in RECIPE_SUFFIXES or len(path.parts) > 1:
        raise RecipeError(f"there is no recipe file {name_or_path}", [], hint=_HINT)
    recipes = bundled_recipes()
    if name_or_path in recipes:
        return recipes[name_or_path]
    close = difflib.get_close_matches(name_or_path, recipes, n=1)
    raise RecipeError(
        f"there is no bundled recipe {name_or_path!r}",
        [],
        hint=f"did you mean {close[0]!r}?" if close else f"there are: {', '.join(recipes)}",
    )


def describe_recipe(path: Path) -> str:
    """Return the first comment line of a recipe file: what it is for."""
    first = path.read_text(encoding="utf-8").split("\n", 1)[0]
    return first.lstrip("# ").rstrip()
