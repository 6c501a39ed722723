"""Globs and block names: which weight a key gets, and which keys are kept from the target.

A pattern is a glob on diffusers keys, for text encoders with the component in front
(`text_encoder.text_model.*`), or one of A1111's block names (`BASE`, `IN04`, `M00`, `OUT11`).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

from merge.family.model import Blocks, Family

# A set such as [!]x] may begin with its own closing bracket; one that never closes is plain text.
_WILDCARDS = re.compile(r"\*|\?|\[!?+\]?+[^\]]*\]")


def match_exclude(key: str, patterns: Sequence[str]) -> str | None:
    """Return the first pattern that names a key, or None."""
    return next((pattern for pattern in patterns if fnmatchcase(key, pattern)), None)


def block_weight(
    key: str, weights: Mapping[str, float], default: float, blocks: Blocks, block: str = ""
) -> float:
    """Return the weight of a key: of the most specific pattern that names it.

    The pattern with the most literal characters wins. A block name stands for the globs of its
    layers, so `IN01` counts on `down_blocks.0.resnets.0.conv1.weight` like
    `down_blocks.0.resnets.0.*`.

    Args:
        key: A key of the target.
        weights: Pattern to weight.
        default: Where no pattern names the key.
        blocks: Of the family.
        block: The name of the key's block.

    Raises:
        ValueError: two patterns with different weights are equally specific.
    """
    matching = {
        pattern: len(blocks.layer(key)) + 1 if blocks.is_name(pattern) else _literal(pattern)
        for pattern in weights
        if (pattern == block if blocks.is_name(pattern) else fnmatchcase(key, pattern))
    }
    if not matching:
        return default
    best = max(matching.values())
    winners = [pattern for pattern, count in matching.items() if count == best]
    if len({weights[pattern] for pattern in winners}) > 1:
        raise ValueError(f"{key}: {' and '.join(winners)} are equally specific")
    return weights[winners[0]]


def unmatched(patterns: Collection[str], keys: Collection[str]) -> list[str]:
    """Return the globs that name no key at all."""
    return [p for p in patterns if not any(fnmatchcase(key, p) for key in keys)]


def unknown_blocks(patterns: Iterable[str], family: Family, present: Collection[str]) -> list[str]:
    """Return a problem for each block name that a model does not have.

    Args:
        patterns: Of `block_weights`.
        family: The model's.
        present: Names of the model's blocks.
    """
    blocks = family.blocks
    names = [name for name in patterns if blocks.is_name(name) and name not in present]
    if not names:
        return []
    ordered = blocks.sort(present)
    sides = [[name for name in ordered if name.startswith(side)] for side in blocks.sides]
    known = ", ".join([blocks.rest, *(_span(side) for side in sides if side)])
    what = f"block_weights: this {family.main.title} has no block"
    return [f"{what} {name}, only {known}" for name in names]


def _span(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"


def _literal(pattern: str) -> int:
    return len(_WILDCARDS.sub("", pattern))
