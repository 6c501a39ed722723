"""Disks that are full, folders that are mounted twice, odd names, odd masks: the machine itself."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from merge import load_recipe, run_recipe
from merge.errors import MergeError, OutputError
from merge.writer.folder import OutputFolder
from tests.isolation import run_isolated
from tests.mini import contents, random_tensors, write_unet

WEIGHTS = "diffusion_pytorch_model.safetensors"


def run(place: Path, out: Path, *overrides: str, **options: Any) -> Path:
    recipe = load_recipe(place / "mini.yaml", overrides)
    return run_recipe(recipe, out, verify=False, threads=1, **options).folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def failure(call: Any) -> tuple[str, int, str, str]:
    try:
        call()
    except MergeError as error:
        return type(error).__name__, error.exit_code, error.message, error.hint
    return "", 0, "", ""


# Full disks --------------------------------------------------------------------------------------


def write_large(place: Path) -> int:
    """Make models of some megabytes; return the bytes of an output's weights."""
    for seed, role in enumerate(("base", "distilled", "target")):
        tensors = random_tensors(seed, channels=8 if role == "target" else 4)
        for index in range(4):
            tensors[f"mid_block.more{index}.weight"] = torch.full((512, 512), 0.1 * seed).half()
        write_unet(place / role, tensors)
    return (place / "target" / WEIGHTS).stat().st_size


def test_a_disk_that_is_too_small_is_told_before_anything_is_written(place: Path) -> None:
    size = write_large(place)
    disk = place / "disk"
    disk.mkdir()

    def attempt() -> tuple[tuple[str, int, str, str], list[str]]:
        found = failure(lambda: run(place, disk / "out"))
        return found, names(disk)

    room = size * 9 // 10 // 4096 * 4096
    found, left = run_isolated(attempt, mounts=[("tmpfs", disk, f"size={room}")])
    kind, code, message, hint = found
    assert (kind, code, left) == ("NoSpaceError", 8, [])
    pattern = rf"the output needs ([\d,]+) bytes and {re.escape(str(disk))} has ([\d,]+) free"
    needed, free = (int(word.replace(",", "")) for word in re.fullmatch(pattern, message).groups())
    assert abs(needed - size) < 2000
    assert free <= room < needed
    assert "another disk" in hint


def test_a_disk_that_somebody_fills_meanwhile_keeps_the_old_output(place: Path) -> None:
    size = write_large(place)
    disk = place / "disk"
    disk.mkdir()

    def attempt() -> tuple[Any, ...]:
        run(place, disk / "out", "weight=0.5")
        before = contents(disk / "out")
        begin = OutputFolder._begin

        def crowded(folder: OutputFolder) -> None:
            begin(folder)
            free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
            (disk / "theirs").write_bytes(bytes(free - size // 2))

        OutputFolder._begin = crowded  # type: ignore[method-assign]
        found = failure(lambda: run(place, disk / "out", overwrite=True))
        return found, contents(disk / "out") == before, names(disk)

    options = f"size={size * 4}"
    found, is_same, left = run_isolated(attempt, mounts=[("tmpfs", disk, options)])
    kind, code, message, _ = found
    assert (kind, code, is_same, left) == ("NoSpaceError", 8, True, ["out", "theirs"])
    assert "No space left on device (the output needs" in message
    assert re.search(rf"bytes in all, and {re.escape(str(disk))} has [\d,]+ free\)$", message)


def test_what_an_interrupted_run_wrote_counts_as_space(place: Path) -> None:
    size = write_large(place)
    disk = place / "disk"
    disk.mkdir()

    class Killed(BaseException):
        pass

    def attempt() -> tuple[Any, ...]:
        finish = OutputFolder.write_file

        def killed(folder: OutputFolder, name: str, data: bytes) -> None:
            raise Killed

        OutputFolder.write_file = killed  # type: ignore[method-assign]
        with pytest.raises(Killed):
            run(place, disk / "out")
        OutputFolder.write_file = finish  # type: ignore[method-assign]
        again = failure(lambda: run(place, disk / "out"))
        resumed = failure(lambda: run(place, disk / "out", resume=True))
        return again, resumed, names(disk)

    options = f"size={size * 3 // 2}"
    again, resumed, left = run_isolated(attempt, mounts=[("tmpfs", disk, options)])
    # Beside the leftover there is no room for a second output; to go on with it there is.
    assert again[:2] == ("NoSpaceError", 8)
    assert resumed == ("", 0, "", "")
    assert left == ["out"]


@pytest.mark.parametrize("role", ["base", "distilled", "target"])
def test_an_output_that_is_an_input_by_a_mount_is_refused(place: Path, role: str) -> None:
    view = place / "view"
    view.mkdir()
    (place / role / "merge_manifest.json").write_text("{}")

    def attempt() -> tuple[str, int, str, str]:
        return failure(lambda: run(place, view / role, overwrite=True))

    before = contents(place)
    mounts = [(str(place), view, "")]
    kind, code, message, _ = run_isolated(attempt, mounts=mounts)
    assert (kind, code) == ("OutputError", 8)
    assert f"the output {view / role} is, holds or lies in the input" in message
    assert contents(place) == before


def test_an_output_on_another_file_system_than_its_inputs(place: Path) -> None:
    expected = contents(run(place, place / "out"))
    disk = place / "disk"
    disk.mkdir()

    def attempt() -> bool:
        run(place, disk / "out", "weight=0.5")
        return contents(run(place, disk / "out", overwrite=True)) == expected

    assert run_isolated(attempt, mounts=[("tmpfs", disk, "size=8m")])


# Names, modes, calls -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["two words", "line\nbreak", "😀", "-rf", "out.partial-12345678", "[o]ut*?", "é" * 100]
)
def test_any_name_can_be_an_output(place: Path, name: str) -> None:
    expected = contents(run(place, place / "out", "weight=0.5"))
    assert contents(run(place, place / "deep" / name, "weight=0.5")) == expected
    assert contents(run(place, place / "deep" / name, "weight=0.5", overwrite=True)) == expected
    assert names(place / "deep") == [name]


def test_a_name_that_leaves_no_room_for_a_partial_is_refused(place: Path) -> None:
    with pytest.raises(OutputError, match="File name too long"):
        run(place, place / ("o" * 250))
    assert sorted(path.name for path in place.iterdir()) == [
        *("base", "distilled", "mini.yaml", "target")
    ]


@pytest.mark.parametrize("where", ["the folder", "the recipe's", "the output's"])
def test_names_that_are_no_utf_8_are_only_names(place: Path, where: str) -> None:
    expected = contents(run(place, place / "out"))
    odd = Path(os.fsdecode(os.fsencode(place) + b"/caf\xe9"))
    odd.mkdir()
    if where == "the folder":
        shutil.move(place / "target", odd)
        (place / "target").symlink_to(odd / "target")
        out = place / "other"
    elif where == "the recipe's":
        for name in ("base", "distilled", "target", "mini.yaml"):
            shutil.move(place / name, odd / name)
        place, out = odd, place / "other"
    else:
        out = odd / "out"
    assert contents(run(place, out)) == expected


@pytest.mark.parametrize("mask", [0o022, 0o002, 0o077])
def test_modes_follow_the_mask(place: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        out = run(place, place / "out")
    finally:
        os.umask(before)
    for path in [out, *out.rglob("*")]:
        full = 0o777 if path.is_dir() else 0o666
        assert path.stat().st_mode & 0o777 == full & ~mask, path


def test_inputs_that_nobody_may_write_to_are_read(place: Path) -> None:
    expected = contents(run(place, place / "out"))
    paths = [path for role in ("base", "distilled", "target") for path in (place / role).iterdir()]
    for path in paths:
        path.chmod(0o444)
        path.parent.chmod(0o555)
    try:
        assert contents(run(place, place / "other")) == expected
    finally:
        for path in paths:
            path.parent.chmod(0o755)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
@pytest.mark.parametrize("call", ["pwrite64", "preadv2", "fsync", "ftruncate"])
def test_calls_that_a_signal_interrupts_are_repeated(place: Path, call: str) -> None:
    expected = contents(run(place, place / "out"))
    inject = f"inject={call}:error=EINTR:when=3+5"
    if call in ("fsync", "ftruncate"):
        inject = f"inject={call}:error=EINTR:when=1+2"
    command = [sys.executable, "-m", "merge", "run", str(place / "mini.yaml"), "--no-verify"]
    log = str(place / "trace")
    line = ["strace", "-f", "-qq", "-o", log, "-e", f"trace={call}", "-e", inject, *command]
    child = subprocess.run(
        [*line, "--out", str(place / "other")], capture_output=True, text=True, timeout=300
    )
    assert child.returncode == 0, child.stderr
    assert "EINTR" in Path(log).read_text(errors="replace")
    assert contents(place / "other") == expected
