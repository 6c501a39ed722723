"""Several recipes in one call, here and on a Ray cluster."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from merge.background.pool.local import LocalPool
from merge.cli.main import main
from merge.errors import EngineError, OutputError
from merge.run.many import RunJob, RunOptions, RunOutcome, load_many, run_many
from tests.mini import contents, write_models, write_recipe

has_ray = importlib.util.find_spec("ray") is not None


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with three recipes over the mini models."""
    write_models(tmp_path)
    for name, weight in (("a", 0.5), ("b", 1.0), ("c", 1.5)):
        write_recipe(tmp_path, name=name, weight=weight).rename(tmp_path / f"{name}.yaml")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def code_of(*words: str) -> int | str | None:
    with pytest.raises(SystemExit) as stop:
        main(list(words))
    return stop.value.code


def test_recipes_run_one_after_the_other(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert not code_of("run", "a.yaml", "b.yaml", "c.yaml", "out_dtype=float32", "--device=cpu")
    said = capsys.readouterr()
    assert said.out.splitlines() == ["outputs/a", "outputs/b", "outputs/c"]
    assert "b: merged 7 of 8 tensors" in said.err
    assert code_of("run", "b.yaml", "out_dtype=float32", "--device=cpu", "--out=alone") in (0, None)
    assert contents(here / "alone") == contents(here / "outputs" / "b")


def test_one_that_fails_stops_no_other(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "outputs" / "b").mkdir(parents=True)
    (here / "outputs" / "b" / "mine.txt").write_text("kept")
    assert code_of("run", "a.yaml", "b.yaml", "c.yaml", "--device=cpu") == 8
    said = capsys.readouterr()
    assert said.out.splitlines() == ["outputs/a", "outputs/c"]
    assert "b: the output folder outputs/b exists already" in said.err
    assert "error: 1 of 3 recipes failed: b; the first: the output folder" in said.err
    assert said.err.rstrip().splitlines()[-1].startswith("hint: ")


def test_two_into_one_folder_are_refused(here: Path) -> None:
    with pytest.raises(OutputError, match=r"two recipes would write .*outputs/x"):
        load_many(["a.yaml", "b.yaml"], ["output.folder=outputs/x"])
    assert not (here / "outputs").exists()


def test_what_belongs_to_one_recipe_is_refused_for_several(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for option in ("--out=x", "--locked", "--write-lock"):
        assert code_of("run", "a.yaml", "b.yaml", option) == 2
        assert "for a single recipe that runs here" in capsys.readouterr().err


def test_outcomes_are_told_as_they_come(here: Path) -> None:
    told: list[tuple[str, int]] = []

    def tell(job: RunJob, outcome: RunOutcome) -> None:
        told.append((job.recipe.name, outcome.exit_code))

    jobs = load_many(["a.yaml", "b.yaml"], ["weight=0"])
    with LocalPool() as pool, pytest.raises(EngineError, match="2 of 2 recipes failed: a, b"):
        run_many(jobs, RunOptions(device="cpu"), pool, tell)
    assert [name for name, _ in told] == ["a", "b"]
    assert all(code for _, code in told)


@pytest.mark.skipif(not has_ray, reason="ray is not installed")
def test_on_a_cluster_they_give_the_same_bytes(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.background.ray_nodes import Nodes

    assert not code_of("run", "a.yaml", "b.yaml", "--device=cpu")
    (here / "outputs").rename(here / "local")
    capsys.readouterr()
    with Nodes(2) as nodes:
        words = ["--executor=ray", f"--address={nodes.address}", "--device=cpu"]
        assert not code_of("run", "a.yaml", "b.yaml", *words)
    assert sorted(capsys.readouterr().out.splitlines()) == ["outputs/a", "outputs/b"]
    for name in "ab":
        assert contents(here / "outputs" / name) == contents(here / "local" / name)
