"""Globs on keys: which weight a key gets, and which keys are kept from the target."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from fnmatch import fnmatchcase

# A set such as [!]x] may begin with its own closing bracket; one that never closes is plain text.
_WILDCARDS = re.compile(r"\*|\?|\[!?+\]?+[^\]]*\]")


def match_exclude(key: str, patterns: Sequence[str]) -> str | None:
    """Return the first pattern that names a key, or None."""
    return next((pattern for pattern in patterns if fnmatchcase(key, pattern)), None)


def block_weight(key: str, weights: Mapping[str, float], default: float) -> float:
    """Return the weight of a key: of the most specific pattern that names it.

    The pattern with the most literal characters wins.

    Raises:
        ValueError: two patterns with different weights are equally specific.
    """
    matching = [pattern for pattern in weights if fnmatchcase(key, pattern)]
    if not matching:
        return default
    best = max(_literal_characters(pattern) for pattern in matching)
    winners = [pattern for pattern in matching if _literal_characters(pattern) == best]
    if len({weights[pattern] for pattern in winners}) > 1:
        raise ValueError(f"{key}: {' and '.join(winners)} are equally specific")
    return weights[winners[0]]


def unmatched(patterns: Collection[str], keys: Collection[str]) -> list[str]:
    """Return the patterns that name no key at all."""
    return [p for p in patterns if not any(fnmatchcase(key, p) for key in keys)]


def _literal_characters(pattern: str) -> int:
    return len(_WILDCARDS.sub("", pattern))
