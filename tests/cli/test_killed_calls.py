"""Runs that the kernel kills, or whose calls it fails, at a given system call."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from merge.errors import CheckpointError
from merge.reader.checkpoint import read_header
from tests.mini import contents, write_recipe

# What changes a file system. Reads are left out: they are tested with files that change.
CALLS = ("pwrite64", "fsync", "rename", "ftruncate", "mkdir")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed"),
]


def command_of(place: Path, overwrite: bool) -> list[str]:
    words = ["run", str(place / "mini.yaml"), "--no-verify", "--threads", "1"]
    words += ["--overwrite"] if overwrite else []
    return [sys.executable, "-m", "merge", *words, "--out", str(place / "out")]


def trace(place: Path, *words: str, overwrite: bool = False) -> subprocess.CompletedProcess[str]:
    """Run under strace."""
    log = str(place.parent / "trace")
    line = ["strace", "-f", "-qq", "-y", "-o", log, *words, *command_of(place, overwrite)]
    return subprocess.run(line, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("how", ["signal=SIGKILL", "error=ENOSPC", "error=EIO"])
@pytest.mark.parametrize("call", CALLS)
def test_an_output_is_whole_whatever_call_is_struck(place: Path, call: str, how: str) -> None:
    assert trace(place, "-e", f"trace={call}").returncode == 0
    new = contents(place / "out")
    for number in range(1, count_calls(place, call) + 1):
        for path in place.glob("out*"):
            shutil.rmtree(path)
        strike(place, call, how, number, None, new)


@pytest.mark.parametrize("how", ["signal=SIGKILL", "error=ENOSPC", "error=EIO"])
@pytest.mark.parametrize("call", ["rename", "renameat2", "fsync"])
def test_an_output_that_is_replaced_is_whole_at_any_moment(
    place: Path, call: str, how: str
) -> None:
    assert trace(place).returncode == 0
    old = contents(place / "out")
    shutil.move(place / "out", place / "old")
    write_recipe(place, weight=0.5)
    assert trace(place).returncode == 0
    new = contents(place / "out")
    assert new != old
    assert trace(place, "-e", f"trace={call}", overwrite=True).returncode == 0
    for number in range(1, count_calls(place, call) + 1):
        for path in place.glob("out*"):
            shutil.rmtree(path)
        shutil.copytree(place / "old", place / "out")
        strike(place, call, how, number, old, new)


def count_calls(place: Path, call: str) -> int:
    log = (place.parent / "trace").read_text(errors="replace")
    count = len(re.findall(rf"\b{call}\(", log))
    assert count
    return count


def strike(
    place: Path,
    call: str,
    how: str,
    number: int,
    old: dict[str, bytes] | None,
    new: dict[str, bytes],
) -> None:
    """Run with one call struck, and look at what is there then."""
    child = trace(
        place,
        *("-e", f"trace={call}", "-e", f"inject={call}:{how}:when={number}"),
        overwrite=old is not None,
    )
    out = place / "out"
    found = contents(out) if out.exists() else None
    assert found in (old, new), (call, number)
    if how.startswith("error"):
        # Some calls are not the output's, such as those of a library's cache.
        assert child.returncode in (0, 8), child.stderr
        assert (child.returncode == 0) == (found == new), child.stderr
        assert not list(place.glob("out.*"))
        assert child.returncode == 0 or child.stderr.splitlines()[-1].startswith("hint: ")
    for path in place.glob("out.partial-*/unet/*.safetensors"):
        try:
            read_header(path)
        except CheckpointError:
            continue
        assert path.read_bytes() == new[f"unet/{path.name}"], (call, number)
    assert json.loads((place / "target" / "config.json").read_text())
