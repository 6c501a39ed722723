"""A key of a folder and the key of a single file that holds the same values."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from merge.errors import CheckpointError
from merge.family.keys.one_to_one import one_to_one

# How the values lie in the single file, as seen from the folder.
SAME = "same"
# A 1x1 convolution there, a linear layer here: `(out, in, 1, 1)` and `(out, in)`.
POINTWISE = "pointwise"
# `(in, out)` there, `(out, in)` here.
TRANSPOSED = "transposed"
# Query, key and value one below the other there, a tensor each here.
FUSED = "fused"
FUSED_PARTS = 3
UNKNOWN_KEY_HINT = "if it is of no use, leave it out by `exclude` with its name or a glob"


@dataclass(frozen=True, slots=True)
class KeyPair:
    """One tensor of a component in both layouts.

    Attributes:
        folder: Its key in the component's own file, e.g. `decoder.conv_in.weight`.
        single: Its key in a single file, prefix included.
        form: `same`, `pointwise`, `transposed` or `fused`.
        part: For `fused` which third of the rows: 0 query, 1 key, 2 value.
    """

    folder: str
    single: str
    form: str = SAME
    part: int = 0


def checked_pairs(pairs: Iterable[KeyPair], what: str) -> tuple[KeyPair, ...]:
    """Return pairs that are one-to-one, with all three parts of what is fused.

    Raises:
        CheckpointError: two keys become one, or a part is missing.
    """
    found = tuple(pairs)
    one_to_one(
        (
            (pair.folder, f"{pair.single}[{pair.part}]" if pair.form == FUSED else pair.single)
            for pair in found
        ),
        what,
    )
    parts: dict[str, set[int]] = {}
    for pair in found:
        if pair.form == FUSED:
            parts.setdefault(pair.single, set()).add(pair.part)
    for name, present in parts.items():
        if len(present) != FUSED_PARTS:
            raise CheckpointError(f"{what}: {name} needs query, key and value, and one is missing")
    return found


def strip(names: Collection[str], prefix: str) -> list[str]:
    """Return the names that begin with a prefix, without it, sorted."""
    return sorted(name.removeprefix(prefix) for name in names if name.startswith(prefix))
