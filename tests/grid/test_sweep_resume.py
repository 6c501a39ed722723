"""Sweeps that were interrupted, their folders, and what is kept, refused or replaced."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from merge.errors import DeviceError, OutputExistsError, ResumeError
from merge.grid.bench import Bench
from merge.grid.jobs import CellJob, ReferenceJob, ResidualJob
from merge.grid.record import SweepFolder
from tests.grid.small import TWO, measure, read, without_seconds, write_recipe

AXES = ["weight=0.5,1", "steps=1,2"]
METRICS = ["path", "endpoint", "residual", "l1"]


@pytest.fixture(scope="module")
def recipe(tiny_sd15: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("recipe"), tiny_sd15)


@pytest.fixture(scope="module")
def whole(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep that nobody interrupted."""
    out = tmp_path_factory.mktemp("whole") / "out"
    return measure(recipe, AXES, out, TWO, metrics=METRICS).folder


class Interrupter:
    """Lets a number of jobs of a kind be done, and then interrupts; remembers what was done."""

    def __init__(self, patch: pytest.MonkeyPatch, kind: type, after: int) -> None:
        self.done: list[str] = []
        self.left = after
        real = Bench.run

        def run(bench: Bench, job: Any, on_progress: Callable[[int], None]) -> Any:
            if isinstance(job, kind):
                if self.left == 0:
                    raise KeyboardInterrupt
                self.left -= 1
            self.done.append(job.key)
            return real(bench, job, on_progress)

        patch.setattr(Bench, "run", run)


def interrupt(recipe: Path, out: Path, kind: type, after: int) -> list[str]:
    """Begin a sweep and interrupt it; return what was done."""
    with pytest.MonkeyPatch.context() as patch:
        interrupter = Interrupter(patch, kind, after)
        with pytest.raises(KeyboardInterrupt) as caught:
            measure(recipe, AXES, out, TWO, metrics=METRICS)
        notes = getattr(caught.value, "__notes__", [])
    done = sum(job.startswith("cell") for job in interrupter.done)
    assert notes == ([f"{out} keeps {done} of 4 cells"] if done else [])
    return interrupter.done


@pytest.mark.parametrize(
    ("kind", "after"),
    [(CellJob, 1), (ResidualJob, 2)],
    ids=["while measuring", "while judging"],
)
def test_a_resumed_sweep_is_the_one_that_was_not_interrupted(
    recipe: Path,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: type,
    after: int,
) -> None:
    out = tmp_path / "out"
    before = interrupt(recipe, out, kind, after)
    kept = read(out)
    assert kept["complete"] is False
    assert len(kept["cells"]) == (after if kind is CellJob else 4)
    assert kept["cells_in_all"] == 4
    # What is kept can be looked at.
    assert (out / "sweep.html").is_file()
    assert (out / "sweep.csv").read_text().count("\n") == 1 + len(kept["cells"])
    interrupter = Interrupter(monkeypatch, type(None), 0)
    measure(recipe, AXES, out, TWO, metrics=METRICS, resume=True)
    assert without_seconds(read(out)) == without_seconds(read(whole))
    repeated = set(before) & set(interrupter.done)
    assert not {key for key in repeated if key.startswith(("cell", "residual"))}
    assert names(out) == names(whole)
    for path in (out / "images").iterdir():
        assert path.read_bytes() == (whole / "images" / path.name).read_bytes()


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def test_latents_that_are_lost_are_made_again(recipe: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    interrupt(recipe, out, ResidualJob, 1)
    (out / "work" / "001.npz").unlink()
    (out / "work" / "002.npz").write_bytes(b"")
    (out / "work" / "003.npz").write_bytes(b"PK\3\4 no archive")
    measure(recipe, AXES, out, TWO, metrics=METRICS, resume=True)
    assert without_seconds(read(out)) == without_seconds(read(whole))


def test_a_whole_sweep_is_resumed_without_a_model(
    recipe: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupter = Interrupter(monkeypatch, object, 0)
    before = read(whole)
    measure(recipe, AXES, whole, TWO, metrics=METRICS, resume=True)
    assert interrupter.done == []
    assert read(whole) == before


def test_an_interruption_before_the_first_cell_leaves_no_folder(
    recipe: Path, tmp_path: Path
) -> None:
    assert interrupt(recipe, tmp_path / "out", ReferenceJob, 1) == ["path 0"]
    assert not (tmp_path / "out").exists()


def test_a_device_that_fails_at_once_leaves_no_folder(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*words: Any) -> None:
        raise DeviceError("it is full")

    monkeypatch.setattr(Bench, "run", fail)
    with pytest.raises(DeviceError):
        measure(recipe, AXES, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "notes.txt").write_text("mine")
    with pytest.raises(OutputExistsError):
        measure(recipe, AXES, tmp_path / "theirs", overwrite=True)
    assert names(tmp_path / "theirs") == ["notes.txt"]


# What may not be gone on with --------------------------------------------------------------------


def picture(path: Path, color: str) -> Path:
    Image.new("RGB", (64, 64), color).save(path)
    return path


def write_edits(folder: Path, **changes: object) -> Path:
    """Write a list of one edit whose right answer is known."""
    for name, color in (("a", "red"), ("b", "blue")):
        if not (folder / f"{name}.png").exists():
            picture(folder / f"{name}.png", color)
    one = {"image": "a.png", "instruction": "make it blue", "expected": ["b.png"], **changes}
    path = folder / "edits.yaml"
    path.write_text(yaml.safe_dump([one]))
    return path


@pytest.fixture(scope="module")
def begun(tiny_sd15: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe, edits and a sweep of them."""
    folder = tmp_path_factory.mktemp("begun")
    recipe = write_recipe(folder, tiny_sd15)
    edits = write_edits(folder)
    measure(recipe, ["weight=0.5,1"], folder / "out", edits, metrics=["l1"])
    return folder


@pytest.mark.parametrize(
    ("change", "options", "what"),
    [
        (lambda d, m: write_recipe(d, m, exclude=["conv_out.*"]), {}, "the recipe or an input"),
        (lambda d, m: write_recipe(d, m, verify={"steps": 2}), {}, "their settings"),
        (
            lambda d, m: write_recipe(d, m, scheduler={"config": {"clip_sample": True}}),
            {},
            "the scheduler",
        ),
        (
            lambda d, m: write_recipe(d, m, verify={"compare": {"guidance_scale": 3.0}}),
            {},
            "the target's own settings",
        ),
        (lambda d, m: write_edits(d, instruction="make it green"), {}, "the edits"),
        (lambda d, m: write_edits(d, expected_limit=0.9), {}, "the edits"),
        (lambda d, m: write_edits(d, expected=["a.png"]), {}, "the edits"),
        (lambda d, m: write_edits(d, seed=3), {}, "the edits, their settings"),
        (lambda d, m: picture(d / "a.png", "green"), {}, "the edits"),
        (lambda d, m: picture(d / "b.png", "green"), {}, "the edits"),
        (lambda d, m: None, {"metrics": ["l1", "psnr"]}, "the metrics"),
        (lambda d, m: None, {"axes": ["weight=0.5,2"]}, "the grid, the recipe or an input"),
        (lambda d, m: None, {"axes": ["weight=0.5,1", "steps=2"]}, "their settings"),
    ],
    ids=[
        *("recipe", "settings", "scheduler", "target's settings", "instruction", "limit"),
        *("answer", "seed", "picture", "picture of an answer", "metrics", "axes", "one value"),
    ],
)
def test_what_was_measured_otherwise_is_not_gone_on_with(
    tiny_sd15: Path,
    begun: Path,
    change: Callable[[Path, Path], object],
    options: dict[str, Any],
    what: str,
) -> None:
    saved = {path: path.read_bytes() for path in begun.iterdir() if path.is_file()}
    axes = options.pop("axes", ["weight=0.5,1"])
    before = (begun / "out" / "sweep.json").read_bytes()
    try:
        change(begun, tiny_sd15)
        with pytest.raises(ResumeError, match=re.escape(f": {what} changed")):
            measure(
                begun / "tiny.yaml",
                axes,
                begun / "out",
                begun / "edits.yaml",
                resume=True,
                **{"metrics": ["l1"], **options},
            )
    finally:
        for path, data in saved.items():
            path.write_bytes(data)
    assert (begun / "out" / "sweep.json").read_bytes() == before


# Folders ----------------------------------------------------------------------------------------


def test_a_folder_is_replaced_only_when_asked_and_only_what_is_ours(begun: Path) -> None:
    out = begun / "out"
    words = (begun / "tiny.yaml", ["weight=0.5,0.75"], out, begun / "edits.yaml")
    with pytest.raises(OutputExistsError, match="exists already") as caught:
        measure(*words, metrics=["l1"])
    assert "--resume" in caught.value.hint
    assert "--overwrite" in caught.value.hint
    theirs = [out / "sweep.yaml", out / "notes.txt", out / "images" / "cat.png"]
    for path in theirs:
        path.write_text("mine")
    (out / "images" / "007-001.png").write_bytes(b"of an earlier, larger sweep")
    measure(*words, metrics=["l1"], overwrite=True)
    assert [path.read_text() for path in theirs] == ["mine"] * 3
    assert [axis["labels"] for axis in read(out)["axes"]] == [["0.5", "0.75"]]
    assert not (out / "images" / "007-001.png").exists()


@pytest.mark.parametrize("flag", ["overwrite", "resume"])
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("notes.txt", "mine"),
        ("sweep.json", "{}"),
        ("sweep.json", "[1]"),
        ("sweep.json", '{"schema_version": 1}'),
        ("sweep.json", '{"schema_version": 2, "facts": {}}'),
        ("sweep.json", "no json"),
    ],
)
def test_a_foreign_folder_stays_as_it_is(
    recipe: Path, tmp_path: Path, name: str, content: str, flag: str
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_text(content)
    with pytest.raises(OutputExistsError, match=r"has no sweep\.json of ours"):
        measure(recipe, AXES, out, **{flag: True})
    assert names(out) == [name]
    assert (out / name).read_text() == content


def test_a_file_is_no_folder(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(OutputExistsError, match=r"has no sweep\.json of ours"):
        measure(recipe, AXES, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out").read_text() == "mine"


def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
    place = SweepFolder(tmp_path)
    assert place.check(overwrite=False, resume=False) == {}
    assert place.open({"a": "b"}, overwrite=False, resume=True) == {}
    latents = [np.arange(8, dtype=np.float32).reshape(2, 2, 2), np.zeros((1, 3), np.float32)]
    place.write_latents(7, latents)
    found = place.read_latents(7)
    assert found is not None
    assert all(np.array_equal(a, b) for a, b in zip(found, latents, strict=True))
    assert place.read_latents(8) is None
    place.discard()
    assert not tmp_path.exists()
    tmp_path.mkdir()


# A real Ctrl-C ------------------------------------------------------------------------------------


def test_ctrl_c_keeps_what_is_done_and_says_how_to_go_on(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "my out"
    words = ["sweep", str(recipe), "weight=0.1:1:0.05", "--out", str(out), "--device", "cpu"]
    child = subprocess.Popen(
        [sys.executable, "-m", "merge", *words, "--metrics", "l1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    deadline = time.monotonic() + 120
    while not (out / "images" / "001-000.png").exists():
        assert time.monotonic() < deadline
        assert child.poll() is None, child.communicate()
        time.sleep(0.02)
    child.send_signal(signal.SIGINT)
    stdout, stderr = child.communicate(timeout=60)
    assert child.returncode == 130, stderr
    assert stdout == ""
    kept = read(out)
    assert 1 <= len(kept["cells"]) < kept["cells_in_all"] == 19
    told = [line for line in stderr.splitlines() if line.startswith(("interrupted", "hint"))]
    again = shlex.join(["instruct-merge", *words, "--metrics", "l1", "--resume"])
    assert told == [
        f"interrupted: {out} keeps {len(kept['cells'])} of 19 cells",
        f"hint: `{again}` goes on with it",
    ]
    assert (out / "sweep.html").is_file()
