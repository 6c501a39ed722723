"""Processes that see the machine differently: a disk that nothing can be written to, no network.

A child is forked, so that what is imported stays so, and put into namespaces of its own, which
Linux gives to every user where the administrator has not forbidden it.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

_NEW_NAMESPACES = 0x10000000 | 0x00020000 | 0x40000000  # of users, mounts and networks
_BIND, _RECURSIVE, _PRIVATE = 4096, 16384, 1 << 18
_AT_FDCWD, _AT_RECURSIVE = -100, 0x8000
_ATTRIBUTE_READ_ONLY = 1
_MOUNT_SETATTR = 442


def run_isolated(
    function: Callable[..., Any],
    *arguments: Any,
    writable: Sequence[Path] | None = None,
    mounts: Sequence[tuple[str, Path, str]] = (),
) -> Any:
    """Call a function in a child without a network; return what it returns.

    Args:
        function: Called in the child.
        arguments: For it.
        writable: Folders that can be written to, and nothing else can; None: everything can.
        mounts: What is mounted where: `tmpfs` with its options, or a folder to bind.
    """
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    child = context.Process(
        target=_run, args=(results, function, arguments, writable, tuple(mounts))
    )
    child.start()
    kind, value = results.get(timeout=120)
    child.join()
    if kind == "skip":
        pytest.skip(f"no namespaces here: {value}")
    if kind == "failed":
        pytest.fail(value, pytrace=False)
    return value


def _run(
    results: Any,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    writable: Sequence[Path] | None,
    mounts: tuple[tuple[str, Path, str], ...],
) -> None:
    # OpenMP's threads are not there after a fork, and it would wait for them for ever.
    torch.set_num_threads(1)
    try:
        _enter()
        for source, target, options in mounts:
            _mount(source, target, options)
        if writable is not None:
            _forbid_writing_but_in(writable)
    except OSError as error:
        results.put(("skip", str(error)))
        return
    try:
        results.put(("done", function(*arguments)))
    except BaseException:
        results.put(("failed", traceback.format_exc()))


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _check(result: int) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _enter() -> None:
    user, group = os.getuid(), os.getgid()
    _check(_libc().unshare(_NEW_NAMESPACES))
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {user} 1")
    Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    _check(_libc().mount(None, b"/", None, _RECURSIVE | _PRIVATE, None))


def _mount(source: str, target: Path, options: str) -> None:
    where = os.fsencode(target)
    if source == "tmpfs":
        _check(_libc().mount(b"tmpfs", where, b"tmpfs", 0, options.encode()))
    else:
        _check(_libc().mount(os.fsencode(source), where, None, _BIND, None))


def _forbid_writing_but_in(folders: Sequence[Path]) -> None:
    for folder in folders:
        _mount(str(folder), folder, "")
    _set_attributes(Path("/"), _AT_RECURSIVE, to_set=_ATTRIBUTE_READ_ONLY)
    for folder in folders:
        _set_attributes(folder, 0, to_clear=_ATTRIBUTE_READ_ONLY)


def _set_attributes(path: Path, flags: int, *, to_set: int = 0, to_clear: int = 0) -> None:
    attributes = (ctypes.c_uint64 * 4)(to_set, to_clear, 0, 0)
    size = ctypes.c_size_t(ctypes.sizeof(attributes))
    name = ctypes.c_char_p(os.fsencode(path))
    call = _libc().syscall
    _check(
        call(ctypes.c_long(_MOUNT_SETATTR), _AT_FDCWD, name, flags, ctypes.byref(attributes), size)
    )
