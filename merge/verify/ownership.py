"""Whose a report in a folder is: only our own is replaced."""

from __future__ import annotations

import json
from pathlib import Path

from merge.errors import OutputExistsError
from merge.verify.report import PAGE_NAME, REPORT_NAME

# As the page's `<meta name="generator">` has it.
_GENERATOR = b'<meta name="generator" content="instruct-merge">'
_HEAD_BYTES = 4096


def refuse_foreign(folder: Path) -> None:
    """Refuse to replace a report that this tool did not write.

    Raises:
        OutputExistsError: there is one; the message names it.
    """
    is_ours = _is_our_report(folder / REPORT_NAME)
    for name, known in ((REPORT_NAME, is_ours), (PAGE_NAME, is_ours or _is_our_page(folder))):
        path = folder / name
        if not known and (path.exists() or path.is_symlink()):
            raise OutputExistsError(
                f"{path} is there already, and no report of this tool",
                hint="move or rename it: a verification writes its report under that name",
            )


def _is_our_report(path: Path) -> bool:
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        return bool(tree["tool"]["name"] == "instruct-merge")
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return False


def _is_our_page(folder: Path) -> bool:
    try:
        with (folder / PAGE_NAME).open("rb") as file:
            return _GENERATOR in file.read(_HEAD_BYTES)
    except OSError:
        return False
