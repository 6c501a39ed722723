"""What the HTML pages of this tool share: one file each, which asks for nothing from anywhere."""

from __future__ import annotations

import base64
import functools
import hashlib
import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from PIL import Image

FOLDER = Path(__file__).parent
TINY_PIXELS = 128  # of the longer side: enlarged without smoothing up to here
# Between a number and its unit.
GAP = "\N{NO-BREAK SPACE}"

_LARGE_PIXELS = 1024  # of the longer side: made smaller and compressed from here on
_PNG_BUDGET_BYTES = 3_000_000  # of all pictures; above it only tiny ones stay lossless
_QUALITY = 90


def make_environment(
    folders: Sequence[Path], filters: Mapping[str, Callable[..., Any]]
) -> jinja2.Environment:
    """Return where the templates of some folders are rendered.

    Everything is escaped, and a name that a template was not given is an error.

    Args:
        folders: Of the templates, in the order in which they are looked for.
        filters: By their names.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folders),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(filters)
    return environment


@functools.cache
def read_part(path: Path) -> str:
    """Return a style or a script that goes into a page."""
    return path.read_text(encoding="utf-8")


def policy(style: str, script: str) -> str:
    """Return a policy that forbids every script, style and address but those in the page."""
    return (
        f"default-src 'none'; img-src data:; style-src {_source(style)}; "
        f"script-src {_source(script)}; base-uri 'none'; form-action 'none'"
    )


def _source(text: str) -> str:
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return f"'sha256-{digest}'"


def number(value: Any) -> str:
    """Return a number as it is read, and anything else as it is."""
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        # A lock is a file that anybody can write to.
        return str(value)
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}".replace("-", "−")
    return f"{value:.3g}".replace("-", "−")


def seconds(value: float) -> str:
    """Return a time with its unit."""
    return f"{value:.1f}{GAP}s" if value < 100 else f"{value:.0f}{GAP}s"


def duration(value: float) -> str:
    """Return a time that may be long, with its unit."""
    if value < 600:
        return seconds(value)
    minutes = value / 60
    return f"{minutes:.0f}{GAP}min" if minutes < 600 else f"{minutes / 60:.1f}{GAP}h"


def fit_without_loss(images: Iterable[Image.Image], times: float = 1) -> bool:
    """Return whether all pictures of a page together are small enough to stay as they are.

    Args:
        images: All of them, or some that stand for the others.
        times: How many pictures each one stands for.
    """
    size_bytes = sum(len(_encode(image, "PNG", compress_level=1)) for image in images)
    return size_bytes * times <= _PNG_BUDGET_BYTES


def address(
    image: Image.Image,
    is_lossless: bool,
    *,
    largest: int = _LARGE_PIXELS,
    quality: int = _QUALITY,
) -> str:
    """Return a picture as a data: address.

    Args:
        image: The picture.
        is_lossless: Whether it may stay as it is; a tiny one always does.
        largest: Its longer side is at most this.
        quality: Of a JPEG.
    """
    longer = max(image.size)
    if longer <= TINY_PIXELS or (is_lossless and longer <= largest):
        kind, data = "png", _encode(image, "PNG", optimize=True)
    else:
        if longer > largest:
            image = image.copy()
            image.thumbnail((largest, largest), Image.Resampling.LANCZOS)
        kind, data = "jpeg", _encode(image, "JPEG", quality=quality, subsampling=0)
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()
