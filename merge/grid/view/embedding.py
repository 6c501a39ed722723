"""Pictures of a folder inside a page, as many and as large as the page's size allows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

from PIL import Image

from merge.verify.document import TINY_PIXELS, address, fit_without_loss

BUDGET_CHARS = 12_000_000  # of all addresses of one page

# Longer side and JPEG quality, best first.
_LEVELS = ((1024, 90), (640, 88), (448, 85), (320, 80), (224, 75))
_ENOUGH_PIXELS = 448  # of the longer side: fewer groups are better than smaller pictures
_PROBES = 12  # pictures that stand for all, to choose the level
_MARGIN = 0.9  # of the budget: the probes are not all pictures
_MOST_PIXELS = 1 << 26  # a file that claims more is not opened
_FORMATS = ("PNG", "JPEG", "WEBP")


@dataclass(frozen=True, slots=True)
class Embedded:
    """One picture of a page.

    Attributes:
        address: Its data: address.
        width: Of the file, in pixels.
        height: Of the file, in pixels.
    """

    address: str
    width: int
    height: int

    @property
    def is_tiny(self) -> bool:
        """Return whether it is enlarged without smoothing."""
        return max(self.width, self.height) <= TINY_PIXELS


@dataclass(frozen=True, slots=True)
class Embedding:
    """The pictures of a page.

    Attributes:
        pictures: By their names; one that could not be read is missing.
        groups: How many of the leading groups were embedded; of the first one perhaps a part.
        is_whole: Whether all of these are.
    """

    pictures: dict[str, Embedded]
    groups: int
    is_whole: bool


def embed(folder: Path, groups: Sequence[Iterable[str]], budget: int = BUDGET_CHARS) -> Embedding:
    """Embed the pictures of a folder in the order of their groups.

    All become smaller where that is enough; beyond, the last groups are left out.

    Args:
        folder: Where the pictures are.
        groups: Of names relative to the folder, what matters most first.
        budget: How long all addresses together may be.
    """
    ordered = [list(dict.fromkeys(group)) for group in groups]
    is_lossless, largest, quality = _choose_level(folder, ordered, budget)
    pictures: dict[str, Embedded] = {}
    spent = 0
    for index, group in enumerate(ordered):
        added: dict[str, Embedded] = {}
        for name in group:
            image = None if name in pictures else _open(folder, name)
            if image is None:
                continue
            text = address(image, is_lossless, largest=largest, quality=quality)
            if spent + len(text) > budget:
                # The first group is better shown in part than not at all.
                return Embedding(
                    pictures | added if index == 0 else pictures, max(index, 1), index > 0
                )
            spent += len(text)
            added[name] = Embedded(text, *image.size)
        pictures |= added
    return Embedding(pictures, len(ordered), True)


def _choose_level(folder: Path, groups: list[list[str]], budget: int) -> tuple[bool, int, int]:
    """Return whether pictures stay lossless, else their longer side and quality."""
    names = list(dict.fromkeys(name for group in groups for name in group))
    step = max(1, len(names) // _PROBES)
    opened = (_open(folder, name) for name in names[::step])
    probes = [image for image in opened if image is not None]
    if not probes:
        return True, *_LEVELS[0]
    levels = [(False, largest, quality) for largest, quality in _LEVELS]
    if fit_without_loss(probes, len(names) / len(probes)):
        levels.insert(0, (True, *_LEVELS[0]))
    for is_lossless, largest, quality in levels:
        texts = [address(image, is_lossless, largest=largest, quality=quality) for image in probes]
        each = sum(map(len, texts)) / len(texts)
        count = len(names) if largest > _ENOUGH_PIXELS else len(groups[0])
        if each * count <= budget * _MARGIN:
            return is_lossless, largest, quality
    return levels[-1]


def _open(folder: Path, name: str) -> Image.Image | None:
    """Return a picture, or nothing where there is none that can be shown."""
    relative = PurePath(name)
    # The names are in a file that anybody can write to.
    if relative.is_absolute() or ".." in relative.parts:
        return None
    path = folder / relative
    try:
        if not path.is_file():
            return None
        with Image.open(path, formats=_FORMATS) as image:
            if image.width * image.height > _MOST_PIXELS:
                return None
            return image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
