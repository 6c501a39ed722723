"""An output that would be written over what is read."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from merge.errors import OutputError


def refuse_overlap(out: Path, inputs: Iterable[Path]) -> None:
    """Refuse an output that is an input, lies in one or holds one.

    By path, through links, and by what the names stand for: a folder can be mounted twice, a file
    can have two names, and some file systems take `Model` for `model`.

    Args:
        out: The output, which need not exist.
        inputs: Files and folders.

    Raises:
        OutputError: it does.
    """
    resolved = out.resolve()
    found = identity(resolved)
    above_out = _identities([resolved, *resolved.parents])
    for path in inputs:
        named, other = path.absolute(), path.resolve()
        above = {named, other, *named.parents, *other.parents}
        is_over = resolved in above or (found is not None and found in _identities(above))
        if is_over or other in resolved.parents or identity(other) in above_out:
            raise OutputError(
                f"the output {out} is, holds or lies in the input {path}",
                hint="choose another place for the output; inputs are never written to",
            )


def _identities(paths: Iterable[Path]) -> set[tuple[int, int]]:
    return {found for found in map(identity, paths) if found is not None}


def identity(path: Path) -> tuple[int, int] | None:
    """Return device and inode, which stay whatever the name; None where nothing is."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino
