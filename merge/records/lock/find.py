"""Runs that are held to a lock: which lock, and where its local models are on this machine."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from merge.errors import MergeError, RecipeError
from merge.recipe.bundled import bundled_recipes, find_recipe
from merge.recipe.load import load_recipe, override_recipe
from merge.recipe.schema import EditSpec, ModelRef, Recipe
from merge.records.lock.compare import differing_fields
from merge.records.lock.model import Lock
from merge.records.lock.read import LOCK_SUFFIX, is_lock, load_lock
from merge.records.manifest import FileRecord

Ref = TypeVar("Ref", bound=ModelRef)


def open_lock(
    path: Path, overrides: Sequence[str] = (), places: Mapping[str, Path] | None = None
) -> Lock:
    """Read a lock and find its local models and pictures, which it names without their folders.

    They are looked for where `places` says, beside the lock, in the current folder, and where the
    recipe of the same name has them. A model is taken when its files have the lock's sizes; the
    run then compares every digest.

    Args:
        path: The lock.
        overrides: As for `load_lock`.
        places: Role to where the model was when the lock was made.

    Raises:
        RecipeError: it is no lock that can be run.
    """
    lock = load_lock(path, overrides)
    stated = {word.partition("=")[0] for word in overrides}
    sibling = _recipe_of(lock)
    there = sibling.models.by_role if sibling is not None else {}
    changes: dict[str, Any] = {}
    for role, ref in lock.recipe.models.by_role.items():
        ways = {f"models.{role}", "models.distilled[0]" if role == "distilled" else ""}
        known = there.get(role)
        found = ref
        if ref.path is not None and not any(f"{way}.path" in stated for way in ways):
            first = [p for p in ((places or {}).get(role),) if p is not None]
            options = [*first, *_places(Path(ref.path), known.path if known else None)]
            found = dataclasses.replace(found, path=str(_choose(options, lock.files[role])))
        config = ref.config
        if config and Path(config).is_absolute() and not any(f"{w}.config" in stated for w in ways):
            options = list(_places(Path(config), known.config if known else None))
            chosen = next((option for option in options if option.exists()), options[0])
            found = dataclasses.replace(found, config=str(chosen))
        changes[role] = found
    edits = [_with_pictures(edit, sibling) for edit in lock.recipe.verify.edits]
    recipe = dataclasses.replace(
        lock.recipe,
        models=lock.recipe.models.with_roles(changes),
        verify=dataclasses.replace(lock.recipe.verify, edits=edits),
    )
    return dataclasses.replace(lock, recipe=recipe)


def lock_path_of(recipe: str | Path, name: str) -> Path:
    """Return where a recipe's own lock is kept: `NAME.lock.yaml` beside it.

    A recipe that comes with the tool has its lock in the current folder.

    Args:
        recipe: Path or bundled name, as typed.
        name: The recipe's `name`.
    """
    path = find_recipe(str(recipe))
    is_bundled = path in bundled_recipes().values()
    folder = Path.cwd() if is_bundled else path.resolve().parent
    return folder / f"{name}{LOCK_SUFFIX}"


def lock_for(recipe: Recipe, path: Path) -> tuple[Recipe, Lock]:
    """Hold a recipe to the lock that was made of it.

    Args:
        recipe: After overrides.
        path: From `lock_path_of`.

    Returns:
        The recipe with the lock's commits for its branches, and the lock.

    Raises:
        RecipeError: there is no lock, or the recipe changed since.
    """
    if not path.is_file():
        raise RecipeError(
            f"there is no {path.name} in {path.parent}, so the recipe is not locked",
            [],
            hint="`run RECIPE --write-lock` makes it",
        )
    lock = load_lock(path)
    if lines := differing_fields(recipe, lock):
        raise RecipeError(
            f"the recipe is not the one that {path.name} was made of:",
            lines,
            hint="`run RECIPE --write-lock` makes a new lock",
        )

    def pin(ref: Ref, role: str) -> Ref:
        # A config's commit is in the lock too, in place of its branch.
        locked = lock.recipe.models.by_role[role]
        config = locked.config if ref.config and "@" in (locked.config or "") else ref.config
        revision = lock.commits.get(role, ref.revision)
        return dataclasses.replace(ref, revision=revision, config=config)

    pinned = {role: pin(ref, role) for role, ref in recipe.models.by_role.items()}
    return dataclasses.replace(recipe, models=recipe.models.with_roles(pinned)), lock


def load_recipe_or_lock(
    recipe: Recipe | str | Path, overrides: Sequence[str] = ()
) -> tuple[Recipe, Lock | None]:
    """Load what `run` and `plan` take: a recipe, or a lock, which runs as it is.

    Args:
        recipe: A path or bundled name; or a recipe that is loaded already.
        overrides: As for `load_recipe`.

    Raises:
        RecipeError: with all problems at once.
    """
    if isinstance(recipe, Recipe):
        return (override_recipe(recipe, overrides) if overrides else recipe), None
    path = Path(recipe)
    if is_lock(path):
        lock = open_lock(path, overrides)
        return lock.recipe, lock
    return load_recipe(recipe, overrides), None


def _recipe_of(lock: Lock) -> Recipe | None:
    """Return the recipe that a lock was probably made of: its paths are worth a look."""
    name = lock.recipe.name
    beside = [lock.path.parent / f"{name}.yaml", *lock.path.parent.glob("*.yaml")]
    for path in [*beside, bundled_recipes().get(name)]:
        if path is None or not path.is_file() or is_lock(path):
            continue
        try:
            recipe = load_recipe(path)
        except MergeError:
            continue
        if (
            recipe.name == name
            and recipe.models.by_role.keys() == lock.recipe.models.by_role.keys()
        ):
            return recipe
    return None


def _places(beside: Path, known: str | None) -> Iterator[Path]:
    yield beside
    yield Path.cwd() / beside.name
    if known is not None:
        yield Path(known)


def _choose(options: Sequence[Path], files: Mapping[str, FileRecord]) -> Path:
    """Return the first place whose files have the right sizes, else the first that is there."""

    def fits(option: Path) -> bool:
        if option.is_file():
            return option.name in files and option.stat().st_size == files[option.name].size_bytes
        return option.is_dir() and all(
            (option / name).is_file() and (option / name).stat().st_size == record.size_bytes
            for name, record in files.items()
        )

    fitting = [option for option in options if fits(option)]
    there = [option for option in options if option.exists()]
    return [*fitting, *there, *options][0]


def _with_pictures(edit: EditSpec, sibling: Recipe | None) -> EditSpec:
    known: dict[str, str] = {}
    for other in sibling.verify.edits if sibling is not None else ():
        known |= {Path(name).name: name for name in (other.image, *other.expected)}

    def find(name: str) -> str:
        options = list(_places(Path(name), known.get(Path(name).name)))
        return str(next((option for option in options if option.is_file()), options[0]))

    return dataclasses.replace(
        edit, image=find(edit.image), expected=[find(name) for name in edit.expected]
    )
