"""Locks: what they hold, what they refuse, and runs that are repeated from them."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from merge import load_lock, load_recipe, reproduce, run_recipe, verify_files
from merge.errors import (
    CheckpointError,
    IntegrityError,
    RecipeError,
    SourceNotFoundError,
    VerificationError,
)
from merge.records.lock.find import load_recipe_or_lock, lock_for, lock_path_of, open_lock
from tests.mini import random_tensors, write_models, write_recipe, write_unet

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
SET = [WEIGHTS, "unet/config.json", "recipe.lock.yaml", "merge_manifest.json"]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with models and a recipe, away from the current folder."""
    folder = tmp_path / "place"
    write_models(folder)
    write_recipe(folder)
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    return folder


def run(recipe: Path, out: Path, *overrides: str, **options: Any) -> Path:
    return run_recipe(load_recipe(recipe, overrides), out, verify=False, **options).folder


def run_lock(path: Path, out: Path, *overrides: str) -> Path:
    recipe, lock = load_recipe_or_lock(path, overrides)
    assert lock is not None
    return run_recipe(recipe, out, verify=False, lock=lock).folder


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in [*SET, "provenance.intoto.json"]}


def edit_lock(path: Path, change: Any) -> None:
    tree = yaml.safe_load(path.read_text())
    change(tree)
    path.write_text(yaml.safe_dump(tree, sort_keys=False))


# What a lock is ----------------------------------------------------------------------------------


def test_a_lock_names_every_file_and_no_place(place: Path, tmp_path: Path) -> None:
    out = run(place / "mini.yaml", tmp_path / "out", "weight=0.25")
    text = (out / "recipe.lock.yaml").read_text()
    lock = yaml.safe_load(text)
    assert str(tmp_path) not in text
    assert lock["lock_version"] == 1
    assert lock["recipe"]["weight"] == 0.25
    assert lock["recipe"]["models"]["target"]["path"] == "target"
    for role in ("target", "base", "distilled"):
        names = {"config.json", "diffusion_pytorch_model.safetensors"}
        assert lock["models"][role]["files"].keys() == names
        for name, record in lock["models"][role]["files"].items():
            assert record["size"] == (place / role / name).stat().st_size


def test_the_lock_of_a_lock_run_is_the_same_bytes(place: Path, tmp_path: Path) -> None:
    first = run(place / "mini.yaml", tmp_path / "first", "params={}", "exclude=[conv_out.*]")
    lock = shutil.copy(first / "recipe.lock.yaml", place / "any.lock.yaml")
    second = run_lock(Path(lock), tmp_path / "second")
    assert contents(second) == contents(first)


def test_a_lock_is_known_by_its_first_line_too(place: Path, tmp_path: Path) -> None:
    first = run(place / "mini.yaml", tmp_path / "first")
    lock = shutil.copy(first / "recipe.lock.yaml", place / "pinned.yaml")
    assert contents(run_lock(Path(lock), tmp_path / "second")) == contents(first)


@pytest.mark.parametrize("word", ["weight=0.5", "models.target=./other", "out_dtype=float32"])
def test_a_lock_takes_no_override_that_changes_the_result(
    place: Path, tmp_path: Path, word: str
) -> None:
    out = run(place / "mini.yaml", tmp_path / "out")
    with pytest.raises(RecipeError, match=f"runs as it is: {word.partition('=')[0]} cannot be set"):
        load_lock(out / "recipe.lock.yaml", [word])


def test_an_override_says_where_a_local_model_is(place: Path, tmp_path: Path) -> None:
    out = run(place / "mini.yaml", tmp_path / "out")
    lock = Path(shutil.copy(out / "recipe.lock.yaml", tmp_path / "cwd" / "my.lock.yaml"))
    with pytest.raises(SourceNotFoundError, match=r"models\.base: there is no file or folder"):
        run_lock(lock, tmp_path / "second")
    words = [f"models.{role}.path={place / role}" for role in ("base", "distilled", "target")]
    assert contents(run_lock(lock, tmp_path / "second", *words)) == contents(out)


@pytest.mark.parametrize("where", ["beside the lock", "current folder", "recipe of the name"])
def test_local_models_are_looked_for(place: Path, tmp_path: Path, where: str) -> None:
    out = run(place / "mini.yaml", tmp_path / "out")
    folder = tmp_path / "moved"
    folder.mkdir()
    lock = Path(shutil.copy(out / "recipe.lock.yaml", folder / "my.lock.yaml"))
    if where == "recipe of the name":
        tree = yaml.safe_load((place / "mini.yaml").read_text())
        tree["models"] = {role: str(place / role) for role in tree["models"]}
        (folder / "whatever.yaml").write_text(yaml.safe_dump(tree))
    else:
        goal = folder if where == "beside the lock" else Path.cwd()
        for role in ("base", "distilled", "target"):
            shutil.copytree(place / role, goal / role)
    assert contents(run_lock(lock, tmp_path / "second")) == contents(out)


# What differs is refused -------------------------------------------------------------------------


def test_another_digest_is_refused_and_nothing_is_written(place: Path, tmp_path: Path) -> None:
    out = run(place / "mini.yaml", tmp_path / "out")
    lock = Path(shutil.copy(out / "recipe.lock.yaml", place / "my.lock.yaml"))
    write_unet(place / "distilled", random_tensors(9))
    with pytest.raises(IntegrityError, match=r"diffusion_pytorch_model.safetensors has SHA-256"):
        run_lock(lock, tmp_path / "second")
    assert not list(tmp_path.glob("second*"))


def test_a_config_that_changed_is_refused(place: Path, tmp_path: Path) -> None:
    out = run(place / "mini.yaml", tmp_path / "out")
    lock = Path(shutil.copy(out / "recipe.lock.yaml", place / "my.lock.yaml"))
    config = place / "target" / "config.json"
    config.write_text(config.read_text().replace("8", "9"))
    with pytest.raises(IntegrityError, match=r"config.json has SHA-256"):
        run_lock(lock, tmp_path / "second")


def test_other_sizes_and_names_are_all_told(place: Path, tmp_path: Path) -> None:
    out = run(place / "mini.yaml", tmp_path / "out")
    lock = Path(shutil.copy(out / "recipe.lock.yaml", place / "my.lock.yaml"))
    (place / "base" / "config.json").write_text("{}")
    (place / "target" / "config.json").unlink()
    with pytest.raises(IntegrityError, match="the models are not those of my.lock.yaml") as caught:
        run_lock(lock, tmp_path / "second")
    assert "target: config.json is missing" in caught.value.message
    assert "base: config.json has 2 bytes, not " in caught.value.message


def test_another_version_of_the_tool_is_refused(place: Path, tmp_path: Path) -> None:
    out = run(place / "mini.yaml", tmp_path / "out")
    lock = Path(shutil.copy(out / "recipe.lock.yaml", place / "my.lock.yaml"))
    edit_lock(lock, lambda tree: tree.update(tool_version="0.0.1"))
    with pytest.raises(RecipeError, match=r"written by instruct-merge 0\.0\.1") as caught:
        run_lock(lock, tmp_path / "second")
    assert "pip install instruct-merge==0.0.1" in caught.value.hint


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tree: tree.pop("models"), "it has no models"),
        (lambda tree: tree.pop("recipe"), "it holds no recipe"),
        (lambda tree: tree.update(lock_version=2), "lock_version is 2, not 1"),
        (lambda tree: tree["models"].pop("base"), "different roles"),
        (lambda tree: tree["models"]["base"].update(files={}), r"models\.base has no files"),
        (lambda tree: tree["models"]["base"].update(commit="a" * 40), "a commit goes with"),
        (
            lambda tree: tree["models"]["base"]["files"]["config.json"].update(sha256="abc"),
            "config.json has no size and SHA-256",
        ),
        (lambda tree: tree["recipe"].update(wieght=1), "unknown key"),
    ],
)
def test_what_is_no_lock_is_told(place: Path, tmp_path: Path, change: Any, message: str) -> None:
    out = run(place / "mini.yaml", tmp_path / "out")
    path = out / "recipe.lock.yaml"
    edit_lock(path, change)
    with pytest.raises(RecipeError, match=message):
        load_lock(path)


def test_a_lock_that_is_no_yaml_is_told(tmp_path: Path) -> None:
    path = tmp_path / "x.lock.yaml"
    path.write_text("{")
    with pytest.raises(RecipeError, match=r"x\.lock\.yaml is no lock that can be run"):
        load_lock(path)


# --locked and --write-lock ------------------------------------------------------------------------


def test_a_recipe_is_held_to_its_own_lock(place: Path, tmp_path: Path) -> None:
    recipe = place / "mini.yaml"
    path = lock_path_of(recipe, "mini")
    assert path == place / "mini.lock.yaml"
    with pytest.raises(RecipeError, match=r"there is no mini\.lock\.yaml"):
        lock_for(load_recipe(recipe), path)
    first = run(recipe, tmp_path / "first", write_lock=path)
    loaded, lock = lock_for(load_recipe(recipe), path)
    second = run_recipe(loaded, tmp_path / "second", verify=False, lock=lock).folder
    assert contents(second) == contents(first)
    write_unet(place / "distilled", random_tensors(9))
    with pytest.raises(IntegrityError, match="has SHA-256"):
        run_recipe(loaded, tmp_path / "third", verify=False, lock=lock)


def test_every_change_of_a_locked_recipe_is_told(place: Path, tmp_path: Path) -> None:
    recipe = place / "mini.yaml"
    path = lock_path_of(recipe, "mini")
    run(recipe, tmp_path / "first", write_lock=path)
    words = ["weight=0.5", "exclude=[conv_out.*]", "models.distilled.weight=2", "verify.steps=8"]
    with pytest.raises(RecipeError, match="not the one that mini.lock.yaml was made of") as caught:
        lock_for(load_recipe(recipe, words), path)
    assert caught.value.problems == (
        "exclude is None, and [] in the lock",
        "exclude[0] is 'conv_out.*', and None in the lock",
        "models.distilled[0].weight is 2.0, and 1.0 in the lock",
        "verify.steps is 8, and 4 in the lock",
        "weight is 0.5, and 1.0 in the lock",
    )
    # Where the output goes and where the models lie is no part of the recipe.
    lock_for(load_recipe(recipe, [f"output.folder={tmp_path / 'x'}"]), path)
    shutil.copytree(place, tmp_path / "moved")
    lock_for(load_recipe(tmp_path / "moved" / "mini.yaml"), path)


def test_the_lock_of_a_bundled_recipe_is_in_the_current_folder(place: Path) -> None:
    assert lock_path_of("sdxl-turbo", "sdxl-turbo") == Path.cwd() / "sdxl-turbo.lock.yaml"


def test_the_command_line_locks_runs_and_reproduces(place: Path, tmp_path: Path) -> None:
    def command(*words: object) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, "-W", "error", "-m", "merge", *map(str, words)]
        return subprocess.run(line, capture_output=True, text=True, timeout=120)

    recipe, lock = place / "mini.yaml", place / "mini.lock.yaml"
    missing = command("run", recipe, "--locked", "--out", tmp_path / "a", "--no-verify")
    assert (missing.returncode, "mini.lock.yaml" in missing.stderr) == (3, True)
    both = command("run", recipe, "--locked", "--write-lock")
    assert (both.returncode, "give one of them" in both.stderr) == (2, True)
    words = ["--no-verify", "-q"]
    assert command("run", recipe, "--write-lock", "--out", tmp_path / "a", *words).returncode == 0
    assert command("run", recipe, "--locked", "--out", tmp_path / "b", *words).returncode == 0
    assert command("run", lock, "--out", tmp_path / "c", *words).returncode == 0
    assert contents(tmp_path / "a") == contents(tmp_path / "b") == contents(tmp_path / "c")
    assert command("validate", lock).stdout == f"{lock}: ok (mini)\n"
    plan = command("plan", lock, "--json")
    assert json.loads(plan.stdout)["counts"]["delta"] > 0
    again = command("reproduce", tmp_path / "a", "--json")
    assert again.returncode == 0, again.stderr
    tree = json.loads(again.stdout)
    manifest = json.loads((tmp_path / "a" / "merge_manifest.json").read_text())
    assert tree["files"] == {name: r["sha256"] for name, r in manifest["files"].items()}
    write_unet(place / "distilled", random_tensors(9))
    other = command("reproduce", tmp_path / "a", "--out", tmp_path / "d")
    assert other.returncode == 4
    assert not (tmp_path / "d").exists()


# Repeating ---------------------------------------------------------------------------------------


def test_an_output_is_repeated_to_the_same_bytes(place: Path, tmp_path: Path) -> None:
    out = run(place / "mini.yaml", tmp_path / "out")
    found = reproduce(out)
    manifest = json.loads((out / "merge_manifest.json").read_text())
    assert found.recipe_digest == manifest["recipe_digest"]
    assert found.sha256.keys() == manifest["files"].keys()
    assert found.out is None
    assert not list(Path.cwd().iterdir())
    kept = reproduce(out, tmp_path / "kept", threads=1)
    assert kept.out == tmp_path / "kept"
    assert contents(tmp_path / "kept") == contents(out)


def test_a_folder_whose_weights_were_changed_is_not_reproduced_by_its_manifest(
    place: Path, tmp_path: Path
) -> None:
    out = run(place / "mini.yaml", tmp_path / "out")
    # A consistent forgery: weights, manifest and provenance agree with each other.
    other = run(place / "mini.yaml", tmp_path / "other", "weight=0.75")
    for name in (WEIGHTS, "merge_manifest.json"):
        shutil.copy(other / name, out / name)
    manifest = json.loads((out / "merge_manifest.json").read_text())
    record = json.loads((tmp_path / "other" / "merge_manifest.json").read_text())["files"]
    lock = (out / "recipe.lock.yaml").read_bytes()
    manifest["files"]["recipe.lock.yaml"] = {"size": len(lock), "sha256": sha256(lock)}
    assert record[WEIGHTS] == manifest["files"][WEIGHTS]
    from merge.json_files import json_bytes
    from merge.records.provenance import build_provenance

    data = json_bytes(manifest)
    (out / "merge_manifest.json").write_bytes(data)
    (out / "provenance.intoto.json").write_bytes(build_provenance(data, lock))
    assert verify_files(out) == len(manifest["files"])
    with pytest.raises(VerificationError, match="is not reproduced") as caught:
        reproduce(out)
    assert f"  {WEIGHTS} has SHA-256 " in caught.value.message
    assert caught.value.exit_code == 9


def sha256(data: bytes) -> str:
    import hashlib

    return hashlib.sha256(data).hexdigest()


def test_records_that_disagree_are_not_run(place: Path, tmp_path: Path) -> None:
    out = run(place / "mini.yaml", tmp_path / "out")
    edit_lock(out / "recipe.lock.yaml", lambda tree: tree["recipe"].update(weight=0.5))
    with pytest.raises(VerificationError, match=r"recipe\.lock\.yaml has SHA-256"):
        reproduce(out)


def test_what_is_no_output_cannot_be_reproduced(tmp_path: Path) -> None:
    with pytest.raises(SourceNotFoundError, match="has no merge_manifest.json"):
        reproduce(tmp_path)


def test_inputs_that_changed_are_told(place: Path, tmp_path: Path) -> None:
    out = run(place / "mini.yaml", tmp_path / "out")
    write_unet(place / "base", random_tensors(9))
    with pytest.raises(IntegrityError, match="has SHA-256"):
        reproduce(out)
    assert not list(Path.cwd().iterdir())


def test_run_json_tells_no_home_folder(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = run(place / "mini.yaml", tmp_path / "out")
    inputs = json.loads((out / "run.json").read_text())["inputs"]
    assert inputs == {role: f"../place/{role}" for role in ("target", "base", "distilled")}
    monkeypatch.setenv("HOME", str(tmp_path / "place"))
    hidden = run(place / "mini.yaml", tmp_path / "hidden")
    assert json.loads((hidden / "run.json").read_text())["inputs"] == {}
    # It is found without that: the lock's recipe has the models beside it.
    lock = open_lock(Path(shutil.copy(hidden / "recipe.lock.yaml", place / "x.lock.yaml")))
    assert lock.recipe.models.target.path == str(place / "target")


# A flipped bit ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*SET, "provenance.intoto.json"])
def test_any_flipped_bit_is_found_and_its_file_named(
    place: Path, tmp_path: Path, name: str
) -> None:
    out = run(place / "mini.yaml", tmp_path / "out")
    assert verify_files(out) == 3
    path = out / name
    whole = path.read_bytes()
    randomness = random.Random(name)
    for _ in range(40):
        bit = randomness.randrange(len(whole) * 8)
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        with pytest.raises((VerificationError, CheckpointError), match=name.replace(".", r"\.")):
            verify_files(out)
    path.write_bytes(whole)
    assert verify_files(out) == 3
