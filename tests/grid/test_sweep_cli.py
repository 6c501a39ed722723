"""`sweep` on the command line: what it prints and writes, and how its failures end."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from merge.editor.result import EditResult
from merge.errors import EngineError
from merge.grid import bench
from merge.grid.axes import Axis, AxisValue
from merge.grid.jobs import ResidualJob
from merge.grid.model import Cell, Measured, SweepResult
from merge.grid.record import table_bytes
from merge.verify.drawings import draw_picture
from tests.cli.test_cli import call
from tests.grid.small import TWO, measure, read, write_recipe

AXES = ("weight=0.5,1", "steps=1,2")


@pytest.fixture(scope="module")
def recipe(tiny_sd15: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    draw_picture("house", 64).save(folder / "house.png")
    edits = [{"image": "house.png", "instruction": "make it winter"}]
    return write_recipe(folder, tiny_sd15, verify={"edits": edits})


@pytest.fixture(scope="module")
def sweep_folder(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sweep") / "out"
    return measure(recipe, AXES, out, TWO, metrics=["path", "residual", "l1"]).folder


# What is written ---------------------------------------------------------------------------------


def test_the_json_has_what_it_promises(sweep_folder: Path, recipe: Path) -> None:
    tree = read(sweep_folder)
    assert set(tree) == {
        *("schema_version", "tool", "recipe", "complete", "device", "facts", "axes", "samples"),
        *("reference", "metrics", "cells", "cells_in_all", "best", "notes"),
    }
    assert (tree["schema_version"], tree["recipe"], tree["complete"]) == (1, "tiny", True)
    assert tree["device"] == "cpu float32"
    assert tree["axes"] == [
        {"key": "weight", "values": [0.5, 1], "labels": ["0.5", "1"]},
        {"key": "steps", "values": [1, 2], "labels": ["1", "2"]},
    ]
    assert [sample["instruction"] for sample in tree["samples"]] == [e.instruction for e in TWO]
    assert [sample["image"] for sample in tree["samples"]] == ["house", "boat"]
    assert {sample["seed"] for sample in tree["samples"]} == {0}
    assert [metric["name"] for metric in tree["metrics"]] == ["score", "path", "residual", "l1"]
    assert all(set(m) == {"name", "title", "meaning", "better"} for m in tree["metrics"])
    assert tree["reference"]["guidance_scale"] == 1
    # Two samples; a path from 999 of 16 evaluations, and one that goes on from 499 with 8.
    assert tree["reference"]["unet_rows"] == 2 * (16 + 16 + 8)
    assert tree["cells_in_all"] == len(tree["cells"]) == 4
    for index, cell in enumerate(tree["cells"]):
        assert set(cell) == {
            *("index", "values", "labels", "words", "command", "recipe_digest", "sha256"),
            *("settings", "metrics", "samples", "pictures", "unet_rows", "seconds", "problem"),
        }
        assert cell["index"] == index
        assert cell["words"] == [f"{key}={cell['values'][key]}" for key in ("weight", "steps")]
        assert cell["command"][:3] == ["instruct-merge", "run", str(recipe)]
        assert cell["unet_rows"] == cell["settings"]["steps"] == cell["values"]["steps"]
        assert set(cell["seconds"]) == {"merge", "edit", "measure", "write"}
        for name in ("path", "residual", "l1"):
            assert len(cell["samples"][name]) == 2
            assert cell["metrics"][name] == pytest.approx(np.mean(cell["samples"][name]), rel=1e-6)
        found = cell["metrics"]
        assert found["score"] == pytest.approx((found["path"] * found["residual"]) ** 0.5, rel=1e-6)
        assert all((sweep_folder / name).is_file() for name in cell["pictures"])
        assert cell["problem"] == ""


def test_the_table_has_a_line_for_each_cell(sweep_folder: Path) -> None:
    rows = [*csv.reader(io.StringIO((sweep_folder / "sweep.csv").read_text()))]
    assert rows[0] == [
        *("weight", "steps", "score", "path", "residual", "l1"),
        *("unet_rows", "seconds", "recipe_digest", "sha256", "problem"),
    ]
    cells = read(sweep_folder)["cells"]
    assert [row[:2] for row in rows[1:]] == [cell["labels"] for cell in cells]
    for row, cell in zip(rows[1:], cells, strict=True):
        assert [float(v) for v in row[2:6]] == [cell["metrics"][name] for name in rows[0][2:6]]
        assert row[8:] == [cell["recipe_digest"], cell["sha256"], ""]
        assert float(row[7]) == pytest.approx(sum(cell["seconds"].values()), abs=0.003)


@pytest.mark.parametrize(
    ("label", "written"),
    [
        ("=1+1", "'=1+1"),
        ("@SUM(A1)", "'@SUM(A1)"),
        ("+cmd|' /C calc'!A0", "'+cmd|' /C calc'!A0"),
        ("-2+3", "'-2+3"),
        ("-0.5", "-0.5"),
        ("+1e3", "+1e3"),
        ("ties", "ties"),
        ("[a,b]", "[a,b]"),
        ("", ""),
    ],
)
def test_no_spreadsheet_takes_a_value_for_a_formula(label: str, written: str) -> None:
    cell = Cell(0, {"x": label}, (label,), (f"x={label}",), (), None, (), (), 0, "d")  # type: ignore[arg-type]
    axes = (Axis("x", (AxisValue(label, ()),)),)
    measured = {0: Measured("d", problem=f"{label}: wrong" if label else "")}
    result = SweepResult(Path(), "r", "r", axes, (cell,), measured, (), None, None, "cpu", True)
    _, row = csv.reader(io.StringIO(table_bytes(result).decode()))
    assert row[0] == written
    assert not row[-1].startswith(("=", "+", "-", "@"))


# The command -------------------------------------------------------------------------------------


def test_the_last_line_is_the_folder(
    capsys: pytest.CaptureFixture[str],
    recipe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["sweep", recipe, "weight=0.5,1", "--device", "cpu", "--metrics", "l1, psnr"]
    code, out, err = call(capsys, *words)
    assert (code, out) == (0, "outputs/tiny-sweep\n"), err
    # A bar of a library that a test before this one imported.
    assert [line for line in err.splitlines() if line and "Loading weights" not in line] == [
        "2 of 2 cells measured",
        "No best cell: the cells have no measure that compares them.",
    ]
    # A second time the folder is there.
    code, out, err = call(capsys, *words)
    assert (code, out) == (8, "")
    assert "error: outputs/tiny-sweep exists already" in err
    code, out, err = call(capsys, *words, "--resume", "--json", "-q")
    assert (code, err) == (0, "")
    assert out == Path("outputs/tiny-sweep/sweep.json").read_text()
    assert len(json.loads(out)["samples"]) == 1


def test_a_dry_run_writes_nothing_and_asks_nobody(
    capsys: pytest.CaptureFixture[str],
    recipe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["sweep", recipe, *AXES, "--device", "cpu", "--dry-run"]
    code, out, err = call(capsys, *words)
    assert code == 0, err
    assert [line.split()[0] for line in out.splitlines()] == [
        *("cells", "merges", "UNet", "time", "memory")
    ]
    tree = json.loads(call(capsys, *words, "--json", "--samples", "5")[1])
    assert (tree["cells"], tree["samples"]) == (4, 5)
    assert tree["unet_rows"] > 0
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (["wieght=1,2"], 3, "wieght: unknown key, did you mean 'weight'?"),
        (["weight=1,2", "verify.stepz=2"], 3, "did you mean 'steps'?"),
        (["weight=0:1"], 3, "a range has three numbers, START:STOP:STEP"),
        (["weight=a,b"], 3, "values of the grid are not valid:"),
        (["weight=0,1", "method=nothing"], 3, "method"),
        (["method=ties,nothing"], 3, "method"),
        ([], 3, "there is no axis: name a key with several values"),
        (["weight=1"], 3, "there is no axis: name a key with several values"),
        (["weight=1,2", "--metrics", "path,beauty"], 3, "'beauty' is no metric; there are path,"),
        (["weight=1,2", "--metrics", ""], 3, "'' is no metric"),
        (["weight=1,2", "--edits", "nowhere.yaml"], 3, "nowhere.yaml cannot be read"),
        (["weight=1,2", "--images", "."], 3, "belong together"),
        (["weight=1,2", "models.base=./nowhere"], 4, "nowhere"),
        (["models.distilled=./nowhere,./nobody"], 4, "nowhere"),
        (
            ["weight=1,2", "scheduler.class_name=FlowMatchEulerDiscreteScheduler"],
            4,
            "FlowMatchEulerDiscreteScheduler is no scheduler of the kind that these models",
        ),
        (
            ["weight=1,2", "scheduler.class_name=EDMEulerScheduler"],
            9,
            "EDMEulerScheduler has no noise levels that a path can be made of",
        ),
        (
            ["timesteps=999/1,999/2", "scheduler.class_name=DDIMScheduler"],
            4,
            "DDIMScheduler takes no explicit timesteps",
        ),
        (["weight=1,2", "scheduler.class_name=NoScheduler"], 5, "NoScheduler"),
        (["weight=1,2", "block_weights[nothing.*]=0.5"], 6, "nothing.*"),
        (["block_weights[nothing.*]=0.5,1"], 6, "block_weights[nothing.*]=0.5: "),
        (["weight=1,2", "--samples", "0"], 2, "--samples"),
        (["weight=1,2", "--device", "cuda"], 7, "CUDA"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_is_told_and_leaves_nothing(
    capsys: pytest.CaptureFixture[str],
    recipe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    code: int,
    text: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    device = [] if "--device" in words else ["--device", "cpu"]
    found, out, err = call(capsys, "sweep", recipe, *words, *device)
    assert (found, out) == (code, ""), err
    assert text in err
    assert "\nhint: " in err
    assert "unexpected" not in err
    assert [*tmp_path.iterdir()] == []


def test_models_that_do_not_fit_are_told(
    capsys: pytest.CaptureFixture[str], tiny_sd15: Path, tiny_sdxl: Path, tmp_path: Path
) -> None:
    other = write_recipe(tmp_path, tiny_sd15, distilled=str(tiny_sdxl / "distilled"))
    code, _, err = call(capsys, "sweep", other, "weight=0,1", "--out", tmp_path / "out")
    assert code == 6, err
    # All values of an axis are tried, and each is told once.
    recipe = write_recipe(tmp_path, tiny_sd15)
    names = ",".join(str(tiny_sdxl / role) for role in ("base", "distilled"))
    words = [f"models.distilled={names}", "weight=0.5,1"]
    code, _, err = call(capsys, "sweep", recipe, *words, "--out", tmp_path / "out")
    assert code == 6, err
    assert "values of the grid do not fit the models:" in err
    assert not (tmp_path / "out").exists()


def test_a_network_alone_cannot_edit(
    capsys: pytest.CaptureFixture[str], tiny_sd15: Path, tmp_path: Path
) -> None:
    unet = write_recipe(tmp_path, tiny_sd15, target=str(tiny_sd15 / "target" / "unet"))
    for more in ([], ["--dry-run"]):
        words = ["sweep", unet, "weight=0.5,1", "--out", tmp_path / "out", *more]
        code, _, err = call(capsys, *words)
        assert code == 9, err
        assert "without a pipeline, which cannot edit" in err
    assert not (tmp_path / "out").exists()


# Cells that fail ---------------------------------------------------------------------------------


def test_a_weight_that_overflows_is_a_problem_of_its_cell(
    capsys: pytest.CaptureFixture[str], recipe: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    words = ["sweep", recipe, "weight=0.5,1e6,1", "--device", "cpu", "--out", out]
    code, stdout, err = call(capsys, *words)
    assert (code, stdout) == (7, "")
    assert "error: 1 of 3 cells could not be measured, the first weight=1e6: " in err
    assert "too large for float16" in err
    assert f"hint: the others are in {out}" in err
    tree = read(out)
    assert tree["complete"] is True
    good, bad, last = tree["cells"]
    assert (good["problem"], last["problem"]) == ("", "")
    assert "too large for float16" in bad["problem"]
    assert (bad["sha256"], bad["pictures"], bad["metrics"]) == ("", [], {})
    assert set(good["metrics"]) == set(last["metrics"]) == {"score", "path", "residual"}
    assert good["sha256"] != last["sha256"]
    rows = [*csv.reader(io.StringIO((out / "sweep.csv").read_text()))]
    assert rows[2][-1] == bad["problem"]
    assert (out / "sweep.html").is_file()
    # What failed is tried again, and nothing else.
    before = {path: path.stat().st_mtime_ns for path in (out / "images").iterdir()}
    assert call(capsys, *words, "--resume")[0] == 7
    assert {path: path.stat().st_mtime_ns for path in (out / "images").iterdir()} == before


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let edits of two steps end in no numbers."""
    real = bench.edit_many

    def edit_many(*words: Any, **options: Any) -> Iterator[EditResult]:
        for result in real(*words, **options):
            latents = result.latents
            if result.settings.steps == 2:
                latents = np.full_like(latents, np.nan)
            yield dataclasses.replace(result, latents=latents)

    monkeypatch.setattr(bench, "edit_many", edit_many)


@pytest.mark.parametrize(
    ("metrics", "problem"),
    [
        (["path", "residual"], "steps=2: path of sample 0 is nan, not a finite number"),
        (["l1"], "steps=2: the latents of sample 0 are not finite numbers"),
        (["residual"], "steps=2: the latents of sample 0 are not finite numbers"),
    ],
    ids=["path", "l1", "residual"],
)
@pytest.mark.usefixtures("broken")
def test_edits_that_end_in_no_numbers_are_a_problem(
    recipe: Path, tmp_path: Path, metrics: list[str], problem: str
) -> None:
    with pytest.raises(EngineError, match=problem):
        measure(recipe, ["steps=1,2"], tmp_path / "out", metrics=metrics)
    good, bad = read(tmp_path / "out")["cells"]
    assert (good["problem"], bad["problem"]) == ("", problem)
    assert bad["metrics"] == {}
    # It can be looked at.
    assert len(bad["pictures"]) == 1
    assert read(tmp_path / "out")["best"] is None


def test_a_result_that_breaks_the_target_is_a_problem(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = bench.Bench.run

    def run(self: bench.Bench, job: Any, on_progress: Any) -> Any:
        found = real(self, job, on_progress)
        is_second = isinstance(job, ResidualJob) and job.cell.index == 1
        return (float("inf"),) if is_second else found

    monkeypatch.setattr(bench.Bench, "run", run)
    with pytest.raises(EngineError, match="residual of sample 0 is inf, not a finite number"):
        measure(recipe, ["steps=1,2"], tmp_path / "out", metrics=["residual"])
    json.loads((tmp_path / "out" / "sweep.json").read_text(), parse_constant=pytest.fail)
    good, bad = read(tmp_path / "out")["cells"]
    assert good["metrics"].keys() == {"residual"}
    assert bad["problem"].startswith("steps=2: residual of sample 0 is inf")


def test_scores_of_one_grid_are_all_of_one_kind(recipe: Path, tmp_path: Path) -> None:
    axes = ["scheduler.class_name=LCMScheduler,DDIMScheduler", "weight=0.5,1"]
    measure(recipe, axes, tmp_path / "out", metrics=["path", "endpoint", "residual"])
    cells = read(tmp_path / "out")["cells"]
    # Steps of a solver have no answers, so that single steps rank none of the cells.
    assert [cell["metrics"]["endpoint"] is None for cell in cells] == [False, False, True, True]
    for cell in cells:
        found = cell["metrics"]
        assert found["score"] == pytest.approx((found["path"] * found["residual"]) ** 0.5, rel=1e-6)


def test_a_copy_of_the_recipe_finds_its_models(tiny_sd15: Path, tmp_path: Path) -> None:
    models = Path(shutil.copytree(tiny_sd15, tmp_path / "models"))
    recipe = write_recipe(tmp_path, models, target="./models/target", base="./models/base")
    result = measure(recipe, ["steps=1,2"], tmp_path / "out", metrics=["l1"])
    assert result.is_complete
    assert result.lines[0] == "2 of 2 cells measured"
