"""A component held against its config: what is missing, and what shape each tensor should have."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from merge.errors import list_first
from merge.family.expected.compare import compare_tensors
from merge.family.expected.fields import ConfigFields, Shape, Table
from merge.family.expected.tables import TABLES

# A config that lacks these was not written by a library, and its defaults are another model's.
_TELLING = {"UNet2DConditionModel": "block_out_channels", "AutoencoderKL": "block_out_channels"}


@dataclass(frozen=True, slots=True)
class Fit:
    """How a component fits its config.

    Attributes:
        shapes: Key to the shape that its numbers must be stored in, where that is another one.
        problems: Why a loader could not give the same model every time, a line each.
        notes: What else a user should know.
    """

    shapes: Mapping[str, Shape] = field(default_factory=dict)
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def expected_tensors(config: Mapping[str, Any], class_name: str = "") -> Table | None:
    """Return the tensors of the class that a config names.

    Args:
        config: A component's parsed `config.json`.
        class_name: Of the component, where its pipeline states it; default: the config's own.

    Returns:
        Key to shape, in the spelling of published files; None for a class, or a rare setting of
        one, that there is no table for.

    Raises:
        CheckpointError: a value of the config is impossible; the message names its field.
    """
    name = class_name or _class_of(config)
    table = TABLES.get(name)
    return table(ConfigFields(config, name)) if table is not None else None


def fit_to_config(
    component: str,
    found: Mapping[str, Shape],
    config: Mapping[str, Any] | None,
    class_name: str = "",
) -> Fit:
    """Compare a component's tensors with what its config asks for.

    Args:
        component: Its name, for messages.
        found: Key to shape.
        config: Its parsed `config.json`; nothing is compared without one.
        class_name: As for `expected_tensors`.

    Raises:
        CheckpointError: a value of the config is impossible.
    """
    if config is None:
        return Fit()
    telling = _TELLING.get(class_name or _class_of(config))
    expected = None if telling and telling not in config else expected_tensors(config, class_name)
    if expected is None:
        return Fit()
    differences = compare_tensors(expected, found)
    problems = []
    if differences.missing:
        count = len(differences.missing)
        what = "a weight" if count == 1 else f"{count} weights"
        verb = "is" if count == 1 else "are"
        problems.append(
            f"{component}: {what} that its config asks for {verb} missing: "
            f"{list_first(differences.missing)}"
        )
    problems += [
        f"{component}: {key} has shape {list(shape)}, and its config asks for {list(wanted)}"
        for key, (shape, wanted) in differences.misshaped.items()
    ]
    notes = []
    if differences.reshaped:
        key, wanted = next(iter(differences.reshaped.items()))
        count = len(differences.reshaped)
        notes.append(
            f"{component}: {count} of its tensors are stored in another shape than their config's, "
            f"such as {key}, {list(found[key])} for {list(wanted)}; the numbers are the same, and "
            "the config's shape is written"
        )
    if differences.extra:
        notes.append(f"{component}: nothing loads its keys {list_first(differences.extra)}")
    return Fit(differences.reshaped, tuple(problems), tuple(notes))


def _class_of(config: Mapping[str, Any]) -> str:
    architectures = config.get("architectures")
    if config.get("_class_name"):
        return str(config["_class_name"])
    return str(architectures[0]) if isinstance(architectures, list) and architectures else ""
