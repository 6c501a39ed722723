"""Every system call that writes fails once: the old output stays, no part of a new one appears."""

from __future__ import annotations

import errno
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import merge.writer.folder as folder_module
from merge import load_recipe, run_recipe
from merge.errors import CheckpointError, NoSpaceError, OutputError
from merge.reader.checkpoint import read_header
from tests.mini import contents

CALLS = ("pwrite", "write", "fsync", "ftruncate", "mkdir", "rename", "open")
KILL = -1
ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG, errno.EROFS)


def run(place: Path, *overrides: str) -> None:
    recipe = load_recipe(place / "mini.yaml", overrides)
    run_recipe(recipe, place / "out", overwrite=True, verify=False, threads=1)


@pytest.fixture(params=["swap_names", "rename"])
def swap(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How an old output is replaced: in one step, or in two where the system has no such step."""
    if request.param == "rename":
        monkeypatch.setattr(folder_module, "swap_names", lambda *_: False)
    return str(request.param)


class Faults:
    """Counts the calls that touch the output, and lets one of them fail."""

    def __init__(self, place: Path, patch: pytest.MonkeyPatch) -> None:
        self.seen: list[str] = []
        self._fail: tuple[int, int] | None = None
        self._descriptors: set[int] = set()
        self._parent = str(place)
        self._place = str(place / "out")
        close = os.close

        def closed(descriptor: int) -> None:
            self._descriptors.discard(descriptor)
            close(descriptor)

        patch.setattr(os, "close", closed)
        for name in CALLS:
            patch.setattr(os, name, self._wrap(name, getattr(os, name)))
        swap_names = folder_module.swap_names
        patch.setattr(folder_module, "swap_names", self._wrap("swap_names", swap_names))

    def fail(self, index: int, number: int) -> None:
        """Let the call of this index fail with an error number, or kill; counted from now."""
        self.seen.clear()
        self._fail = (index, number)

    def _wrap(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(subject: Any, *arguments: Any, **options: Any) -> Any:
            if not self._is_of_the_output(name, subject, arguments):
                return call(subject, *arguments, **options)
            self.seen.append(name)
            if self._fail is not None and len(self.seen) == self._fail[0] + 1:
                if self._fail[1] == KILL:
                    os.kill(os.getpid(), signal.SIGKILL)
                raise OSError(self._fail[1], os.strerror(self._fail[1]))
            result = call(subject, *arguments, **options)
            if name == "open":
                self._descriptors.add(result)
            return result

        return wrapped

    def _is_of_the_output(self, name: str, subject: Any, arguments: tuple[Any, ...]) -> bool:
        if isinstance(subject, int):
            return subject in self._descriptors
        if name == "open" and not arguments[0] & (os.O_WRONLY | os.O_RDWR | os.O_DIRECTORY):
            return False
        if name == "open" and str(subject) == self._parent:
            return True
        if name == "mkdir" and Path(subject).is_dir():
            # Made already: that it cannot be made again is no fault.
            return False
        return str(subject).startswith(self._place)


def test_every_failing_call_is_told_and_leaves_the_old_output(
    place: Path, swap: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(place, "weight=0.5")
    before = contents(place, but=())
    faults = Faults(place, monkeypatch)
    run(place, "weight=0.5")
    calls = list(faults.seen)
    assert {"pwrite", "fsync", "ftruncate", "mkdir", swap, "open"} <= set(calls)
    same = contents(place, but=())
    assert {k: v for k, v in same.items() if not k.endswith("run.json")} == {
        k: v for k, v in before.items() if not k.endswith("run.json")
    }
    for index, name in enumerate(calls):
        number = ERRORS[index % len(ERRORS)]
        faults.fail(index, number)
        with pytest.raises(OutputError) as caught:
            run(place)
        is_full = number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        assert isinstance(caught.value, NoSpaceError) == is_full, (index, name, caught.value)
        assert caught.value.hint
        assert os.strerror(number) in caught.value.message, (index, name)
        # Removing what was written may fail too, but nothing of it has the output's name.
        assert contents(place, but=()) == same, (index, name)


def test_a_kill_at_every_call_leaves_the_old_output_or_the_new(
    place: Path, swap: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(place, "weight=0.5")
    old = contents(place / "out")
    faults = Faults(place, monkeypatch)
    run(place)
    calls = list(faults.seen)
    new = contents(place / "out")
    context = multiprocessing.get_context("fork")
    seen = set()
    for index, name in enumerate(calls):
        for path in place.glob("out*"):
            shutil.rmtree(path)
        run(place, "weight=0.5")
        faults.fail(index, KILL)
        child = context.Process(target=run, args=(place,))
        child.start()
        child.join()
        faults.fail(10_000, KILL)
        assert child.exitcode == -signal.SIGKILL, (index, name)
        found = contents(place / "out") if (place / "out").exists() else None
        if swap == "rename" and found is None:
            # Between the two renames there is none; the old one is beside it then.
            assert [contents(path) for path in place.glob("out.old-*")] == [old], (index, name)
        else:
            assert found in (old, new), (index, name)
        seen.add("new" if found == new else "old" if found else "none")
        for path in place.glob("out.partial-*/unet/*.safetensors"):
            try:
                read_header(path)
            except CheckpointError:
                continue
            assert path.read_bytes() == new[f"unet/{path.name}"], (index, name)
        run(place)
        assert contents(place / "out") == new
    assert seen >= {"old", "new"}


def test_short_writes_are_gone_on_with(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(place)
    expected = contents(place / "out", but=())
    pwrite, preadv = os.pwrite, os.preadv
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: pwrite(fd, data[:333], at))
    monkeypatch.setattr(
        os, "preadv", lambda fd, parts, at, *flags: preadv(fd, [parts[0][:777]], at, *flags)
    )
    run(place)
    found = contents(place / "out", but=())
    assert found.keys() == expected.keys()
    for name, data in found.items():
        assert name == "run.json" or data == expected[name], name
