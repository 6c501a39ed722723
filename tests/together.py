"""Calls that start at the same moment, each in a process of its own."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from typing import Any

from merge.errors import MergeError


def exit_codes(count: int, call: Callable[..., object], *arguments: Any) -> list[int]:
    """Call a function in forks at once; return what each would exit with, sorted."""
    # Forked: a fresh process would spend seconds importing torch, and not begin with the others.
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(count), context.Queue()
    children = [
        context.Process(target=_run, args=(barrier, results, call, arguments)) for _ in range(count)
    ]
    for child in children:
        child.start()
    codes = sorted(results.get(timeout=60) for _ in children)
    for child in children:
        child.join()
    return codes


def _run(
    barrier: Any, results: Any, call: Callable[..., object], arguments: tuple[Any, ...]
) -> None:
    barrier.wait()
    try:
        call(*arguments)
        results.put(0)
    except MergeError as error:
        results.put(error.exit_code)
