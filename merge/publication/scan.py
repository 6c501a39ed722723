"""Looking for tokens and home folders in everything that we wrote, before others can read it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from merge.card.render import CARD_NAME
from merge.disclosure.secrets import find_secrets, known_tokens
from merge.errors import MergeError, PublishError
from merge.reader.checkpoint import read_header

# Copied from the target and public already; vocabularies hold all sorts of words.
_COPIED = ("tokenizer", "tokenizer_2", "feature_extractor")
_TEXT = (".json", ".yaml", ".html", ".md", ".txt")


def scan(folder: Path, names: Sequence[str], card: str) -> list[str]:
    """Return a line for each secret, with file, place and kind, never the secret itself.

    Args:
        folder: The export.
        names: The files that are uploaded.
        card: The text of the card, which is not in the folder yet.
    """
    known = known_tokens()
    lines = []
    for name in names:
        for text, place in _texts(folder, name, card):
            for finding in find_secrets(text, known):
                where = place or f"line {finding.line}"
                lines.append(f"{name}, {where}: {finding.kind}")
    return lines


def _texts(folder: Path, name: str, card: str) -> Iterator[tuple[str, str]]:
    path = folder / name
    if name == CARD_NAME:
        yield card, ""
    elif name.endswith(".safetensors"):
        try:
            metadata = read_header(path).header.metadata
        except MergeError as error:
            raise PublishError(f"{name} cannot be read: {error.message}") from error
        for key, value in metadata.items():
            yield f"{key} {value}", f"metadata {key}"
    elif name.endswith(".png"):
        yield from ((text, "text of the picture") for text in _picture_texts(path))
    elif name.endswith(_TEXT) and name.split("/")[0] not in _COPIED:
        yield path.read_text(encoding="utf-8", errors="replace"), ""


def _picture_texts(path: Path) -> Iterator[str]:
    from PIL import Image

    try:
        with Image.open(path) as image:
            image.load()
            values = [*image.info.values(), *image.getexif().values()]
    except OSError as error:
        raise PublishError(f"{path.name} cannot be read as a picture: {error}") from error
    for value in values:
        if isinstance(value, bytes):
            yield value.decode("utf-8", "replace")
        elif isinstance(value, str):
            yield value
