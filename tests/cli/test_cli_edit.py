"""`edit` as a user meets it: one picture, a folder, several seeds, and everything that is wrong."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from merge.cli.main import main as cli_main
from merge.editor.batches import edit
from merge.editor.load import load_editor
from merge.editor.settings import EditSettings


@pytest.fixture(scope="module")
def checkpoint(tiny_sd15: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny target with an LCM scheduler, as an export has one."""
    folder = tmp_path_factory.mktemp("edit") / "model"
    shutil.copytree(tiny_sd15 / "target", folder)
    path = folder / "scheduler" / "scheduler_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "_class_name": "LCMScheduler"}))
    index = json.loads((folder / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "LCMScheduler"]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for index, name in enumerate(["b.jpg", "a.png", "c.TIF"]):
        size = (64, 48) if index else (48, 64)
        Image.effect_noise(size, 50 + 20 * index).convert("RGB").save(folder / name)
    return folder


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    checkpoint: Path,
) -> Run:
    """Run `edit CHECKPOINT ...` in an empty folder: exit code, stdout, stderr."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)

    def call(*words: object, model: Path = checkpoint) -> tuple[int, str, str]:
        # The handler would keep the stderr of the test that made it.
        monkeypatch.setattr(logging.getLogger("merge"), "handlers", [])
        # First, so that a test may give one of them again: the last one counts.
        fixed = ["--steps", "2", "--resolution", "48", "--device", "cpu"]
        with pytest.raises(SystemExit) as stop:
            cli_main(["edit", *fixed, str(model), *map(str, words)])
        captured = capsys.readouterr()
        return int(stop.value.code or 0), captured.out, captured.err

    return call


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*"))


# What is written ---------------------------------------------------------------------------------


def test_one_picture(run: Run, photos: Path, checkpoint: Path) -> None:
    code, out, err = run(photos / "a.png", "make it blue")
    assert (code, out) == (0, "a-edit.png\n"), err
    assert "64 x 48 px, 2 steps, 4 UNet rows" in err
    assert names(Path()) == ["a-edit.png"]
    editor = load_editor(checkpoint, device="cpu")
    settings = EditSettings(steps=2, resolution=48)
    expected = edit(editor, photos / "a.png", "make it blue", settings)
    with Image.open("a-edit.png") as image:
        assert np.abs(np.asarray(image).astype(int) - np.asarray(expected.to_pil())).max() <= 1
        assert image.text["instruction"] == "make it blue"
        assert json.loads(image.text["settings"]) == {
            "steps": 2,
            "guidance_scale": 2.0,
            "image_guidance_scale": 1.0,
            "seed": 0,
            "resolution": 48,
            "original_inference_steps": 50,
            "timesteps": None,
        }


def test_one_picture_to_a_place_that_is_made(run: Run, photos: Path) -> None:
    code, out, _ = run(photos / "a.png", "x", "-o", "deep/er/new.PNG", "--seed", "7", "-q")
    assert (code, out) == (0, "deep/er/new.PNG\n")
    with Image.open("deep/er/new.PNG") as image:
        assert json.loads(image.text["settings"])["seed"] == 7


def test_several_seeds_give_several_pictures(run: Run, photos: Path) -> None:
    code, out, err = run(photos / "a.png", "x", "--seed", 5, "--seed", 2, "--seed", 5)
    assert (code, out) == (0, "a-edit-5.png\na-edit-2.png\n"), err
    pictures = [Path(f"a-edit-{seed}.png").read_bytes() for seed in (5, 2)]
    assert pictures[0] != pictures[1]
    code, out, _ = run(photos / "a.png", "x", "--seed", 2)
    with Image.open("a-edit.png") as one, Image.open("a-edit-2.png") as other:
        assert one.tobytes() == other.tobytes()


def test_a_folder(run: Run, photos: Path) -> None:
    (photos / "notes.txt").write_text("no picture, and not taken for one")
    (photos / ".hidden.png").write_text("neither")
    (photos / "more").mkdir()
    code, out, err = run("--images", photos, "make it blue", "--batch-size", "2")
    assert (code, out.splitlines()[-1]) == (0, "photos-edit"), err
    assert "3 pictures, 2 steps, 12 UNet rows" in err
    assert names(Path("photos-edit")) == ["a.png", "b.png", "c.png"]
    for name, source in (("a", "a.png"), ("b", "b.jpg"), ("c", "c.TIF")):
        assert run(photos / source, "make it blue", "-o", f"{name}.png")[0] == 0
        with Image.open(f"{name}.png") as one, Image.open(f"photos-edit/{name}.png") as other:
            apart = np.asarray(one).astype(int) - np.asarray(other)
            assert np.abs(apart).max() <= 1


def test_names_that_would_clash_are_kept_whole(run: Run, photos: Path) -> None:
    Image.effect_noise((64, 48), 50).convert("RGB").save(photos / "A.bmp")
    code, out, _ = run("--images", photos, "x", "-o", "out", "--seed", 0, "--seed", 1)
    assert (code, out) == (0, "out\n")
    stems = ("A.bmp", "a.png", "b.jpg", "c.TIF")
    assert names(Path("out")) == sorted(f"{s}-{seed}.png" for s in stems for seed in (0, 1))


def test_json_lists_every_picture(run: Run, photos: Path) -> None:
    code, out, _ = run(photos / "a.png", "make it blue", "--json", "--seed", 3)
    (row,) = json.loads(out)
    assert code == 0
    assert row.pop("time_s") > 0
    assert set(row.pop("stages_s")) == {"text", "encode", "denoise", "decode"}
    assert row == {
        "image": str(photos / "a.png"),
        "instruction": "make it blue",
        "seed": 3,
        "output": "a-edit.png",
        "width": 64,
        "height": 48,
        "unet_rows": 4,
    }
    code, out, _ = run("--images", photos, "x", "--json", "--guidance-scale", "1")
    assert [row["output"] for row in json.loads(out)] == [
        *("photos-edit/a.png", "photos-edit/b.png", "photos-edit/c.png"),
    ]


def test_settings_reach_the_edit(run: Run, photos: Path) -> None:
    words = ["--timesteps", "999, 749,499,249", "--guidance-scale", "1.5"]
    words += ["--image-guidance-scale", "1.2", "--original-inference-steps", "100"]
    code, _, err = run(photos / "a.png", "x", *words, "--dtype", "float32")
    assert code == 0
    assert "4 steps, 12 UNet rows" in err
    assert "warning: image_guidance_scale other than 1 was found to cause artifacts" in err
    with Image.open("a-edit.png") as image:
        found = json.loads(image.text["settings"])
    assert found["timesteps"] == [999, 749, 499, 249]
    assert (found["guidance_scale"], found["image_guidance_scale"]) == (1.5, 1.2)
    assert (found["original_inference_steps"], found["steps"]) == (100, 4)


def test_another_scheduler_is_said_and_overridden(run: Run, photos: Path, tiny_sd15: Path) -> None:
    code, _, err = run(photos / "a.png", "x", model=tiny_sd15 / "target")
    assert code == 0
    assert "has EulerAncestralDiscreteScheduler: edits use LCMScheduler" in err


def test_a_bar_shows_steps_or_pictures(
    run: Run, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    assert re.search(r"editing: +0%.* 0/2 ", run(photos / "a.png", "x")[2])
    assert re.search(r"editing: .* [0-3]/3 ", run("--images", photos, "x")[2])
    assert "editing" not in run("--images", photos, "x", "--overwrite", "-q")[2]


# What is refused, before any work ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "Missing argument 'INSTRUCTION'"),
        (["{a}"], "an IMAGE and an INSTRUCTION are needed, and one of them is missing"),
        (["{a}", "make", "it", "blue"], "too many words (4): put the instruction in quotes"),
        (["{a}", "x", "--images", "{photos}"], "IMAGE and --images are both given: choose one"),
        (["--images", "{photos}"], "Missing argument 'INSTRUCTION'"),
        (["--images", "{photos}", "make", "it", "blue"], "too many words (3)"),
        (["{a}", ""], "the instruction is empty"),
        (["{a}", " \t"], "the instruction is empty"),
        (["{a}", "x", "--steps", "0"], "'--steps': 0 is not in the range"),
        (["{a}", "x", "--steps", "51"], "'--steps': 51 is more than --original-inference-steps"),
        (["{a}", "x", "--guidance-scale", "nan"], "nan is not a finite number of at least 0"),
        (["{a}", "x", "--guidance-scale", "inf"], "inf is not a finite number"),
        (["{a}", "x", "--guidance-scale", "-1"], "-1.0 is not a finite number of at least 0"),
        (["{a}", "x", "--image-guidance-scale", "nan"], "'--image-guidance-scale': nan"),
        (["{a}", "x", "--image-guidance-scale", "-0.5"], "'--image-guidance-scale': -0.5"),
        (["{a}", "x", "--seed", "-1"], "'--seed': -1 is not in the range"),
        (["{a}", "x", "--timesteps", "1,2"], "'--timesteps': must fall strictly"),
        (["{a}", "x", "--timesteps", "one"], "'--timesteps': must be integers"),
        (["{a}", "x", "--batch-size", "0"], "'--batch-size': 0 is not in the range"),
        (["{a}", "x", "-o", "out.jpg"], "'-o': out.jpg must end in .png"),
        (["{a}", "x", "--dtype", "int8"], "'int8' is not one of"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_wrong_usage_is_code_2(run: Run, photos: Path, words: list[str], message: str) -> None:
    code, out, err = run(*(w.format(a=photos / "a.png", photos=photos) for w in words))
    assert (code, out) == (2, ""), err
    assert message in err
    assert err.rstrip().splitlines()[-1].startswith("hint: ")
    assert names(Path()) == []


def test_existing_outputs_are_kept(run: Run, photos: Path) -> None:
    Path("a-edit.png").write_text("mine")
    code, out, err = run(photos / "a.png", "x")
    assert (code, out) == (8, "")
    assert "a-edit.png exists already" in err
    assert "hint: add --overwrite" in err
    assert Path("a-edit.png").read_text() == "mine"
    assert run(photos / "a.png", "x", "--overwrite")[0] == 0
    with Image.open("a-edit.png") as image:
        assert image.size == (64, 48)
    Path("photos-edit").mkdir()
    for name in ("b.png", "c.png"):
        (Path("photos-edit") / name).write_text("mine")
    code, _, err = run("--images", photos, "x")
    assert code == 8
    assert "photos-edit/b.png, photos-edit/c.png exist already" in err
    assert names(Path("photos-edit")) == ["b.png", "c.png"]
    assert run("--images", photos, "x", "--overwrite")[0] == 0


def test_an_input_is_never_replaced(run: Run, photos: Path) -> None:
    before = {path.name: path.read_bytes() for path in photos.iterdir()}
    code, _, err = run(photos / "a.png", "x", "-o", photos / "a.png", "--overwrite")
    assert code == 8
    assert "would be replaced by an edit of itself" in err
    code, _, err = run("--images", photos, "x", "-o", photos, "--overwrite")
    assert code == 8
    assert {path.name: path.read_bytes() for path in photos.iterdir()} == before


def test_outputs_of_the_wrong_kind(run: Run, photos: Path) -> None:
    Path("folder.png").mkdir()
    code, _, err = run(photos / "a.png", "x", "-o", "folder.png", "--overwrite")
    assert code == 8
    assert "folder.png is a folder" in err
    Path("file").write_text("mine")
    code, _, err = run("--images", photos, "x", "-o", "file", "--overwrite")
    assert code == 8
    assert "file is a file" in err
    code, _, err = run(photos / "a.png", "x", "-o", "file/a.png")
    assert code == 8
    assert Path("file").read_text() == "mine"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nothing.png", "x"], "there is no picture nothing.png"),
        (["text.png", "x"], "text.png is no picture that can be read"),
        (["thin.png", "x"], "4000 x 5 is too narrow to edit"),
        (["--images", "nothing", "x"], "there is no folder nothing"),
        (["--images", "empty", "x"], "there is no picture in empty"),
        (["--images", "bad", "x"], "2 of 2 pictures could not be edited: bad/one.jpg, bad/two.png"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bad_pictures_are_code_4(run: Run, words: list[str], message: str) -> None:
    Path("text.png").write_text("no picture")
    Image.new("RGB", (4000, 5)).save("thin.png")
    for name in ("empty", "bad"):
        Path(name).mkdir()
    Path("empty/notes.txt").write_text("")
    for name in ("one.jpg", "two.png"):
        Path("bad", name).write_text("")
    before = names(Path())
    code, out, err = run(*words)
    assert (code, out) == (4, ""), err
    assert message in err
    assert "Traceback" not in err
    assert err.rstrip().splitlines()[-1].startswith("hint: ")
    assert names(Path()) == before


def test_a_bad_file_in_a_folder_is_named_and_the_others_are_edited(run: Run, photos: Path) -> None:
    (photos / "bad.png").write_text("no picture")
    Image.new("RGB", (4000, 5)).save(photos / "thin.png")
    code, out, err = run("--images", photos, "x", "--batch-size", 4, "--seed", 0, "--seed", 1)
    assert (code, out) == (4, "photos-edit\n")
    assert err.count("warning: left out: ") == 2
    assert f"warning: left out: {photos / 'bad.png'} is no picture" in err
    assert f"warning: left out: {photos / 'thin.png'}: a picture of 4000 x 5" in err
    assert "error: 2 of 5 pictures could not be edited: " in err
    assert names(Path("photos-edit")) == sorted(f"{n}-{s}.png" for n in "abc" for s in (0, 1))
    code, out, _ = run("--images", photos, "x", "--json", "-q", "-o", "other")
    assert code == 4
    assert len(json.loads(out)) == 3


def break_vae(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors["decoder.conv_out.bias"].fill_(float("nan"))
    save_file(tensors, path, {"format": "pt"})


def test_a_picture_that_is_not_finite_is_not_written(
    run: Run, photos: Path, checkpoint: Path, tmp_path: Path
) -> None:
    broken = Path(shutil.copytree(checkpoint, tmp_path / "broken"))
    break_vae(broken)
    code, out, err = run(photos / "a.png", "x", model=broken)
    assert (code, out) == (9, "")
    assert "9216 values that are not finite" in err
    assert "hint: try --dtype float32" in err
    code, out, err = run("--images", photos, "x", model=broken)
    assert (code, out) == (9, "")
    assert "3 of 3 pictures could not be edited" in err
    assert names(Path()) == []


def test_checkpoints_that_cannot_edit(run: Run, photos: Path, tiny_sd15: Path) -> None:
    code, _, err = run(photos / "a.png", "x", model=Path("nothing"))
    assert code == 4
    assert "nothing is no pipeline folder" in err
    model = Path(shutil.copytree(tiny_sd15 / "target", "plain"))
    shutil.rmtree(model / "unet")
    shutil.copytree(tiny_sd15 / "base", model / "unet")
    code, _, err = run(photos / "a.png", "x", model=model)
    assert code == 5
    assert "its UNet has 4 input channels, not 8" in err
    assert not Path("a-edit.png").exists()


def test_ctrl_c_leaves_whole_pictures_only(photos: Path, checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "merge", "edit", str(checkpoint), "--images", str(photos)]
    command += ["x", "-o", str(out), "--resolution", "48", "--device", "cpu"]
    for seed in range(300):
        command += ["--seed", str(seed)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    child = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    while not any(out.glob("*.png")) and child.poll() is None:
        time.sleep(0.01)
    child.send_signal(signal.SIGINT)
    stdout, stderr = child.communicate(timeout=60)
    assert child.returncode == 130, stderr
    assert stdout == ""
    written = list(out.iterdir())
    assert 0 < len(written) < 900
    for path in written:
        assert not path.name.startswith(".")
        with Image.open(path) as image:
            image.load()
