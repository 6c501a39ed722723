"""Runs that are killed and go on: the same bytes, and never those of another run."""

from __future__ import annotations

import dataclasses
import fcntl
import functools
import itertools
import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import merge.run.finish as finish
import merge.run.merging as merging
import merge.writer.journal as journal_module
from merge import load_recipe, run_recipe
from merge.errors import (
    CheckpointError,
    NonFiniteError,
    OutputExistsError,
    ResumeError,
)
from merge.reader.checkpoint import read_header
from merge.writer.journal import JOURNAL_NAME, Journal, JournalMark
from tests.mini import contents, random_tensors, write_models, write_recipe, write_unet
from tests.together import exit_codes

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
MODELS = ("base", "distilled", "target")


class Killed(BaseException):
    """Ends a run where it is, as a signal does."""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Models of some thirty tensors, and a checkpoint after each of them."""
    monkeypatch.setattr(merging, "_CHECKPOINT_BYTES", 1)
    for seed, role in enumerate(MODELS):
        tensors = random_tensors(seed, channels=8 if role == "target" else 4)
        for index in range(24):
            # One that nothing is added to, and one whose values are too large for float16.
            value = 0.1 if index == 3 else 0.1 * (seed + 1) + 0.01 * index
            tensors[f"mid_block.more{index}.weight"] = torch.full((64, 40 + index), value)
        tensors["mid_block.more5.weight"][7, 7] = 40_000.0 * (seed + 1)
        write_unet(tmp_path / role, {k: v.float() for k, v in tensors.items()})
    write_recipe(tmp_path, on_overflow="clamp")
    return tmp_path


def run(place: Path, *overrides: str, **options: Any) -> Path:
    recipe = load_recipe(place / "mini.yaml", overrides)
    options = {"threads": 2, "verify": False, **options}
    return run_recipe(recipe, place / "out", **options).folder


def whole(place: Path) -> dict[str, bytes]:
    """Return what an uninterrupted run writes."""
    found = contents(run(place))
    shutil.rmtree(place / "out")
    return found


def kill_at(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """End the next run as its journal gets its `count`-th checkpoint."""
    add, seen = Journal.add, [0]

    def counted(self: Journal, checkpoint: JournalMark) -> None:
        add(self, checkpoint)
        seen[0] += 1
        if seen[0] == count:
            raise Killed

    monkeypatch.setattr(Journal, "add", counted)


def leftover(place: Path) -> Path:
    (partial,) = place.glob("out.partial-*")
    return partial


def interrupted(place: Path, count: int = 9, *overrides: str) -> Path:
    """Interrupt a run after some checkpoints and return what it leaves."""
    with pytest.MonkeyPatch.context() as patch:
        kill_at(patch, count)
        # One worker: several finish tensors in bursts, with fewer checkpoints.
        with pytest.raises(Killed):
            run(place, *overrides, threads=1)
    return leftover(place)


# Going on ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 7, 20, 32])
def test_an_interrupted_run_goes_on_to_the_same_bytes(
    place: Path, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = whole(place)
    manifest = json.loads(expected["merge_manifest.json"])
    assert manifest["overflows"] == {"mid_block.more5.weight": 1}
    partial = interrupted(place, count)
    assert not (place / "out").exists()
    with pytest.raises(CheckpointError):
        read_header(partial / WEIGHTS)
    started = []
    execute = finish.merge_components

    def watched(*words: Any, **options: Any) -> Any:
        started.append(options["journal"].checkpoints[-1].tensors)
        return execute(*words, **options)

    monkeypatch.setattr(finish, "merge_components", watched)
    assert contents(run(place, resume=True)) == expected
    assert started[0] >= count
    assert sorted(path.name for path in place.iterdir()) == sorted([*MODELS, "mini.yaml", "out"])


def test_a_run_may_be_interrupted_again_and_again(place: Path) -> None:
    expected = whole(place)
    interrupted(place, 3)
    for _ in range(3):
        with pytest.MonkeyPatch.context() as patch:
            kill_at(patch, 4)
            with pytest.raises(Killed):
                run(place, resume=True, threads=1)
    assert contents(run(place, resume=True)) == expected


def test_what_was_written_is_checked_before_it_is_trusted(place: Path) -> None:
    expected = whole(place)
    partial = interrupted(place, 20)
    lines = (partial / JOURNAL_NAME).read_text().splitlines()
    checkpoint = json.loads(lines[8])
    path = partial / WEIGHTS
    data = bytearray(path.read_bytes())
    data[checkpoint["position"] + 5] ^= 1
    path.write_bytes(data)
    assert contents(run(place, resume=True)) == expected


@pytest.mark.parametrize("damage", ["cut", "gone", "longer", "a torn journal"])
def test_damage_to_what_is_there_costs_only_time(place: Path, damage: str) -> None:
    expected = whole(place)
    partial = interrupted(place, 20)
    path = partial / WEIGHTS
    if damage == "cut":
        os.truncate(path, path.stat().st_size // 2)
    elif damage == "gone":
        path.unlink()
    elif damage == "longer":
        os.truncate(path, path.stat().st_size + 1000)
    else:
        text = (partial / JOURNAL_NAME).read_bytes()
        (partial / JOURNAL_NAME).write_bytes(text[: len(text) - 30] + b"\xff{")
    assert contents(run(place, resume=True)) == expected


def test_without_a_leftover_a_run_begins_anew(
    place: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = whole(place)
    caplog.set_level("WARNING", "merge")
    logger = __import__("logging").getLogger("merge")
    logger.addHandler(caplog.handler)
    assert contents(run(place, resume=True)) == expected
    logger.removeHandler(caplog.handler)
    assert "there is nothing to resume at" in caplog.text


def test_a_leftover_is_never_touched_unasked(place: Path) -> None:
    expected = whole(place)
    partial = interrupted(place)
    before = contents(partial)
    assert contents(run(place)) == expected
    assert contents(partial) == before
    # The name is taken now.
    with pytest.raises(OutputExistsError):
        run(place, resume=True)
    assert contents(partial) == before


def test_resuming_replaces_an_older_output_only_when_it_is_told_to(place: Path) -> None:
    expected = whole(place)
    run(place, "weight=0.5")
    with pytest.MonkeyPatch.context() as patch:
        kill_at(patch, 9)
        with pytest.raises(Killed):
            run(place, overwrite=True, threads=1)
    assert (place / "out" / "merge_manifest.json").is_file()
    assert contents(run(place, resume=True, overwrite=True)) == expected


# What is refused ---------------------------------------------------------------------------------


@pytest.mark.parametrize("word", ["weight=0.5", "out_dtype=bfloat16", "exclude=[conv_out.*]"])
def test_a_changed_recipe_is_refused_and_the_leftover_stays(place: Path, word: str) -> None:
    partial = interrupted(place)
    before = contents(partial)
    with pytest.raises(ResumeError, match="cannot be resumed: the recipe changed") as caught:
        run(place, word, resume=True)
    assert caught.value.exit_code == 8
    assert contents(partial) == before


def test_a_changed_input_is_refused(place: Path) -> None:
    expected = whole(place)
    partial = interrupted(place)
    before = contents(partial)
    path = place / "distilled" / "diffusion_pytorch_model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(ResumeError, match="cannot be resumed: an input changed"):
        run(place, resume=True)
    assert contents(partial) == before
    path.write_bytes(data)
    assert contents(run(place, resume=True)) == expected


def test_another_version_is_refused(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted(place)
    monkeypatch.setattr(finish, "__version__", "99")
    with pytest.raises(ResumeError, match="the tool's version changed"):
        run(place, resume=True)


def test_a_journal_of_another_format_is_refused(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(place)
    monkeypatch.setattr(journal_module, "JOURNAL_VERSION", 2)
    with pytest.raises(ResumeError, match="cannot be resumed"):
        run(place, resume=True)


def test_a_run_that_is_still_at_it_is_left_alone(place: Path) -> None:
    partial = interrupted(place)
    with (partial / JOURNAL_NAME).open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        before = contents(partial)
        with pytest.raises(ResumeError, match="still being written by another run"):
            run(place, resume=True)
        assert contents(partial) == before


def test_a_failure_keeps_nothing(place: Path) -> None:
    interrupted(place)
    path = place / "base" / "diffusion_pytorch_model.safetensors"
    write_models(place)
    tensors = random_tensors(0)
    tensors["conv_out.weight"][0, 0, 0, 0] = float("nan")
    write_unet(path.parent, tensors)
    shutil.rmtree(leftover(place))
    with pytest.raises(NonFiniteError):
        run(place)
    assert not list(place.glob("out*"))


def test_a_checkpoint_is_the_same_after_a_journal(tmp_path: Path) -> None:
    facts = {"the recipe": "x"}
    written = JournalMark("unet/a", 3, 99, "f" * 64, ("k",), {"j": 2})
    with Journal.open(tmp_path / "j", facts) as journal:
        assert journal.checkpoints == ()
        journal.add(written)
        journal.add(dataclasses.replace(written, tensors=4))
    with Journal.open(tmp_path / "j", facts) as journal:
        assert journal.checkpoints == (written, dataclasses.replace(written, tensors=4))


@pytest.mark.parametrize("locks", ["work", "do nothing"])
def test_of_two_that_resume_at_once_one_goes_on_and_one_is_refused(
    place: Path, monkeypatch: pytest.MonkeyPatch, locks: str
) -> None:
    expected = whole(place)
    if locks == "do nothing":
        monkeypatch.setattr(fcntl, "flock", lambda *_: None)
    for count in (3, 9, 15, 21, 27):
        interrupted(place, count)
        assert exit_codes(2, functools.partial(run, place, resume=True)) == [0, 8]
        assert contents(place / "out") == expected
        assert not list(place.glob("out.*"))
        shutil.rmtree(place / "out")


@pytest.mark.parametrize("moment", ["before the weights", "between them", "after them"])
def test_where_locks_do_nothing_a_run_that_is_overtaken_ends_and_harms_nothing(
    place: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    expected = whole(place)
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)
    count = {"before the weights": 1, "between them": 16, "after them": 32}[moment]
    add, seen = Journal.add, [0]

    def overtaken(self: Journal, checkpoint: JournalMark) -> None:
        add(self, checkpoint)
        seen[0] += 1
        if seen[0] == count:
            run(place, resume=True)

    monkeypatch.setattr(Journal, "add", overtaken)
    with pytest.raises(ResumeError, match="was taken over by another run"):
        run(place, threads=1)
    assert contents(place / "out") == expected
    assert not list(place.glob("out.*"))


# Real kills --------------------------------------------------------------------------------------


def _kill_and_resume(place: Path, seed: int, expected: dict[str, bytes]) -> bool:
    """Kill a run at a random moment, go on with it, and compare; True when there was a leftover."""
    # Forked: a fresh process would spend seconds importing torch, and be killed there.
    context = multiprocessing.get_context("fork")
    child = context.Process(target=run, args=(place,))
    child.start()
    time.sleep(random.Random(seed).uniform(0.0, 0.25))
    assert child.pid is not None
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    partials = list(place.glob("out.partial-*"))
    for partial in partials:
        if (partial / WEIGHTS).is_file():
            try:
                read_header(partial / WEIGHTS)
            except CheckpointError:
                continue
            # Only what is finished may open, and then it is right.
            assert (partial / WEIGHTS).read_bytes() == expected[WEIGHTS]
    if (place / "out").exists():
        assert contents(place / "out") == expected
        shutil.rmtree(place / "out")
    found = any((partial / JOURNAL_NAME).is_file() for partial in partials)
    assert contents(run(place, resume=True)) == expected
    for path in place.glob("out*"):
        shutil.rmtree(path)
    return found


@pytest.mark.parametrize(
    "kills", [12, pytest.param(1000, marks=pytest.mark.slow)], ids=["sample", "all"]
)
def test_killed_runs_go_on_to_the_same_bytes(place: Path, kills: int) -> None:
    expected = whole(place)
    resumed = sum(_kill_and_resume(place, seed, expected) for seed in range(kills))
    # On a busy machine a run may not come to its weights in time: more of them will.
    more = itertools.count(kills)
    while not resumed:
        resumed += _kill_and_resume(place, next(more), expected)
