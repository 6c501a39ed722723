"""Lists of edits in a file, and the list that comes with the tool."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from merge.errors import ImageError, RecipeError
from merge.recipe.schema import EditSpec
from merge.recipe.validate import timesteps_problems
from merge.verify.model import Edit

_KEYS = tuple(field.name for field in dataclasses.fields(EditSpec))
_HINT = "an edit is {image, instruction, seed, before_caption, after_caption, expected, steps}"

DEFAULT_EDITS = tuple(
    Edit(None, **fields)
    for fields in yaml.safe_load(
        Path(__file__).with_name("default_edits.yaml").read_text(encoding="utf-8")
    )
)


def read_edits(path: str | Path) -> list[Edit]:
    """Read a YAML or JSON list of edits; pictures are relative to the file.

    Each is `{image, instruction, seed?, before_caption?, after_caption?, expected?,
    expected_limit?, steps? | timesteps?}`.

    Raises:
        RecipeError: the file is no such list; all problems at once.
        ImageError: a picture is not there.
    """
    path = Path(path)
    tree = _parse(path)
    if not isinstance(tree, list):
        raise RecipeError(
            f"{path} is no list of edits but {_kind(tree)}", [], hint="start each edit with `- `"
        )
    problems = [
        problem for index, item in enumerate(tree) for problem in _problems(f"edits[{index}]", item)
    ]
    if not tree:
        problems.append("it is empty: name at least one edit")
    if problems:
        raise RecipeError(f"the edits in {path.name} are not valid:", problems, hint=_HINT)
    edits = [_to_edit(path.parent, item) for item in tree]
    missing = [p for edit in edits for p in (edit.image, *edit.expected) if p and not p.is_file()]
    if missing:
        raise ImageError(
            f"there is no picture {', '.join(map(str, missing))}",
            hint=f"pictures are relative to {path.name}",
        )
    return edits


def _parse(path: Path) -> Any:
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            # YAML takes JSON's surrogate pairs for two broken characters.
            return json.loads(text, object_pairs_hook=_object)
        _refuse_twins(yaml.compose(text, Loader=yaml.SafeLoader))
        return yaml.safe_load(text)
    except RecursionError:
        raise RecipeError(f"{path} is nested too deeply", [], hint=_HINT) from None
    except (OSError, ValueError, yaml.YAMLError, AttributeError, KeyError, TypeError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f" in line {mark.line + 1}" if mark is not None else ""
        reason = getattr(error, "problem", None) or getattr(error, "strerror", None) or str(error)
        raise RecipeError(f"{path} cannot be read{line}: {reason}", [], hint=_HINT) from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
        raise ValueError(f"two of its keys are the same: {', '.join(names)}")
    return dict(pairs)


def _refuse_twins(node: Any) -> None:
    """Refuse a mapping with the same key twice, of which YAML would keep the last."""
    for item in node.value if isinstance(node, yaml.SequenceNode) else []:
        if isinstance(item, yaml.MappingNode):
            _object([(str(key.value), None) for key, _ in item.value])


def _problems(where: str, item: Any) -> Iterable[str]:
    if not isinstance(item, dict):
        yield f"{where}: must be a mapping of names to values, not {_kind(item)}"
        return
    for key in item:
        if key not in _KEYS:
            close = difflib.get_close_matches(str(key), _KEYS, n=1)
            hint = f", did you mean {close[0]!r}?" if close else ""
            yield f"{where}.{key}: unknown key{hint}"
    for name in ("image", "instruction"):
        if item.get(name) is None:
            yield f"{where}.{name}: missing"
    for name in ("image", "instruction", "before_caption", "after_caption"):
        value = item.get(name)
        if value is not None and not isinstance(value, str):
            yield f"{where}.{name}: {value!r} is not text, put it in quotes"
        elif isinstance(value, str) and (not value.strip() or "\0" in value):
            yield f"{where}.{name}: it is empty"
    seed = item.get("seed")
    if seed is not None and (type(seed) is not int or not 0 <= seed < 2**63):
        yield f"{where}.seed: {seed!r} is not a whole number within 0 to 2^63 - 1"
    steps, timesteps = item.get("steps"), item.get("timesteps")
    if steps is not None and (type(steps) is not int or not 1 <= steps <= 1000):
        yield f"{where}.steps: {steps!r} is not a whole number within 1 to 1000"
    if isinstance(timesteps, list) and all(type(step) is int for step in timesteps):
        yield from timesteps_problems(f"{where}.timesteps", timesteps)
    elif timesteps is not None:
        yield f"{where}.timesteps: {timesteps!r} is no list of whole numbers such as [999, 299]"
    if steps is not None and timesteps is not None:
        yield f"{where}: name steps or timesteps, not both"
    expected = item.get("expected")
    if expected is not None and not (
        isinstance(expected, list) and all(isinstance(e, str) and e.strip() for e in expected)
    ):
        yield f"{where}.expected: must be a list of pictures such as [a.png, b.png]"
    limit = item.get("expected_limit")
    if limit is not None and not (
        type(limit) in (int, float) and math.isfinite(limit) and limit >= 0
    ):
        yield f"{where}.expected_limit: {limit!r} is not a finite number of at least 0"


def _to_edit(folder: Path, item: dict[str, Any]) -> Edit:
    given = {name: value for name, value in item.items() if value is not None}
    paths = tuple(folder / Path(name).expanduser() for name in given.pop("expected", ()))
    image = folder / Path(given.pop("image")).expanduser()
    timesteps = tuple(given.pop("timesteps")) if "timesteps" in given else None
    return Edit(image, expected=paths, timesteps=timesteps, **given)


def _kind(value: Any) -> str:
    if isinstance(value, dict):
        return "a mapping"
    return "empty" if value is None else repr(value)[:60]
