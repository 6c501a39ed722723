"""Recipe files and overrides to a checked, frozen `Recipe`."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from merge.disclosure.secrets import find_tokens
from merge.errors import RecipeError
from merge.family.registry import mergeable_names
from merge.recipe.bundled import expand_home, find_recipe
from merge.recipe.schema import DistilledRef, EditSpec, Recipe
from merge.recipe.text import annotation_at, fields_of, parse_value, parse_yaml
from merge.recipe.validate import did_you_mean, validate

# Resolvers such as ${oc.env:TOKEN} leak secrets and ${oc.coerce:...} imports modules named in the
# YAML, so only a plain ${key} may appear.
_INTERPOLATION = re.compile(r"\$\{[A-Za-z_][A-Za-z0-9_.\[\]]*\}")
# A dozen strings that each repeat another ten times would fill the memory.
MAX_INTERPOLATIONS = 16
_KEY_PART = r"([^.\[\]=]++)|\[([^\]]+)\]"
_KEY = re.compile(rf"(?:{_KEY_PART})(?:\.?(?:{_KEY_PART}))*")

Keys = list[str | int]


def load_recipe(recipe: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Load, override and check a recipe.

    Args:
        recipe: Path of a YAML file, or the name of a bundled recipe.
        overrides: `key=value` words such as `weight=0.8`, `models.target=./mine` or
            `block_weights[down_blocks.0.*]=0.5`.

    Returns:
        The recipe with every path absolute: those of the file relative to it, those of overrides
        relative to the current folder.

    Raises:
        RecipeError: with all problems at once.
    """
    path = find_recipe(str(recipe))
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"the recipe {path} cannot be read: {error}", []) from error
    return parse_recipe(text, path, overrides)


def override_recipe(recipe: Recipe, overrides: Sequence[str]) -> Recipe:
    """Change values of a recipe that is loaded already.

    Args:
        recipe: From `load_recipe`.
        overrides: As for `load_recipe`.

    Raises:
        RecipeError: with all problems at once.
    """
    text = yaml.safe_dump(dataclasses.asdict(recipe), sort_keys=False, allow_unicode=True)
    return parse_recipe(text, Path(f"{recipe.name}.yaml"), overrides)


def parse_recipe(text: str, path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Override and check a recipe that was read already.

    Args:
        text: YAML.
        path: Where it is from: for messages, and for paths relative to it.
        overrides: As for `load_recipe`.

    Raises:
        RecipeError: with all problems at once.
    """
    _refuse_tokens(text, path.name)
    for word in overrides:
        _refuse_tokens(word, "an override")
    problems: list[str] = []
    tree = parse_yaml(text, Recipe, problems)
    _list_distilled(tree)
    overridden = [_apply_override(tree, word, problems) for word in overrides]
    _list_distilled(tree)
    loaded = None
    if _interpolation_count(tree) > MAX_INTERPOLATIONS:
        problems.append(f"${{key}} is used more than {MAX_INTERPOLATIONS} times")
    else:
        loaded = _to_recipe(tree, problems)
    if loaded is not None:
        origins = [keys for keys in overridden if keys]
        loaded = _absolute_paths(loaded, path.resolve().parent, origins)
        loaded = _order_components(loaded)
        problems += [
            problem
            for problem in validate(loaded)
            if not _is_reported(problem.split(": ", 1)[0], problems)
        ]
    if problems or loaded is None:
        raise RecipeError(
            f"the recipe {path.name} is not valid:",
            problems,
            hint="`instruct-merge recipes sd15-lcm-lora` prints a recipe to start from",
        )
    return loaded


def _refuse_tokens(text: str, where: str) -> None:
    """Refuse a token before anything can repeat it: recipes end up in locks, cards and logs."""
    for finding in find_tokens(text):
        raise RecipeError(
            f"{where} holds what looks like a secret: {finding.kind}, line {finding.line}",
            [],
            hint="a token comes from HF_TOKEN or `hf auth login`; revoke one that was shared",
        )


def _list_distilled(tree: dict[str, Any]) -> None:
    """Turn a single distilled model into a list of one, the only form after this."""
    models = tree.get("models")
    if isinstance(models, dict) and isinstance(models.get("distilled"), dict):
        models["distilled"] = [models["distilled"]]


def _apply_override(tree: dict[str, Any], word: str, problems: list[str]) -> Keys:
    name, equals, text = word.partition("=")
    # A glob key may itself hold an equals sign only inside brackets, which no key of a model has.
    keys = _split_key(name)
    if not equals or not keys:
        problems.append(f"override {word!r} is not of the form key=value")
        return []
    # The short form models.distilled.path=... means the only distilled model.
    if keys[:2] == ["models", "distilled"] and len(keys) > 2 and isinstance(keys[2], str):
        models = tree.get("models")
        listed = models.get("distilled") if isinstance(models, dict) else None
        if isinstance(listed, list) and len(listed) > 1:
            problems.append(f"override {word!r}: say which one, as in models.distilled[0]")
            return []
        keys.insert(2, 0)
    value = parse_value(text, annotation_at(Recipe, keys), _dotted(keys), problems)
    node: Any = tree
    for key, following in itertools.pairwise(keys):
        node = _step_into(node, key, [] if isinstance(following, int) else {})
    last = keys[-1]
    if isinstance(node, dict):
        node[str(last)] = value
    elif isinstance(node, list) and isinstance(last, int) and last < len(node):
        node[last] = value
    else:
        problems.append(f"override {word!r}: there is no {name}")
        return []
    return keys


def _step_into(node: Any, key: str | int, empty: Any) -> Any:
    """Return what a key leads to, made where a mapping lacks it; None where nothing can be."""
    if isinstance(node, dict):
        if node.get(str(key)) is None:
            node[str(key)] = empty
        return node[str(key)]
    if isinstance(node, list) and isinstance(key, int) and key < len(node):
        return node[key]
    return None


def _split_key(name: str) -> Keys:
    """Split `a.b[0]` or `block_weights[down_blocks.0.*]`; empty when malformed."""
    if not _KEY.fullmatch(name):
        return []
    return [
        int(bracketed) if bracketed.isdecimal() else plain or bracketed
        for plain, bracketed in re.findall(_KEY_PART, name)
    ]


def _entries(value: Any, path: str) -> Iterator[tuple[str | int, str, Any]]:
    """Yield what a mapping or a list holds: key or index, where that is, and the value."""
    if isinstance(value, dict):
        yield from ((key, f"{path}.{key}", item) for key, item in value.items())
    elif isinstance(value, list):
        yield from ((index, f"{path}[{index}]", item) for index, item in enumerate(value))


def _interpolation_count(value: Any) -> int:
    if isinstance(value, str):
        return value.count("${")
    return sum(_interpolation_count(item) for _, _, item in _entries(value, ""))


def _text_problems(value: Any, path: str) -> Iterator[str]:
    for key, inner, item in _entries(value, path):
        if "${" in str(key):
            yield f"{path}: keys may not hold an interpolation ({key})"
        yield from _text_problems(item, inner)
    if isinstance(value, str) and "${" in _INTERPOLATION.sub("", value):
        yield f"{path}: only plain ${{key}} may be used, not {value!r}"
    elif value == "???":
        # OmegaConf's mark of a value that is still to come; it would give the default instead.
        yield f"{path}: '???' is no value"


def _shape_problems(annotation: Any, value: Any, path: str) -> Iterator[str]:
    """Say what is wrong with the nesting of a value, of which OmegaConf checks only the top."""
    origin = typing.get_origin(annotation)
    wants = dict if dataclasses.is_dataclass(annotation) else origin
    if wants is dict and not isinstance(value, dict):
        yield f"{path}: must be a mapping of names to values, not {repr(value)[:60]}"
    elif wants is list and not isinstance(value, list):
        yield f"{path}: must be a list such as [a, b], not {repr(value)[:60]}"
    elif wants is None and annotation is not Any and isinstance(value, (dict, list)):
        yield f"{path}: must be a single value, not {repr(value)[:60]}"
    elif origin in (dict, list):
        wanted = typing.get_args(annotation)[-1]
        for _, inner, item in _entries(value, path):
            if item is None and wanted is not Any:
                yield f"{inner}: it has no value"
            else:
                yield from _shape_problems(wanted, item, inner)


def _to_recipe(tree: dict[str, Any], problems: list[str]) -> Recipe | None:
    """Convert to the schema, leaving out what is wrong so that all the rest is checked too."""
    clean = _checked(tree, Recipe, [], problems)
    merged = OmegaConf.merge(_defaults(Recipe), clean)
    try:
        # A missing name shows up a second time in the default of output.folder.
        missing = sorted(OmegaConf.missing_keys(merged) - {"output.folder"})
        loaded = None if missing else OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        problems.append(f"{error.full_key}: {_first_line(error)}")
        return None
    problems += [f"{key}: missing" for key in missing if not _is_reported(key, problems)]
    assert loaded is None or isinstance(loaded, Recipe)
    return loaded


@functools.cache
def _defaults(schema: type) -> Any:
    # 4 ms to build and wanted for every key of a recipe; OmegaConf.merge works on a copy.
    return OmegaConf.structured(schema)


def _checked(tree: dict[str, Any], schema: type, path: Keys, problems: list[str]) -> dict[str, Any]:
    declared = fields_of(schema)
    clean: dict[str, Any] = {}
    for key, value in tree.items():
        here: Keys = [*path, key]
        where = _dotted(here)
        if key not in declared:
            problems.append(f"{where}: unknown key{did_you_mean(key, declared)}")
            continue
        annotation = annotation_at(schema, [key])
        # One is enough: the next are often the same mistake again.
        problem = "" if value is None else next(_shape_problems(annotation, value, where), "")
        if problem:
            problems.append(problem)
            continue
        if dataclasses.is_dataclass(annotation) and isinstance(value, dict):
            clean[key] = _checked(value, annotation, here, problems)  # type: ignore[arg-type]
            continue
        if annotation in (list[DistilledRef], list[EditSpec]) and value is not None:
            item = DistilledRef if annotation == list[DistilledRef] else EditSpec
            value = [
                _checked(entry, item, [*here, index], problems) for index, entry in enumerate(value)
            ]
        else:
            found = list(_text_problems(value, where))
            problems += found
            if found or _is_reported(where, problems):
                # OmegaConf runs resolvers as soon as it reads a value: these must not reach it.
                continue
        try:
            OmegaConf.merge(_defaults(schema), {key: value})
            clean[key] = value
        except OmegaConfBaseException as error:
            problems.append(f"{where}: {_first_line(error)}")
    return clean


def _is_reported(field: str, problems: Sequence[str]) -> bool:
    """Return True when a field, or something inside of it, is named as a problem already."""
    return any(problem.startswith((f"{field}:", f"{field}.", f"{field}[")) for problem in problems)


def _first_line(error: OmegaConfBaseException) -> str:
    return str(error.msg or error).split("\n", 1)[0]


def _dotted(keys: Keys) -> str:
    text = ""
    for key in keys:
        text += f"[{key}]" if isinstance(key, int) else (f".{key}" if text else key)
    return text


def _absolute_paths(recipe: Recipe, recipe_folder: Path, overridden: Sequence[Keys]) -> Recipe:
    def absolute(text: str, *keys: str | int) -> str:
        if "://" in text:
            return text  # A URL, which the checks refuse by its name.
        by_override = any(list(keys[: len(o)]) == o for o in overridden)
        # Symbolic links stay as written: a cache of links keeps its own names that way.
        return str((Path.cwd() if by_override else recipe_folder) / expand_home(text))

    def model(ref: Any, *keys: str | int) -> Any:
        if ref is None:
            return None
        changes: dict[str, Any] = {}
        if ref.path is not None:
            changes["path"] = absolute(ref.path, *keys, "path")
        if ref.config is not None and ref.config.startswith((".", "/", "~")):
            changes["config"] = absolute(ref.config, *keys, "config")
        return dataclasses.replace(ref, **changes)

    models = dataclasses.replace(
        recipe.models,
        target=model(recipe.models.target, "models", "target"),
        distilled=[
            model(ref, "models", "distilled", index)
            for index, ref in enumerate(recipe.models.distilled)
        ],
        base=model(recipe.models.base, "models", "base"),
    )
    edits = [
        dataclasses.replace(
            edit,
            image=absolute(edit.image, "verify", "edits", index, "image"),
            expected=[
                absolute(name, "verify", "edits", index, "expected", at)
                for at, name in enumerate(edit.expected)
            ],
        )
        for index, edit in enumerate(recipe.verify.edits)
    ]
    verify = dataclasses.replace(recipe.verify, edits=edits)
    return dataclasses.replace(recipe, models=models, verify=verify)


def _order_components(recipe: Recipe) -> Recipe:
    """Put components into one order: they are a set, and no bytes may depend on how it is written.

    Names that are none of them, or stand there twice, keep their places for the error.
    """
    named, known = recipe.components, mergeable_names()
    if named is None or len(set(named)) < len(named) or not set(named) <= set(known):
        return recipe
    return dataclasses.replace(recipe, components=[name for name in known if name in named])
