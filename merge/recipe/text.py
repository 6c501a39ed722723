"""YAML text to plain Python values, with strings kept as they were written.

YAML 1.1 reads `0123456` as the number 42798, `on` as true and `12:30` as 750. For a field that
the schema declares as a string the text itself is wanted; for a number such a spelling is an
error. The schema therefore steers the conversion.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import types
import typing
from collections.abc import Sequence
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from merge.errors import RecipeError
from merge.recipe.schema import DistilledRef, ModelRef

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".ckpt", ".pt", ".pth")
_PLAIN_NUMBER = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)?|[-+]?\.(inf|nan)", re.I | re.A)
_OCTAL = re.compile(r"[-+]?0\d+")
# Deep enough for every recipe, and far from the recursion limits of the libraries below.
MAX_DEPTH = 16
_NULL_WORDS = ("", "null", "Null", "NULL", "~")
_NULL_TAG = "tag:yaml.org,2002:null"
_MERGE_TAG = "tag:yaml.org,2002:merge"


def parse_yaml(text: str, schema: type, problems: list[str]) -> dict[str, Any]:
    """Return the values of a YAML mapping.

    Args:
        text: A whole document.
        schema: The dataclass that says which fields are strings and which are numbers.
        problems: Gets a line for each value whose spelling is refused.

    Raises:
        RecipeError: the text is no YAML, or no mapping.
    """
    value, node = _parse(text)
    converted: dict[str, Any] = _convert(node, value, schema, "", problems)
    return converted


def parse_value(text: str, annotation: Any, path: str, problems: list[str]) -> Any:
    """Return one value written after `key=` on the command line.

    Args:
        text: YAML, e.g. `0.5`, `[0, 1]` or `org/name@main`.
        annotation: The type that the schema declares for the key.
        path: The key, for messages.
        problems: Gets a line when the spelling is refused.
    """
    if annotation is str and not text.lstrip().startswith(("'", '"')):
        # YAML would cut `make it #1` at its comment and take `[x]` for a list.
        return None if text.strip() in _NULL_WORDS else text.strip()
    try:
        wrapped, root = _parse(f"value: {text}")
        ((_, node),) = root.value
    except (RecipeError, ValueError):
        # What is no YAML may still be a fine string, such as an instruction with a colon.
        if annotation is str:
            return text
        problems.append(f"{path}: {text!r} is not a YAML value")
        return None
    is_plain = isinstance(node, yaml.ScalarNode) and node.style is None and node.tag != _NULL_TAG
    if annotation in (ModelRef, DistilledRef, list[DistilledRef]) and is_plain:
        return _reference(text.strip())
    return _convert(node, wrapped["value"], annotation, path, problems)


def annotation_at(annotation: Any, keys: Sequence[str | int]) -> Any:
    """Return the declared type of a nested field; `Any` where the schema says nothing."""
    for key in keys:
        annotation = _strip_optional(annotation)
        origin = typing.get_origin(annotation)
        if isinstance(annotation, type) and dataclasses.is_dataclass(annotation):
            annotation = fields_of(annotation).get(str(key), Any)
        elif origin is list and isinstance(key, int):
            annotation = typing.get_args(annotation)[0]
        elif origin is dict:
            annotation = typing.get_args(annotation)[1]
        else:
            return Any
    return _strip_optional(annotation)


@functools.cache
def fields_of(schema: type) -> dict[str, Any]:
    """Return field name to evaluated annotation of a dataclass."""
    return typing.get_type_hints(schema)


def _parse(text: str) -> tuple[Any, Any]:
    # OmegaConf refuses duplicate keys, tags that build objects and alias bombs; the node tree of
    # the same text still has every scalar as it was written.
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        if not isinstance(root, yaml.MappingNode):
            raise RecipeError("the recipe is empty or not a mapping of names to values", [])
        config = OmegaConf.to_container(OmegaConf.create(text), resolve=False)
        if _depth(config) > MAX_DEPTH:
            raise RecipeError(f"the recipe is nested more than {MAX_DEPTH} levels deep", [])
    except RecursionError:
        raise RecipeError("the recipe is nested too deeply", []) from None
    except (KeyError, AttributeError) as error:
        # PyYAML's own slips on an explicit tag with a wrong value, such as `!!bool x`.
        raise RecipeError(f"the recipe has a YAML tag with a wrong value: {error}", []) from None
    except (yaml.YAMLError, OmegaConfBaseException, ValueError) as error:
        where = getattr(error, "problem_mark", None)
        line = f" in line {where.line + 1}" if where is not None else ""
        problem = getattr(error, "problem", None) or str(error).split("\n", 1)[0]
        raise RecipeError(f"the recipe is not valid YAML{line}: {problem}", []) from None
    return config, root


def _depth(value: Any) -> int:
    if isinstance(value, (dict, list)):
        items = value.values() if isinstance(value, dict) else value
        return 1 + max(map(_depth, items), default=0)
    return 0


def _convert(node: yaml.Node, value: Any, annotation: Any, path: str, problems: list[str]) -> Any:
    annotation = _strip_optional(annotation)
    if isinstance(node, yaml.MappingNode) and isinstance(value, dict):
        return _convert_mapping(node, value, annotation, path, problems)
    if isinstance(node, yaml.SequenceNode) and isinstance(value, list):
        item = typing.get_args(annotation)[0] if typing.get_origin(annotation) is list else Any
        return [
            _convert(child, entry, item, f"{path}[{index}]", problems)
            for index, (child, entry) in enumerate(zip(node.value, value, strict=True))
        ]
    if not isinstance(node, yaml.ScalarNode) or node.tag == _NULL_TAG:
        return value
    if annotation is str:
        return node.value
    if annotation in (ModelRef, DistilledRef) or annotation == list[DistilledRef]:
        return _reference(node.value)
    if annotation in (float, int) and not _is_plain_number(node.value):
        problems.append(f"{path}: {node.value!r} is not a plain number")
    if annotation is Any and not _reads_as_written(value, node.value):
        problems.append(f"{path}: YAML reads {node.value!r} as {value!r}, put it in quotes")
    return value


def _convert_mapping(
    node: yaml.MappingNode, value: dict[Any, Any], annotation: Any, path: str, problems: list[str]
) -> dict[str, Any]:
    if annotation == list[DistilledRef]:
        annotation = DistilledRef
    result: dict[str, Any] = {}
    if any(key.tag == _MERGE_TAG for key, _ in node.value):
        problems.append(f"{path or 'recipe'}: YAML merge keys (<<) are not supported")
        return result
    keys = [str(key.value) for key, _ in node.value]
    if len(set(keys)) < len(keys) or len(value) < len(keys):
        # `1` and `"1"`, or `on` and `true`, of which only one would be left.
        problems.append(f"{path or 'recipe'}: two of its keys are the same: {', '.join(keys)}")
        return result
    for key, (_, child), entry in zip(keys, node.value, value.values(), strict=True):
        child_path = f"{path}.{key}" if path else key
        result[key] = _convert(child, entry, annotation_at(annotation, [key]), child_path, problems)
    return result


def _reference(text: str) -> dict[str, Any]:
    """Split a model written as one string: a path, or `org/name[@revision]` on the Hub."""
    if text.startswith((".", "/", "~")) or text.lower().endswith(WEIGHT_SUFFIXES):
        return {"path": text}
    repo, _, revision = text.partition("@")
    return {"repo": repo, "revision": revision} if revision else {"repo": repo}


def _reads_as_written(value: Any, text: str) -> bool:
    if isinstance(value, bool):
        return text.lower() in ("true", "false")
    return isinstance(value, str) or _is_plain_number(text)


def _is_plain_number(text: str) -> bool:
    # An interpolation is checked by its type, once it has a value.
    return "${" in text or (bool(_PLAIN_NUMBER.fullmatch(text)) and not _OCTAL.fullmatch(text))


def _strip_optional(annotation: Any) -> Any:
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):
        rest = [arg for arg in typing.get_args(annotation) if arg is not types.NoneType]
        if len(rest) == 1:
            return rest[0]
    return annotation
