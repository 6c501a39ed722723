"""Runs at the same time, with few handles, and on inputs that somebody else is changing."""

from __future__ import annotations

import functools
import multiprocessing
import os
import resource
import shutil
from pathlib import Path
from typing import Any

import pytest

from merge import load_recipe, run_recipe
from merge.errors import CheckpointError, IntegrityError, OutputError
from merge.reader.checkpoint import FileReader
from tests.mini import contents, random_tensors, write_unet
from tests.together import exit_codes

WEIGHTS = "diffusion_pytorch_model.safetensors"


def run(place: Path, *overrides: str, **options: Any) -> Path:
    recipe = load_recipe(place / "mini.yaml", overrides)
    return run_recipe(recipe, place / "out", verify=False, **options).folder


def test_of_two_runs_to_one_folder_one_wins_and_one_is_refused(place: Path) -> None:
    expected = contents(run(place))
    for _ in range(5):
        shutil.rmtree(place / "out")
        assert exit_codes(2, run, place) == [0, 8]
        assert contents(place / "out") == expected
        assert not list(place.glob("out.*"))


def test_a_run_while_its_input_is_still_being_written_is_refused_until_it_is_whole(
    place: Path,
) -> None:
    expected = contents(run(place))
    shutil.rmtree(place / "out")
    path = place / "distilled" / WEIGHTS
    data = path.read_bytes()
    reasons = []
    with path.open("wb", buffering=0) as file:
        for start in range(0, len(data), 512):
            with pytest.raises((CheckpointError, IntegrityError)) as caught:
                run(place)
            reasons.append(caught.value.message)
            assert str(path) in reasons[-1]
            assert not list(place.glob("out*"))
            file.write(data[start : start + 512])
    assert "the file has only 0 bytes" in reasons[0]
    assert "is truncated" in reasons[-1]
    assert contents(run(place)) == expected


def test_two_runs_that_both_replace_an_output_leave_one_of_them(place: Path) -> None:
    expected = contents(run(place))
    for _ in range(5):
        assert exit_codes(2, functools.partial(run, place, overwrite=True)) in ([0, 0], [0, 8])
        assert contents(place / "out") == expected
        assert not list(place.glob("out.*"))


def _run_with_few_files(place: Path, results: Any) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
    run(place, threads=8)
    results.put("done")


def test_64_open_files_are_enough(place: Path) -> None:
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    child = context.Process(target=_run_with_few_files, args=(place, results))
    child.start()
    assert results.get(timeout=60) == "done"
    child.join()


CHANGES = {
    "replaced": lambda path: write_unet(path.parent, random_tensors(9)),
    "cut": lambda path: os.truncate(path, path.stat().st_size - 2),
    "grown": lambda path: os.truncate(path, path.stat().st_size + 2),
    "touched": lambda path: os.utime(path, ns=(1, 1)),
    "removed": lambda path: path.unlink(),
    "a folder now": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_an_input_that_changes_in_the_middle_is_caught(
    place: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    path = place / "distilled" / WEIGHTS
    read_into, seen = FileReader.read_into, [0]

    def disturbed(self: FileReader, buffer: memoryview, offset: int) -> None:
        read_into(self, buffer, offset)
        if self.path == path and offset > 0:
            seen[0] += 1
            if seen[0] == 4:
                CHANGES[change](path)

    monkeypatch.setattr(FileReader, "read_into", disturbed)
    with pytest.raises(IntegrityError, match="changed while it was in use|was cut short"):
        run(place, threads=1)
    assert seen[0] >= 4
    assert not list(place.glob("out*"))


@pytest.mark.parametrize("role", ["base", "distilled", "target"])
@pytest.mark.parametrize("way", ["the folder", "a link to it", "a link in it", "what holds it"])
def test_an_output_that_is_an_input_is_refused(place: Path, role: str, way: str) -> None:
    before = contents(place)
    (place / role / "merge_manifest.json").write_text("{}")
    out = place / role
    if way == "a link to it":
        out = place / "link"
        out.symlink_to(place / role)
    elif way == "a link in it":
        moved = place / "elsewhere"
        (place / role).rename(moved)
        (place / role).mkdir()
        for path in moved.iterdir():
            (place / role / path.name).symlink_to(path)
        out = moved
    elif way == "what holds it":
        out = place
        (place / "merge_manifest.json").write_text("{}")
    recipe = load_recipe(place / "mini.yaml")
    with pytest.raises(OutputError):
        run_recipe(recipe, out, verify=False, overwrite=True)
    after = contents(place)
    for name, data in before.items():
        assert after.get(name, data) == data
    assert (place / role / WEIGHTS).is_file()


def test_hard_links_of_an_input_are_never_written_through(place: Path) -> None:
    out = run(place, "weight=0.5")
    path = out / "unet" / WEIGHTS
    path.unlink()
    path.hardlink_to(place / "target" / WEIGHTS)
    before = (place / "target" / WEIGHTS).read_bytes()
    run(place, overwrite=True)
    assert (place / "target" / WEIGHTS).read_bytes() == before
    assert path.read_bytes() != before
