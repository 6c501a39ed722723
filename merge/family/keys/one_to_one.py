"""The one check that every key map passes: no two keys may become one."""

from __future__ import annotations

from collections.abc import Iterable

from merge.errors import CheckpointError


def one_to_one(pairs: Iterable[tuple[str, str]], what: str) -> dict[str, str]:
    """Return the pairs as a map whose values are as distinct as its keys.

    Args:
        pairs: Key and its translation.
        what: The map's name in messages, e.g. `kohya names`.

    Raises:
        CheckpointError: a key is translated twice, or two keys become the same.
    """
    forward: dict[str, str] = {}
    backward: dict[str, str] = {}
    for key, name in pairs:
        if key in forward:
            raise CheckpointError(f"{what}: {key} becomes both {forward[key]} and {name}")
        if name in backward:
            raise CheckpointError(f"{what}: {backward[name]} and {key} both become {name}")
        forward[key] = name
        backward[name] = key
    return forward
