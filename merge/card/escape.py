"""Text of others as Markdown that shows it and does nothing else."""

from __future__ import annotations

import re
import unicodedata

_MAX_CHARACTERS = 300
# A dot is harmless before a space and makes an address of `www.example`.
_PLAIN = re.compile(r"[^\W_]|[ ,;'?-]|\.(?=\s|$)")
_NOT_IN_BACKTICKS = frozenset("`|<>&\\")


def one_line(text: str, limit: int = _MAX_CHARACTERS) -> str:
    """Return text without line breaks, control characters and marks that reorder it.

    Args:
        text: Of anybody.
        limit: Characters that stay; the rest becomes an ellipsis.
    """
    # Cc, Cf, Cs, Co, Cn: control, format (bidi), surrogates, private use, unassigned.
    shown = "".join(
        char if not unicodedata.category(char).startswith("C") else " "
        for char in text[: 4 * limit]
    )
    line = " ".join(shown.split())
    return line if len(line) <= limit else f"{line[: limit - 1]}…"


def prose(text: str) -> str:
    """Return text for a sentence or a table cell: all but words is written as references."""
    line = one_line(text)
    return "".join(
        char if _PLAIN.match(line, index) else f"&#{ord(char)};" for index, char in enumerate(line)
    )


def code(text: str) -> str:
    """Return text as a span of code, also inside a table."""
    line = one_line(text)
    if not line:
        return ""
    if _NOT_IN_BACKTICKS.isdisjoint(line):
        return f"`{line}`"
    return f"<code>{prose(line)}</code>"


def fenced(text: str, language: str) -> str:
    """Return a block of code whose fence nothing inside can close."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"
