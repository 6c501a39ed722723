"""Renames that Python has no call for: two names exchanged in one step, and never replacing a file.

Without the first a folder that is replaced is absent for a moment between two renames: `os.replace`
takes no folder that holds files.

Source: renameat2(2) of Linux with RENAME_EXCHANGE and RENAME_NOREPLACE; renamex_np(2) of macOS with
RENAME_SWAP and RENAME_EXCL.
"""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from pathlib import Path

_AT_FDCWD = -100
# RENAME_SWAP and RENAME_EXCL, or RENAME_EXCHANGE and RENAME_NOREPLACE.
_EXCHANGE, _TO_NEW = (2, 4) if sys.platform == "darwin" else (2, 1)
# What systems and file systems answer that do not know the call.
_UNKNOWN = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM)


def swap_names(first: Path, second: Path) -> bool:
    """Let two names that exist stand for each other's folder; no moment has one of them absent.

    Returns:
        False where that cannot be done; nothing changed then.

    Raises:
        OSError: it can be done and failed.
    """
    return _rename(first, second, _EXCHANGE)


def rename_to_new(source: Path, target: Path) -> None:
    """Rename a file and never replace another.

    Where the system cannot promise that, a file that appears in the same instant is replaced.

    Raises:
        FileExistsError: the name is taken.
        OSError: it failed otherwise.
    """
    if _rename(source, target, _TO_NEW):
        return
    if os.path.lexists(target):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
    source.rename(target)


def _rename(source: Path, target: Path, flags: int) -> bool:
    """Return False where the system does not know the call or the flag."""
    names = os.fsencode(source), os.fsencode(target)
    library = ctypes.CDLL(None, use_errno=True)
    if sys.platform == "darwin":
        call = getattr(library, "renamex_np", None)
        arguments: tuple[object, ...] = (*names, flags)
    else:
        call = getattr(library, "renameat2", None)
        arguments = (_AT_FDCWD, names[0], _AT_FDCWD, names[1], flags)
    if call is None:
        return False
    if call(*arguments) == 0:
        return True
    number = ctypes.get_errno()
    if number in _UNKNOWN:
        return False
    raise OSError(number, os.strerror(number), str(source), None, str(target))
