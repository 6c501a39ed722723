"""Whose a report in a folder is: only our own is replaced."""

from __future__ import annotations

from pathlib import Path

from merge.errors import OutputExistsError
from merge.json_files import read_json_if_any
from merge.records.folder import PAGE_NAME, REPORT_NAME

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
    tool = read_json_if_any(path).get("tool")
    return isinstance(tool, dict) and tool.get("name") == "instruct-merge"


def _is_our_page(folder: Path) -> bool:
    try:
        with (folder / PAGE_NAME).open("rb") as file:
            return _GENERATOR in file.read(_HEAD_BYTES)
    except OSError:
        return False
