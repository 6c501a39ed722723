"""The card in an export's folder: written by the run, and again after each verification."""

from __future__ import annotations

from pathlib import Path

from merge.card.facts import read_facts
from merge.card.metadata import CardLicence
from merge.card.render import CARD_MARKER, CARD_NAME, PLACEHOLDER, render_card
from merge.disclosure.licences import decide_licence
from merge.writer.file import write_atomically


def draft_card(folder: Path) -> str:
    """Return an export's card with what is known without asking the Hub.

    Raises:
        CheckpointError: a record of the folder is broken.
    """
    parents = read_facts(folder).parents
    decision = decide_licence(
        [(parent.name, parent.name if parent.is_on_hub else None, None) for parent in parents]
    )
    licence = decision.licence
    if licence is None or decision.blocked:
        return render_card(folder)
    return render_card(folder, licence=CardLicence.of(licence, decision.notes))


def refresh_card(folder: Path) -> None:
    """Render the card again, with the pictures of a new report.

    One that people wrote stays, and so does one that was rendered for a repository.

    Raises:
        CheckpointError: a record of the folder is broken.
    """
    path = folder / CARD_NAME
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    if CARD_MARKER in text and PLACEHOLDER in text:
        write_atomically(path, draft_card(folder).encode())
