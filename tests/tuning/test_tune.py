"""Whole tunings: of the demo's smaller models, and of models that tell nothing."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from merge import Inputs, TuneResult, load_recipe, run_recipe, tune
from merge.cli.main import main
from merge.errors import DeviceError, OutputExistsError, RecipeError, ResumeError, VerificationError
from merge.grid.bench import Bench

ROOT = Path(__file__).parents[2]
SMALL = ROOT / "scripts" / "demo" / "small"
WORDS = tuple(f"models.{role}.path={SMALL / role}" for role in ("base", "distilled", "target"))
OPTIONS: dict[str, Any] = {
    "weights": "0:1.5:0.5",
    "inputs": Inputs(samples=16),
    "device": "cpu",
    "threads": 1,
}
WEIGHTS_NAME = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> TuneResult:
    return tune("demo", WORDS, out=tmp_path_factory.mktemp("tuned") / "out", **OPTIONS)


def tree_of(folder: Path) -> dict[str, Any]:
    tree: dict[str, Any] = json.loads((folder / "tune.json").read_text())
    return tree


def timeless(tree: Any) -> Any:
    """Return a tree without what depends on the machine's speed."""
    if isinstance(tree, dict):
        return {k: timeless(v) for k, v in tree.items() if k not in ("seconds", "folder")}
    return [timeless(item) for item in tree] if isinstance(tree, list) else tree


def test_the_weight_is_where_the_exact_score_has_it(tuned: TuneResult) -> None:
    # 1,000 edits of these models: 70.3 % right at 0, 81.7 % at 0.5, 71.8 % at 1, 47.9 % at 1.5.
    assert tuned.chosen is not None
    assert 0.3 <= tuned.chosen.weight <= 0.75
    assert tuned.overrides == (*WORDS, f"weight={tuned.chosen.weight:g}")
    assert len(tuned.picks) == 4
    assert tuned.held_out is not None
    assert tuned.held_out.samples == 4
    assert tuned.held_out.what == "noise"


def test_the_recipe_runs_to_the_bytes_that_were_measured(tuned: TuneResult, tmp_path: Path) -> None:
    assert tuned.chosen is not None
    recipe = load_recipe(tuned.folder / "tuned.yaml")
    assert recipe.weight == tuned.chosen.weight
    assert recipe.name == "demo-tuned"
    assert recipe.allow_noop is False
    ours, theirs = (r.verify.edits for r in (recipe, load_recipe("demo")))
    assert [Path(e.image).resolve() for e in ours] == [Path(e.image).resolve() for e in theirs]
    # Its name is in the file's header, and decides no weight.
    same = dataclasses.replace(recipe, name="demo")
    result = run_recipe(same, tmp_path / "out", device="cpu", verify=False)
    (index,) = [i for i, setting in tuned.settings.items() if setting == tuned.chosen]
    found = tuned.measured[index]
    assert result.recipe_digest == found.digest
    sha256 = hashlib.sha256((tmp_path / "out" / WEIGHTS_NAME).read_bytes()).hexdigest()
    assert sha256 == found.sha256 == result.files[WEIGHTS_NAME].sha256


def test_the_comment_says_what_was_measured(tuned: TuneResult) -> None:
    text = (tuned.folder / "tuned.yaml").read_text()
    comment = [line for line in text.splitlines() if line.startswith("#")]
    assert comment[0].startswith("# demo with weight 0.")
    assert any("16 edits each" in line for line in comment)
    assert any("Quarters of the samples choose" in line for line in comment)
    tree = yaml.safe_load(text)
    assert not Path(tree["models"]["target"]["path"]).is_absolute()


def test_the_same_inputs_give_the_same_recipe(tmp_path: Path) -> None:
    # Far too large a weight is told from others by few samples.
    options = {**OPTIONS, "inputs": Inputs(samples=8), "weights": "0,0.5,1,3"}
    one, two = (
        tune("demo", WORDS, steps=1, out=tmp_path / name, **options).folder for name in "ab"
    )
    assert (one / "tuned.yaml").read_bytes() == (two / "tuned.yaml").read_bytes()
    assert timeless(tree_of(one)) == timeless(tree_of(two))


def test_the_json_holds_what_the_result_does(tuned: TuneResult) -> None:
    tree = tree_of(tuned.folder)
    assert tuned.chosen is not None
    assert tree["decided"] is True
    assert tree["chosen"]["weight"] == tuned.chosen.weight
    assert tree["before"]["weight"] == 0.85
    assert [cell["recipe_digest"] for cell in tree["cells"]] == [
        tuned.measured[cell.index].digest for cell in tuned.cells
    ]
    assert {"score", "path", "endpoint", "residual"} <= set(tree["cells"][0]["metrics"])
    (curve,) = tree["curves"]
    assert all(p["low"] <= p["value"] <= p["high"] for p in curve["points"])
    assert all((tuned.folder / name).is_file() for c in tree["cells"] for name in c["pictures"])
    assert not (tuned.folder / "work").exists()
    with pytest.raises(dataclasses.FrozenInstanceError):
        tuned.chosen = None  # type: ignore[misc]


def test_what_is_finished_is_not_measured_again(
    tuned: TuneResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*words: Any) -> None:
        raise AssertionError("measured again")

    before = (tuned.folder / "tuned.yaml").read_bytes()
    monkeypatch.setattr(Bench, "run", refuse)
    again = tune("demo", WORDS, out=tuned.folder, resume=True, **OPTIONS)
    assert again.chosen == tuned.chosen
    assert (tuned.folder / "tuned.yaml").read_bytes() == before


def test_a_folder_that_exists_is_kept(tuned: TuneResult) -> None:
    with pytest.raises(OutputExistsError, match="exists already"):
        tune("demo", WORDS, out=tuned.folder, **OPTIONS)
    with pytest.raises(ResumeError, match="weights changed"):
        tune("demo", WORDS, out=tuned.folder, resume=True, **{**OPTIONS, "weights": "0:1:0.5"})


def test_what_cannot_be_done_leaves_an_earlier_tuning(tuned: TuneResult) -> None:
    before = tree_of(tuned.folder)
    with pytest.raises(DeviceError, match="CUDA"):
        tune("demo", WORDS, out=tuned.folder, overwrite=True, **{**OPTIONS, "device": "cuda:99"})
    assert tree_of(tuned.folder) == before
    assert (tuned.folder / "tuned.yaml").is_file()


def test_where_nothing_differs_nothing_is_chosen(tiny_sd15: Path, tmp_path: Path) -> None:
    # A delta of zero: every weight gives the target.
    recipe = tmp_path / "flat.yaml"
    models = {role: str(tiny_sd15 / role) for role in ("base", "target")}
    models["distilled"] = models["base"]
    tree = {"name": "flat", "models": models, "verify": {"resolution": 32, "steps": 1}}
    recipe.write_text(yaml.safe_dump(tree))
    words = ["tune", str(recipe), "--samples=4", "--weights=0,1,2", f"--out={tmp_path / 'out'}"]
    child = subprocess.run(
        [sys.executable, "-m", "merge", *words], capture_output=True, text=True, cwd=ROOT
    )
    said = child.stderr
    assert child.returncode == 9, said
    assert "nothing was chosen: the curve is flat" in said
    assert "warning: no edits are named: drawn pictures are edited" in said
    assert "tune.html" in said
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"images", "tune.html", "tune.json"}
    assert tree_of(tmp_path / "out")["decided"] is False


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["weight=0,1"], 3, "weight has several values, and a tuning chooses them itself"),
        (["--over", "wieght"], 3, "'wieght' is not one of weight"),
        (["--over", "groups"], 3, "groups are tuned around a weight"),
        (["--weights", "1"], 3, "no range of at least three numbers"),
        (["wieght=1"], 3, "wieght: unknown key, did you mean 'weight'"),
        (["--edits", "nowhere.yaml"], 3, "nowhere.yaml cannot be read"),
        (["--images", "."], 3, "belong together"),
        (["--budget", "1"], 2, "1 is not in the range"),
    ],
)
def test_errors_say_what_is_wrong(
    words: list[str],
    code: int,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(["tune", "demo", *words])
    said = capsys.readouterr().err
    assert stop.value.code == code, said
    assert message in said
    assert "hint:" in said
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(["tune", "demo", *WORDS, "--dry-run", "--json", "--samples", "8", "--device", "cpu"])
    assert not stop.value.code
    found = json.loads(capsys.readouterr().out)
    assert found["unet_rows"] > 0
    assert found["seconds"] > 0
    assert found["memory_bytes"] > 10_000_000
    assert list(tmp_path.iterdir()) == []


def test_a_lock_and_a_recipe_object_are_tuned_too(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="name at least one edit|nothing to edit"):
        tune(load_recipe("demo", WORDS), inputs=Inputs(edits=()), out=tmp_path / "out")
    words = [*WORDS[:2], f"models.target.path={SMALL / 'target' / 'unet'}"]
    with pytest.raises(VerificationError, match="without a pipeline, which cannot edit"):
        tune("demo", words, out=tmp_path / "out", **OPTIONS)
