"""The card that is published: ours rendered for its repository, or the user's own completed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from merge.card.metadata import CardLicence
from merge.card.render import CARD_MARKER, CARD_NAME, render_card
from merge.errors import PublishError


def final_card(folder: Path, repo_id: str, licence: CardLicence, names: frozenset[str]) -> str:
    """Return the text of `README.md` as it is published.

    A card that this tool wrote is rendered again with the repository's name in it. A card that
    people wrote keeps its text; what its front matter lacks is filled in.

    Args:
        folder: The export.
        repo_id: Where it goes.
        licence: Of the export.
        names: The files that are uploaded.

    Raises:
        PublishError: the user's card has a front matter that cannot be read.
    """
    ours = render_card(folder, repo_id=repo_id, licence=licence, names=names)
    written = _own_text(folder)
    if written is None:
        return ours
    from huggingface_hub import ModelCard

    try:
        card = ModelCard(written, ignore_metadata_errors=False)
    except Exception as error:
        raise PublishError(
            f"the front matter of {CARD_NAME} cannot be read: {error}",
            hint="correct it, or remove the file to get one that is written for you",
        ) from error
    wanted: dict[str, Any] = dict(vars(ModelCard(ours).data))
    present: dict[str, Any] = dict(vars(card.data))
    for key, value in wanted.items():
        if present.get(key) is None:
            setattr(card.data, key, value)
    return str(card)


def stated_licence(folder: Path) -> str | None:
    """Return the licence that a card which people wrote states."""
    written = _own_text(folder)
    if written is None:
        return None
    from huggingface_hub import ModelCard

    try:
        data = vars(ModelCard(written).data)
    except Exception:
        # Said when the card is completed.
        return None
    return licence_of(data)


def licence_of(front_matter: Mapping[str, Any]) -> str | None:
    """Return the licence that the front matter of a card states."""
    licence = front_matter.get("license")
    if licence == "other":
        licence = front_matter.get("license_name")
    return licence if isinstance(licence, str) else None


def _own_text(folder: Path) -> str | None:
    """Return the card that people wrote, or None for one of ours or none."""
    path = folder / CARD_NAME
    if not path.is_file():
        return None
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PublishError(f"{path} cannot be read: {error}") from error
    return None if CARD_MARKER in text else text
