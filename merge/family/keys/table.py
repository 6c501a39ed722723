"""The keys of a component in both layouts as rows of a table, which is read either way."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from merge.errors import CheckpointError
from merge.family.keys.pairs import SAME, UNKNOWN_KEY_HINT, KeyPair, checked_pairs, strip

# What varies in a row, and how it looks. Blocks `from_end` are numbered from the other end in the
# other layout.
_PARTS = {
    "half": "encoder|decoder",
    "block": r"\d+",
    "from_end": r"\d+",
    "layer": r"\d+",
    "leaf": r"\w+",
    "term": "weight|bias",
    "rest": ".+",
}
_PART = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True, slots=True)
class Row:
    """Keys that are alike.

    Attributes:
        folder: A key in the component's own file, where `{name}` stands for what varies; empty for
            what that leaves out.
        single: The same key in a single file, with the same parts, without the component's prefix;
            likewise.
        form: As for `KeyPair`.
        part: As for `KeyPair`; a fused key of a single file has a row for each.
    """

    folder: str
    single: str
    form: str = SAME
    part: int = 0


@dataclass(frozen=True, slots=True)
class KeyTable:
    """The keys of a component; of several rows that fit a key the first one counts.

    Attributes:
        prefix: What all its keys of a single file begin with.
        rows: All of them.
        what: The map's name in messages.
        component: Of a folder, in messages.
        model: Of a single file, in messages.
        respell: Turns accepted spellings of a folder's key into the one of the rows.
    """

    prefix: str
    rows: Sequence[Row]
    what: str
    component: str
    model: str
    respell: Callable[[str], str] = str

    def to_single(self, keys: Iterable[str]) -> tuple[KeyPair, ...]:
        """Translate all keys of a component's own file.

        Raises:
            CheckpointError: a key is in no row, or the map is not one-to-one.
        """
        found = {key: self._folder_row(self.respell(key)) for key in sorted(keys)}
        last = _last_block(found.values())
        pairs = []
        for key, (row, parts) in found.items():
            if row is None:
                raise CheckpointError(
                    f"{key}: this key of {self.component} has no name in a single file"
                )
            if row.single:
                name = self.prefix + _fill(row.single, parts, last)
                pairs.append(KeyPair(key, name, row.form, row.part))
        return checked_pairs(pairs, self.what)

    def to_folder(self, names: Collection[str]) -> tuple[KeyPair, ...]:
        """Translate the component's keys of a single file; others are passed over.

        Raises:
            CheckpointError: a key with the prefix is in no row, or the map is not one-to-one.
        """
        found = {name: self._single_row(name) for name in strip(names, self.prefix)}
        last = _last_block(found.values())
        pairs = []
        for name, (first, parts) in found.items():
            if first is None:
                raise CheckpointError(
                    f"{self.prefix}{name}: this is no key of {self.model}", hint=UNKNOWN_KEY_HINT
                )
            for row in self.rows:
                if row.folder and row.single == first.single:
                    key = _fill(row.folder, parts, last)
                    pairs.append(KeyPair(key, self.prefix + name, row.form, row.part))
        return checked_pairs(pairs, self.what)

    def unknown(self, names: Collection[str]) -> list[str]:
        """Return keys of a single file that have the component's prefix and are in no row."""
        inner = strip(names, self.prefix)
        return [self.prefix + name for name in inner if self._single_row(name)[0] is None]

    def _folder_row(self, key: str) -> tuple[Row | None, Mapping[str, str]]:
        return _first((row, _pattern(row.folder).fullmatch(key)) for row in self.rows if row.folder)

    def _single_row(self, name: str) -> tuple[Row | None, Mapping[str, str]]:
        return _first(
            (row, _pattern(row.single).fullmatch(name)) for row in self.rows if row.single
        )


def _first(
    rows: Iterable[tuple[Row, re.Match[str] | None]],
) -> tuple[Row | None, Mapping[str, str]]:
    """Return the first row that fits, and what its parts are."""
    found = ((row, match.groupdict()) for row, match in rows if match)
    return next(found, (None, {}))


@functools.cache
def _pattern(template: str) -> re.Pattern[str]:
    escaped = template.replace(".", r"\.")
    return re.compile(_PART.sub(lambda part: f"(?P<{part[1]}>{_PARTS[part[1]]})", escaped))


def _last_block(found: Iterable[tuple[Row | None, Mapping[str, str]]]) -> int:
    numbers = (int(parts["from_end"]) for _, parts in found if "from_end" in parts)
    return max(numbers, default=0)


def _fill(template: str, parts: Mapping[str, str], last: int) -> str:
    from_end = last - int(parts.get("from_end", last))
    return template.format(**{**parts, "from_end": from_end})
