"""The demo: its world scores exactly, its script trains, its committed models edit right."""

from __future__ import annotations

import functools
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from merge.recipe.load import load_recipe
from merge.verify.edits import read_edits

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "scripts" / "demo"
MODELS = ROOT / "recipes" / "demo"


@pytest.fixture(scope="module")
def world() -> ModuleType:
    sys.path.insert(0, str(DEMO))
    try:
        return importlib.import_module("world")
    finally:
        sys.path.remove(str(DEMO))


def distinct_ids(in_ground: bool) -> range:
    return range(8 if in_ground else 6)


def test_no_tile_can_pass_for_another(world: ModuleType) -> None:
    for part in (0, 1):
        for theme in range(3):
            tiles = world.TILES[part][theme]
            for i in distinct_ids(part == 1):
                for j in range(i):
                    distance = np.sqrt(np.square(tiles[i] - tiles[j]).mean())
                    assert distance > 2 * world.RIGHT_BELOW, (part, theme, i, j)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**32 - 1))
def test_every_drawn_outcome_is_right_and_no_source_is(world: ModuleType, seed: int) -> None:
    edits = world.sample_edits(np.random.default_rng(seed), 64)
    right = world.score(edits, world.render(edits.outcome))
    assert right.is_right.all()
    assert right.distance.max() == 0
    assert not world.score(edits, world.render(edits.source)).is_right.any()


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**32 - 1), st.integers(0, 3), st.integers(0, 3))
def test_one_wrong_tile_makes_an_edit_wrong(
    world: ModuleType, seed: int, row: int, column: int
) -> None:
    edits = world.sample_edits(np.random.default_rng(seed), 32)
    tiles = edits.outcome.tiles.copy()
    count = 6 if row < 2 else 8
    tiles[:, row, column] = (tiles[:, row, column] + 1) % count
    changed = world.Scenes(edits.outcome.sky, edits.outcome.ground, tiles)
    allowed = np.take_along_axis(edits.valid[:, row, column], tiles[:, row, column, None], 1)[:, 0]
    scores = world.score(edits, world.render(changed))
    # Still right only where the instruction allows the other sprite and something changed.
    assert not scores.is_right[~allowed].any()
    differs = (tiles != edits.source.tiles).any((1, 2)) | ~edits.is_open
    np.testing.assert_array_equal(scores.is_right, allowed & differs)


def test_the_distance_is_the_smallest_over_all_right_answers(world: ModuleType) -> None:
    """Against brute force over the product of what every tile may be."""
    import itertools

    rng = np.random.default_rng(0)
    edits = world.sample_edits(rng, 400)
    few = [i for i in range(400) if edits.is_open[i] and edits.valid[i].sum(-1).prod() <= 256]
    assert len(few) > 20
    for i in few[:20]:
        one = world.Edits(
            edits.source[[i]],
            edits.outcome[[i]],
            [edits.instructions[i]],
            edits.is_open[[i]],
            edits.valid[[i]],
        )
        picture = rng.random((1, 32, 32, 3), dtype=np.float32)
        choices = [np.flatnonzero(edits.valid[i, r, c]) for r in range(4) for c in range(4)]
        tiles = np.array(list(itertools.product(*choices))).reshape(-1, 4, 4)
        count = len(tiles)
        every = world.Scenes(
            np.repeat(one.outcome.sky, count), np.repeat(one.outcome.ground, count), tiles
        )
        gaps = np.sqrt(np.square(world.render(every) - picture).mean((1, 2, 3)))
        assert world.score(one, picture).distance[0] == pytest.approx(gaps.min(), rel=1e-5)


def test_a_blur_of_two_right_answers_is_wrong(world: ModuleType) -> None:
    rng = np.random.default_rng(1)
    edits = world.sample_edits(rng, 200)
    blur = (world.render(edits.outcome) + world.render(edits.source)) / 2
    assert not world.score(edits, blur).is_right.any()


def test_captions_name_what_is_there(world: ModuleType) -> None:
    tiles = np.zeros((1, 4, 4), dtype=np.int64)
    tiles[0, 0, 1], tiles[0, 3, 2], tiles[0, 2, 0] = 5, 3, 7
    scenes = world.Scenes(np.array([1]), np.array([2]), tiles)
    assert world.caption(scenes) == ["night snow birds houses flowers"]


def test_models_fit_the_repository_and_load_in_plain_diffusers() -> None:
    files = [path for path in MODELS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 52e6
    code = (
        "import sys, torch, diffusers\n"
        "p = diffusers.StableDiffusionInstructPix2PixPipeline.from_pretrained(sys.argv[1])\n"
        "assert p.unet.config.in_channels == 8 and p.vae_scale_factor == 4\n"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    subprocess.run(
        [sys.executable, "-I", "-c", code, str(MODELS / "target")], check=True, env=environment
    )


@pytest.mark.parametrize("name", ["demo", pytest.param("demo-lora", marks=pytest.mark.slow)])
def test_the_merge_edits_right_in_few_steps(name: str, tmp_path: Path) -> None:
    out = tmp_path / name
    run = subprocess.run(
        [sys.executable, "-m", "merge", "run", name, "--out", str(out), "--device", "cpu"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-1] == str(out)
    merged, target = count_right(out), count_right(MODELS / "target")
    assert merged["999,659,319,59"] > max(target["999,659,319,59"], 88)
    assert merged["4"] > target["4"] + 15
    assert merged["999,199"] > target["999,199"] + 20


@functools.cache
def count_right(model: Path) -> dict[str, int]:
    """Count the edits among 100 unseen ones that a checkpoint gets right, by timesteps."""
    places = ["999,659,319,59", "4", "999,199"]
    words = [word for place in places for word in ("--timesteps", place)]
    run = subprocess.run(
        [sys.executable, DEMO / "evaluate.py", "--model", model, "--count", "100", *words],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    counts = re.findall(r": (\d+) of 100 unseen edits are right", run.stdout)
    return dict(zip(places, map(int, counts), strict=True))


def test_a_share_below_the_limit_fails() -> None:
    """The lower end of the interval counts, which ten edits leave far below their share."""
    command = [sys.executable, DEMO / "evaluate.py", "--model", MODELS / "target"]
    command += ["--count", "10", "--timesteps", "8", "--at-least", "0.8"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 9
    assert "the lower end must be at least 80.0%" in run.stderr


def test_the_recipes_edit_the_same_pictures_as_was_chosen() -> None:
    full, lora = load_recipe("demo"), load_recipe("demo-lora")
    assert full.verify == lora.verify
    assert full.models.target == lora.models.target
    assert lora.models.base is None
    choice = json.loads((DEMO / "choice.json").read_text())
    places = {steps: found["timesteps"] for steps, found in choice["timesteps"].items()}
    assert full.weight == lora.weight == choice["weight"]
    assert full.verify.guidance_scale == choice["guidance_scale"]
    assert full.verify.timesteps == places["4"]
    listed = read_edits(MODELS / "edits.yaml")
    half = len(listed) // 2
    assert {edit.timesteps for edit in listed[:half]} == {None}
    assert {edit.timesteps for edit in listed[half:]} == {tuple(places["2"])}
    named = sorted((edit.image, edit.instruction) for edit in full.verify.edits)
    for part in (listed[:half], listed[half:]):
        assert sorted((str(edit.image), edit.instruction) for edit in part) == named


def results() -> dict[tuple[Any, ...], dict[str, Any]]:
    """Return the committed numbers by model, steps, timesteps, weight, guidance, rule and size."""
    rows = json.loads((DEMO / "results.json").read_text())["results"]
    names = ("model", "steps", "timesteps", "weight", "guidance_scale", "channel_rule", "size")
    return {tuple(str(row[name]) for name in names): row for row in rows}


def test_the_committed_numbers_keep_the_promise() -> None:
    choice = json.loads((DEMO / "choice.json").read_text())
    weight = str(choice["weight"])
    placed = {steps: str(found["timesteps"]) for steps, found in choice["timesteps"].items()}
    rows = {
        key[:3]: row["right"]
        for key, row in results().items()
        if key[-3:] in (("1.0", "skip", "large"), ("1.5", "skip", "large"))
        if key[3] in ("None", weight) and (key[-3] == "1.0" or row["scheduler"] == "own")
    }
    whole = rows["target", "50", "None"]
    assert rows["demo", "4", placed["4"]] >= 0.95 * whole
    for timesteps in ("None", "[999, 299]"):
        gain = rows["demo", "2", timesteps] - rows["target", "2", timesteps]
        assert gain >= 250, timesteps
    # The first screen of the README, number by number.
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"| 50 steps | 100 | {whole / 10:.1f} % | | | |" in text
    for steps in "432":
        cells = [
            f"{rows['target', steps, timesteps] / 10:.1f} % | "
            f"**{rows['demo', steps, timesteps] / 10:.1f} %**"
            for timesteps in (placed[steps], "None")
        ]
        assert f"| {steps} steps | {steps} | {' | '.join(cells)} |" in text


def test_a_preset_for_a_gpu_says_so_on_a_cpu() -> None:
    command = [sys.executable, DEMO / "train.py", "--device", "cpu"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 2
    assert "need --preset overnight" in run.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("preset", "fraction", "stages"),
    [
        ("small", "0.0008", {"vae", "base", "target", "distilled", "lora"}),
        ("overnight", "0.0002", {"base", "target", "distilled"}),
    ],
)
def test_the_whole_chain_trains(
    tmp_path: Path, preset: str, fraction: str, stages: set[str]
) -> None:
    work, out = tmp_path / "work", tmp_path / "demo"
    words = ["--preset", preset, "--work", work]
    command = [sys.executable, DEMO / "train.py", "--fraction", fraction, "--device", "cpu", *words]
    subprocess.run(command, check=True)
    before = {path: path.stat().st_mtime_ns for path in work.glob("*.pt")}
    assert {path.stem for path in before} == stages
    subprocess.run(command, check=True)  # finished stages are kept
    assert before == {path: path.stat().st_mtime_ns for path in work.glob("*.pt")}
    subprocess.run([sys.executable, DEMO / "export.py", *words, "--out", out], check=True)
    expected = {path.relative_to(MODELS) for path in MODELS.rglob("*") if path.is_file()}
    assert {path.relative_to(out) for path in out.rglob("*") if path.is_file()} == expected


@pytest.mark.slow
def test_steps_are_paced_by_the_clock(tmp_path: Path) -> None:
    """As the preset for a GPU does, here with few edits a step."""
    code = (
        "import dataclasses, sys; from pathlib import Path\n"
        "from presets import PRESETS; from training import Run\n"
        "preset = dataclasses.replace(PRESETS['large'], batch=4, seconds=60.0)\n"
        "run = Run(Path(sys.argv[1]), 'cpu', preset)\n"
        "print(*(run.schedule(stage).steps for stage in preset.budgets))\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, tmp_path], capture_output=True, text=True, cwd=DEMO
    )
    assert run.returncode == 0, run.stderr
    base, target, distilled = map(int, run.stdout.split())
    # The distillation asks its teacher twice, so fewer of its steps fit.
    assert 2 <= distilled < min(base, target)
