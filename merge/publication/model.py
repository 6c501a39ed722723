"""What is published, before and after."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class PreparedUpload:
    """An export that passed every check that needs no writing.

    Attributes:
        folder: The export.
        repo_id: Where it goes.
        sizes: Every file that is uploaded and its bytes, sorted by name; the card among them.
        sha256: Of the files that the manifest knows.
        card: The text of `README.md`.
        title: The recipe's name and the start of its digest, for the commit message.
        notes: What the publisher should know, one sentence each.
    """

    folder: Path
    repo_id: str
    sizes: Mapping[str, int]
    sha256: Mapping[str, str]
    card: str
    title: str
    notes: tuple[str, ...]

    @property
    def size_bytes(self) -> int:
        """Return the bytes of all files."""
        return sum(self.sizes.values())


@dataclass(frozen=True, slots=True)
class Published:
    """An upload that was compared with what was meant.

    Attributes:
        repo_id: Where it is.
        url: Of the commit, or of the pull request.
        commit: 40 hexadecimal digits.
        notes: What the publisher should know, one sentence each.
    """

    repo_id: str
    url: str
    commit: str
    notes: tuple[str, ...]
