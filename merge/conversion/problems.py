"""How it is said what is wrong with the weights of a conversion."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from merge.errors import CheckpointError
from merge.plan.compat import WHOLE_HINT


@contextmanager
def naming(place: Path) -> Iterator[None]:
    """Put a file or folder in front of what is wrong with its keys."""
    try:
        yield
    except CheckpointError as error:
        joint = " " if error.message.startswith("is ") else ": "
        raise CheckpointError(f"{place}{joint}{error.message}", hint=error.hint) from None


def refuse(problems: Sequence[str], summary: str, hint: str = WHOLE_HINT) -> None:
    """Do nothing where there are no problems.

    Raises:
        CheckpointError: there are, and the message lists them all.
    """
    if problems:
        raise CheckpointError("\n  ".join([summary, *problems]), hint=hint)
