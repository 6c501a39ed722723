"""Outputs that would be written over an input."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from merge.errors import OutputError


def refuse_overlap(out: Path, inputs: Iterable[Path]) -> None:
    """Refuse an output that is an input, lies in one or holds one.

    Raises:
        OutputError: it does.
    """
    resolved = out.resolve()
    for path in inputs:
        other = path.resolve()
        if resolved == other or resolved in other.parents or other in resolved.parents:
            raise OutputError(
                f"the output {out} is, holds or lies in the input {path}",
                hint="choose another place for the output; inputs are never written to",
            )
