"""Values of a record that somebody else may have written, with their types checked."""

from __future__ import annotations

import math
from typing import Any

from merge.errors import CheckpointError

_MISSING: Any = object()
# Far above every step, size and seed, and below where a number cannot be shown.
_MAX_NUMBER = 2**64


class RecordFields:
    """A table of a record.

    Every method takes a key and what to return when it is missing or null; without that it is an
    error, as is a value of another type.
    """

    def __init__(self, value: Any, where: str) -> None:
        """Take a value that has to be a table.

        Args:
            value: Parsed JSON or YAML.
            where: File and key, for messages.

        Raises:
            CheckpointError: it is none.
        """
        if not isinstance(value, dict):
            raise CheckpointError(f"{where} is no table")
        self.tree = value
        self._where = where

    def __contains__(self, key: str) -> bool:
        return self.tree.get(key) is not None

    def text(self, key: str, default: Any = _MISSING) -> str:
        """Return a string."""
        return str(self._get(key, default, str, "text"))

    def flag(self, key: str) -> bool:
        """Return true or false."""
        return bool(self._get(key, _MISSING, bool, "true or false"))

    def number(self, key: str, default: Any = _MISSING) -> float:
        """Return a finite number."""
        return float(self._bounded(key, default, (int, float), "a number"))

    def measure(self, key: str) -> float:
        """Return a number that a failed check may have left missing or not finite."""
        value = self.tree.get(key)
        if isinstance(value, float) and not math.isfinite(value):
            return value
        return self.number(key, math.nan)

    def count(self, key: str, default: Any = _MISSING) -> int:
        """Return a whole number."""
        return int(self._bounded(key, default, int, "a whole number"))

    def table(self, key: str) -> RecordFields:
        """Return a table; an empty one when it is missing."""
        return RecordFields(self._get(key, {}, dict, "a table"), f"{self._where}: {key}")

    def tables(self, key: str) -> tuple[RecordFields, ...]:
        """Return a list of tables; an empty one when it is missing."""
        items = self._get(key, [], list, "a list")
        return tuple(
            RecordFields(item, f"{self._where}: {key}[{index}]") for index, item in enumerate(items)
        )

    def counts(self, key: str) -> tuple[int, ...]:
        """Return a list of whole numbers; an empty one when it is missing."""
        items = self._get(key, [], list, "a list")
        if not all(type(item) is int and abs(item) <= _MAX_NUMBER for item in items):
            raise self._wrong(key, "a list of whole numbers")
        return tuple(items)

    def texts(self, key: str) -> tuple[str, ...]:
        """Return a list of strings; an empty one when it is missing."""
        items = self._get(key, [], list, "a list")
        if not all(isinstance(item, str) for item in items):
            raise self._wrong(key, "a list of texts")
        return tuple(items)

    def numbers(self) -> dict[str, float]:
        """Return all of the table: names to numbers."""
        return {str(key): self.number(key) for key in self.tree}

    def _bounded(self, key: str, default: Any, kind: Any, name: str) -> Any:
        value = self._get(key, default, kind, name)
        if isinstance(value, bool) or not -_MAX_NUMBER <= value <= _MAX_NUMBER:
            raise self._wrong(key, name)
        return value

    def _get(self, key: str, default: Any, kind: Any, name: str) -> Any:
        value = self.tree.get(key)
        if value is None:
            if default is _MISSING:
                raise self._wrong(key, name)
            return default
        if not isinstance(value, kind) or (isinstance(value, float) and not math.isfinite(value)):
            raise self._wrong(key, name)
        return value

    def _wrong(self, key: str, name: str) -> CheckpointError:
        return CheckpointError(f"{self._where}: {key} is not {name}")
