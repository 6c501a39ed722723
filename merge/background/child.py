"""Python in a process of its own, in which nothing but the installation can be imported.

`python -m` and `python -c` put the current folder first on the path, so that a `random.py` or a
`merge.py` lying there, or a `sitecustomize.py`, would run as part of this tool. Isolated mode looks
at none of these; the folders that this process imports from are then handed over one by one.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

_PACKAGE_ROOT = Path(__file__).resolve().parents[2]
_PACKAGE = Path(__file__).resolve().parents[1].name
# The first word after the code is the path; what remains is as the caller gave it.
_BOOT = "import json, sys; sys.path[:] = json.loads(sys.argv.pop(1)); "


def child_command(code: str, words: Sequence[str] = ()) -> list[str]:
    """Return the command that runs Python code with this process's own modules.

    Args:
        code: Statements; `sys.argv[1:]` are the words.
        words: For the code.
    """
    # `-I` ignores PYTHONPATH, the user's site and the current folder; `-X utf8` is no matter of
    # the environment then.
    paths = json.dumps(import_folders())
    return [sys.executable, "-I", "-X", "utf8", "-c", f"{_BOOT}{code}", paths, *words]


def import_folders() -> list[str]:
    """Return where this process imports from, without the current folder.

    A checkout that is the current folder stays, at the end: there it hides nothing. Only another
    copy of this package comes after it.
    """
    here = os.path.realpath(os.curdir)
    found = [path for path in sys.path if path and os.path.realpath(path) != here]
    if not any(os.path.realpath(path) == str(_PACKAGE_ROOT) for path in found):
        copies = (i for i, path in enumerate(found) if Path(path, _PACKAGE, "__init__.py").exists())
        found.insert(next(copies, len(found)), str(_PACKAGE_ROOT))
    return found
