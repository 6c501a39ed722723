"""The axes of a grid, as words: `weight=0:1.5:0.25`, `timesteps=999/599/299/99,999/499/249/99`."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation, localcontext

from merge.errors import RecipeError

MAX_AXES = 3
MAX_CELLS = 10_000
# Of the numbers of a range, before and after the point.
_MAX_DIGITS = 20
_OPENING, _CLOSING, _QUOTES = "[{(", "]})", "'\""
HINT = "an axis is KEY=A,B,C or KEY=START:STOP:STEP, such as weight=0:1.5:0.25"

# Settings of the edits, which a recipe has under `verify`.
EDIT_SETTINGS = (
    "steps",
    "guidance_scale",
    "image_guidance_scale",
    "timesteps",
    "seed",
    "resolution",
    "original_inference_steps",
)
# Of a recipe, and nothing that is measured depends on them.
_WITHOUT_EFFECT = ("name", "output", "allow_noop", "verify.edits", "verify.compare")


@dataclass(frozen=True, slots=True)
class AxisValue:
    """One value of an axis.

    Attributes:
        label: As it was typed.
        words: The overrides of a recipe that it stands for.
    """

    label: str
    words: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Axis:
    """What is varied, and which values it takes.

    Attributes:
        key: A recipe's key, or the name of an edit setting.
        values: In their order.
    """

    key: str
    values: tuple[AxisValue, ...]


def read_axes(words: Sequence[str]) -> tuple[tuple[Axis, ...], tuple[str, ...]]:
    """Sort words into axes and overrides of every cell.

    A word with several values is an axis, `weight=0.5,1`; one with a single value an override,
    `steps=2`, whose key may be the name of an edit setting too.

    Args:
        words: Of the form KEY=VALUES.

    Returns:
        The axes, and overrides as `load_recipe` takes them.

    Raises:
        RecipeError: with all problems at once.
    """
    axes: list[Axis] = []
    overrides: list[str] = []
    problems: list[str] = []
    singles: set[str] = set()
    for word in words:
        key, equals, text = word.partition("=")
        key = _short(key.strip())
        if not key or not equals:
            problems.append(f"{word!r} is not of the form KEY=VALUES")
            continue
        try:
            values = _values(text)
        except ValueError as error:
            problems.append(f"{word!r}: {error}")
            continue
        if len(values) == 1:
            singles.add(key)
            overrides += override_words(key, values[0])
            continue
        problems += _axis_problems(key, values, [axis.key for axis in axes])
        axes.append(Axis(key, tuple(AxisValue(v, override_words(key, v)) for v in values)))
    problems += _clashes([axis.key for axis in axes], singles)
    if len(axes) > MAX_AXES:
        problems.append(f"there are {len(axes)} axes, and {MAX_AXES} are the most")
    count = cell_count(axes)
    if count > MAX_CELLS:
        problems.append(f"the grid has {count:,} cells, and {MAX_CELLS:,} are the most")
    if problems:
        raise RecipeError("the grid is not valid:", problems, hint=HINT)
    return tuple(axes), tuple(overrides)


def override_words(key: str, value: str) -> tuple[str, ...]:
    """Return the overrides of a recipe that a value of a key stands for.

    Args:
        key: A recipe's key, or the name of an edit setting.
        value: As it is typed; timesteps with slashes, `999/599/299/99`.
    """
    if key == "steps":
        # Explicit timesteps would win over the number of steps.
        return f"verify.steps={value}", "verify.timesteps=null"
    if key == "timesteps":
        text = value.strip()
        is_list = text.startswith("[") or text in ("null", "")
        return (f"verify.timesteps={text if is_list else '[' + text.replace('/', ',') + ']'}",)
    if key == "seed":
        return (f"verify.seeds=[{value}]",)
    return (f"verify.{key}={value}",) if key in EDIT_SETTINGS else (f"{key}={value}",)


def cell_count(axes: Sequence[Axis]) -> int:
    """Return the number of combinations."""
    count = 1
    for axis in axes:
        count *= len(axis.values)
    return count


def combinations(axes: Sequence[Axis]) -> Iterator[tuple[AxisValue, ...]]:
    """Yield one value of each axis, the last axis changing fastest."""
    yield from itertools.product(*(axis.values for axis in axes))


def _short(key: str) -> str:
    """Return the name of an edit setting without the section that a recipe has it in."""
    name = key.removeprefix("verify.")
    return name if name in EDIT_SETTINGS else key


def _axis_problems(key: str, values: Sequence[str], others: Sequence[str]) -> Iterator[str]:
    if key in others:
        yield f"{key}: it is an axis twice"
    if any(key == name or key.startswith((f"{name}.", f"{name}[")) for name in _WITHOUT_EFFECT):
        yield f"{key}: nothing that is measured depends on it"
    if key.startswith("verify.seeds"):
        yield f"{key}: cells differ in one seed, as in seed=0,1"
    meanings = [_meaning(key, value) for value in values]
    twice = [value for at, value in enumerate(values) if meanings[at] in meanings[:at]]
    if twice:
        yield f"{key}: {', '.join(dict.fromkeys(twice))} is there twice"
    if any(not value for value in values):
        yield f"{key}: a value is empty"


def _clashes(axes: Sequence[str], singles: set[str]) -> Iterator[str]:
    """Say which words would take away the effect of others."""
    for key in axes:
        if key in singles:
            yield f"{key}: it is an axis, and has one value for every cell too"
    if {"steps", "timesteps"} <= {*axes, *singles}:
        yield "steps, timesteps: explicit timesteps have a number, so name one of the two"


def _meaning(key: str, value: str) -> object:
    """Return what is the same for two ways to write a value."""
    numbers = _numbers([value])
    return numbers[0] if numbers else override_words(key, value)[0].replace(" ", "")


def _values(text: str) -> list[str]:
    """Return the values of a word: those between commas, or of a range."""
    parts = _split(text)
    if len(parts) == 1 and text.count(":") == 2:
        numbers = _numbers(text.split(":"))
        if numbers is not None:
            return _range(*numbers)
    if len(parts) == 1 and text.count(":") == 1 and _numbers(text.split(":")) is not None:
        raise ValueError("a range has three numbers, START:STOP:STEP")
    return parts


def _split(text: str) -> list[str]:
    """Split at the commas that are in no brackets and no quotes."""
    parts, depth, quote, begin = [], 0, "", 0
    for index, letter in enumerate(text):
        if quote:
            quote = "" if letter == quote else quote
        elif letter in _QUOTES:
            quote = letter
        elif letter in _OPENING:
            depth += 1
        elif letter in _CLOSING:
            depth -= 1
        elif letter == "," and depth == 0:
            parts.append(text[begin:index].strip())
            begin = index + 1
    return [*parts, text[begin:].strip()]


def _numbers(words: Sequence[str]) -> list[Decimal] | None:
    try:
        numbers = [Decimal(word.strip()) for word in words]
    except InvalidOperation:
        return None
    return numbers if all(number.is_finite() for number in numbers) else None


def _range(start: Decimal, stop: Decimal, step: Decimal) -> list[str]:
    """Return the numbers of a range with both ends, exact as decimals are."""
    numbers = (start, stop, step)
    if any(n.adjusted() > _MAX_DIGITS or _places(n) > _MAX_DIGITS for n in numbers):
        raise ValueError(f"its numbers have more than {_MAX_DIGITS} digits on one side")
    # No digit of such numbers is lost.
    with localcontext(prec=8 * _MAX_DIGITS):
        if step == 0 or (stop - start) * step < 0:
            raise ValueError("its step does not lead from START to STOP")
        count = int((stop - start) // step) + 1
        if count > MAX_CELLS:
            raise ValueError(f"it has {count:,} values")
        values = [start + index * step for index in range(count)]
        return [f"{value.normalize() if value else Decimal(0):f}" for value in values]


def _places(number: Decimal) -> int:
    """Return the digits after the point."""
    exponent = number.as_tuple().exponent
    return -exponent if isinstance(exponent, int) else 0
