"""The model card: README.md of an export, rendered from the export's own records.

Everything in it is read from the folder, so that it can be rendered again after a verification and
before publishing, and of a folder that was downloaded. Texts of the records are not trusted: no
recipe puts HTML, links or front matter into its card.
"""

from merge.card.metadata import CardLicence
from merge.card.refresh import draft_card, refresh_card
from merge.card.render import CARD_MARKER, CARD_NAME, render_card

__all__ = [
    "CARD_MARKER",
    "CARD_NAME",
    "CardLicence",
    "draft_card",
    "refresh_card",
    "render_card",
]
