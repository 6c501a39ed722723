"""Whole runs on complete tiny pipelines, judged by diffusers and peft in their own right."""

from __future__ import annotations

import hashlib
import json
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from merge import load_recipe, run_recipe, verify_files, verify_folder
from merge.editor.batches import edit
from merge.editor.load import load_editor
from merge.editor.pictures import load_image, resize_image
from merge.editor.settings import EditSettings
from merge.errors import (
    CheckpointError,
    ImageError,
    IntegrityError,
    SourceNotFoundError,
    VerificationError,
)
from merge.verify.drawings import default_picture
from tests.mini import numpy_float32

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


def write_tiny_recipe(folder: Path, models: Path, *, lora: str = "", **changes: object) -> Path:
    tree: dict[str, object] = {
        "name": "tiny",
        "models": {
            "base": None if lora else str(models / "base"),
            "distilled": str(models / (lora or "distilled")),
            "target": str(models / "target"),
        },
        "verify": {"resolution": 64},
        **changes,
    }
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.fixture(scope="session")
def exported(tiny_sd15: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One export of the SD1.5 models, verified by the closing edit."""
    folder = tmp_path_factory.mktemp("exported")
    recipe = load_recipe(write_tiny_recipe(folder, tiny_sd15))
    result = run_recipe(recipe, folder / "out", device="cpu")
    assert result.verified is True
    return result.folder


@pytest.fixture(scope="session")
def exported_xl(tiny_sdxl: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported_xl")
    recipe = load_recipe(write_tiny_recipe(folder, tiny_sdxl, weight=0.5))
    return run_recipe(recipe, folder / "out", device="cpu").folder


# The export ------------------------------------------------------------------------------------

PLAIN_EDIT = """
import sys
import torch
from PIL import Image
from diffusers import {name}

assert not any(name.split(".")[0] == "merge" for name in sys.modules)
pipeline = {name}.from_pretrained({folder!r}, dtype=torch.float32{extra})
picture = Image.effect_noise((64, 64), 80).convert("RGB")
result = pipeline(
    "make it blue",
    image=picture,
    num_inference_steps=4,
    guidance_scale=2.0,
    image_guidance_scale=1.0,
    generator=torch.Generator("cpu").manual_seed(0),
    output_type="np",{size}
).images[0]
assert type(pipeline.scheduler).__name__ == "LCMScheduler"
assert pipeline.scheduler.timesteps.tolist() == [999, 759, 499, 259]
assert result.shape == (64, 64, 3) and result.std() > 0.01, result.std()
print("edited")
"""


@pytest.mark.parametrize("xl", [False, True], ids=["sd15", "sdxl"])
def test_plain_diffusers_edits_with_the_export(
    request: pytest.FixtureRequest, tmp_path: Path, xl: bool
) -> None:
    folder = request.getfixturevalue("exported_xl" if xl else "exported")
    infix = "XL" if xl else ""
    code = PLAIN_EDIT.format(
        name=f"StableDiffusion{infix}InstructPix2PixPipeline",
        folder=str(folder),
        extra="" if xl else ", safety_checker=None",
        size=" height=64, width=64," if xl else "",
    )
    # Away from the repository, so that no `merge` is importable by accident.
    child = subprocess.run(
        [sys.executable, "-I", "-c", code], capture_output=True, text=True, cwd=tmp_path
    )
    assert child.stdout == "edited\n", child.stderr


def test_other_components_are_copied_byte_for_byte(exported: Path, tiny_sd15: Path) -> None:
    target = tiny_sd15 / "target"
    ours = {"unet", "scheduler", "model_index.json"}
    copied = [
        path.relative_to(target)
        for path in target.rglob("*")
        if path.is_file() and path.relative_to(target).parts[0] not in ours
    ]
    assert len(copied) > 10
    for name in copied:
        assert (exported / name).read_bytes() == (target / name).read_bytes(), name


def test_configs_say_what_the_export_is(exported: Path, tiny_sd15: Path) -> None:
    index = json.loads((exported / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionInstructPix2PixPipeline"
    assert index["scheduler"] == ["diffusers", "LCMScheduler"]
    source = json.loads((tiny_sd15 / "target" / "model_index.json").read_text())
    assert index["_diffusers_version"] == source["_diffusers_version"]
    scheduler = json.loads((exported / "scheduler" / "scheduler_config.json").read_text())
    assert scheduler["_class_name"] == "LCMScheduler"
    assert scheduler["prediction_type"] == "epsilon"
    assert (scheduler["beta_start"], scheduler["beta_end"]) == (0.00085, 0.012)
    assert json.loads((exported / "unet" / "config.json").read_text())["in_channels"] == 8


def test_the_manifest_has_every_file_and_its_hash(exported: Path) -> None:
    manifest = json.loads((exported / "merge_manifest.json").read_text())
    outside = ("README.md", "merge_manifest.json", "provenance.", "run.json", "report.", "images/")
    names = {
        path.relative_to(exported).as_posix() for path in exported.rglob("*") if path.is_file()
    }
    assert set(manifest["files"]) == {n for n in names if not n.startswith(outside)}
    for name, record in manifest["files"].items():
        data = (exported / name).read_bytes()
        assert record == {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    assert manifest["counts"] == {"delta": 685, "lora": 0, "copy": 1, "cast": 0, "bake": 0}
    assert verify_files(exported) == len(manifest["files"])


def test_the_reproducible_set_does_not_depend_on_where_things_lie(
    exported: Path, tiny_sd15: Path, tmp_path: Path
) -> None:
    moved = tmp_path / "elsewhere" / "models"
    shutil.copytree(tiny_sd15, moved)
    recipe = load_recipe(write_tiny_recipe(tmp_path, moved))
    out = tmp_path / "another name"
    run_recipe(recipe, out, device="cpu", threads=3, verify=False)
    for name in ["merge_manifest.json", "recipe.lock.yaml", WEIGHTS, "model_index.json"]:
        assert (out / name).read_bytes() == (exported / name).read_bytes(), name
        assert str(tmp_path).encode() not in (out / name).read_bytes()


def test_the_weights_carry_their_origin(exported: Path) -> None:
    from safetensors import safe_open

    manifest = json.loads((exported / "merge_manifest.json").read_text())
    with safe_open(exported / WEIGHTS, "pt") as file:
        metadata = file.metadata()
    assert metadata == {
        "format": "pt",
        "instruct_merge.recipe_digest": manifest["recipe_digest"],
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "stable-diffusion-v1-edit",
        "modelspec.implementation": "diffusers",
        "modelspec.title": "tiny",
        "modelspec.resolution": "64x64",
        "modelspec.prediction_type": "epsilon",
        "modelspec.merged_from": "target,base,distilled",
    }


def test_modes_follow_the_umask(tiny_sd15: Path, tmp_path: Path) -> None:
    path = write_tiny_recipe(tmp_path, tiny_sd15)
    command = [sys.executable, "-m", "merge", "run", str(path), "--no-verify", "-q"]
    subprocess.run([*command, "--out", str(tmp_path / "out")], check=True, umask=0o027)
    modes = {stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert modes == {0o640}
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o750


def test_shards_variants_and_single_files_give_the_same_weights(
    exported: Path, tiny_sd15: Path, tmp_path: Path
) -> None:
    from diffusers import UNet2DConditionModel

    base = UNet2DConditionModel.from_pretrained(tiny_sd15 / "base", dtype=torch.float16)
    base.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    base.save_pretrained(tmp_path / "variant", variant="fp16")
    single = tmp_path / "single.safetensors"
    shutil.copyfile(tiny_sd15 / "base" / Path(WEIGHTS).name, single)
    expected = load_file(exported / WEIGHTS)
    for index, path in enumerate((tmp_path / "shards", tmp_path / "variant", single)):
        recipe = load_recipe(write_tiny_recipe(tmp_path, tiny_sd15), [f"models.base={path}"])
        out = tmp_path / f"out-{index}"
        run_recipe(recipe, out, device="cpu", verify=False)
        merged = load_file(out / WEIGHTS)
        assert all(torch.equal(merged[key], expected[key]) for key in expected)


def test_a_wrong_sha256_in_the_recipe_is_refused(tiny_sd15: Path, tmp_path: Path) -> None:
    path = write_tiny_recipe(tmp_path, tiny_sd15)
    word = f"models.base.sha256[diffusion_pytorch_model.safetensors]={'0' * 64}"
    with pytest.raises(IntegrityError, match="has SHA-256 .* is expected"):
        run_recipe(load_recipe(path, [word]), tmp_path / "out", verify=False)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob("out.partial-*"))


def test_a_unet_target_gives_a_unet_folder(
    tiny_sd15: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from diffusers import UNet2DConditionModel

    path = write_tiny_recipe(tmp_path, tiny_sd15)
    overrides = [f"models.target={tiny_sd15 / 'target' / 'unet'}"]
    result = run_recipe(load_recipe(path, overrides), tmp_path / "out")
    assert result.verified is None
    assert not (tmp_path / "out" / "model_index.json").exists()
    unet = UNet2DConditionModel.from_pretrained(
        tmp_path / "out", subfolder="unet", dtype=torch.float16
    )
    assert unet.config.in_channels == 8


# LoRA against peft -----------------------------------------------------------------------------


@pytest.mark.parametrize("lora", ["lora_kohya.safetensors", "lora_peft.safetensors"])
def test_lora_agrees_with_peft(tiny_sd15: Path, tmp_path: Path, lora: str) -> None:
    from diffusers import LCMScheduler, StableDiffusionInstructPix2PixPipeline

    path = write_tiny_recipe(tmp_path, tiny_sd15, lora=lora, weight=0.75, out_dtype="float32")
    run_recipe(load_recipe(path), tmp_path / "out", verify=False)
    merged = load_file(tmp_path / "out" / WEIGHTS)
    scheduler = LCMScheduler.from_config(
        LCMScheduler.load_config(tiny_sd15 / "target", subfolder="scheduler")
    )
    pipeline = StableDiffusionInstructPix2PixPipeline.from_pretrained(
        tiny_sd15 / "target", dtype=torch.float32, safety_checker=None, scheduler=scheduler
    )
    pipeline.load_lora_weights(str(tiny_sd15 / lora))
    pipeline.fuse_lora(components=["unet"], lora_scale=0.75)
    pipeline.unload_lora_weights()
    fused = pipeline.unet.state_dict()
    target = load_file(tiny_sd15 / "target" / WEIGHTS)
    assert fused.keys() == merged.keys()
    changed = 0
    for key, tensor in fused.items():
        np.testing.assert_allclose(merged[key].numpy(), tensor.numpy(), rtol=2e-6, atol=1e-7)
        changed += not np.array_equal(merged[key].numpy(), numpy_float32(target[key]))
    assert changed == 278


# Editing ---------------------------------------------------------------------------------------


def test_the_report_of_the_closing_edit(exported: Path) -> None:
    report = json.loads((exported / "report.json").read_text())
    assert report["passed"] is True
    # Of random weights: nothing fails, and what it paints looks like noise.
    failed = {check["name"] for check in report["checks"] if not check["passed"]}
    assert failed == {"noise_left", "noise_left_by_target"}
    assert len(report["warnings"]) == 2
    assert [edit["image"] for edit in report["edits"]] == ["house", "boat", "apple"]
    edit = report["edits"][0]
    assert set(edit) >= {
        *("image", "instruction", "seed", "settings", "unet_rows", "time_s", "files"),
    }
    assert edit["unet_rows"] == 8
    for name in edit["files"]:
        with Image.open(exported / name) as image:
            assert image.size == (64, 64)
    with Image.open(exported / edit["files"][1]) as image:
        assert json.loads(image.text["settings"])["steps"] == 4


def test_the_edits_of_the_recipe_are_run(tiny_sd15: Path, tmp_path: Path) -> None:
    Image.effect_noise((90, 60), 90).convert("RGB").save(tmp_path / "noise.png")
    edits = [
        {"image": "./noise.png", "instruction": "make it red: now", "seed": 5},
        {"image": "./noise.png", "instruction": "make it blue"},
    ]
    verify = {"resolution": 64, "edits": edits, "seeds": [1, 2], "steps": 2}
    path = write_tiny_recipe(tmp_path, tiny_sd15, verify=verify)
    run_recipe(load_recipe(path), tmp_path / "out", device="cpu")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [(e["instruction"], e["seed"]) for e in report["edits"]] == [
        ("make it red: now", 5),
        ("make it blue", 1),
        ("make it blue", 2),
    ]
    assert {e["image"] for e in report["edits"]} == {"noise.png"}
    assert report["edits"][0]["unet_rows"] == 4


def break_vae(folder: Path, value: float) -> None:
    """Make every picture non-finite or constant."""
    from safetensors.torch import save_file

    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors["decoder.conv_out.weight"].fill_(0)
    tensors["decoder.conv_out.bias"].fill_(value)
    save_file(tensors, path, {"format": "pt"})


@pytest.mark.parametrize(
    ("value", "check"),
    [
        (float("nan"), "picture_finite of edit 0 is 12288 and must be at most 0"),
        pytest.param(
            0.0, "not_constant of edit 0 is 0 and must be at least 0.01", marks=pytest.mark.slow
        ),
    ],
)
def test_a_broken_picture_fails_the_run_and_keeps_the_folder(
    tiny_sd15: Path, tmp_path: Path, value: float, check: str
) -> None:
    models = Path(shutil.copytree(tiny_sd15, tmp_path / "models"))
    break_vae(models / "target", value)
    path = write_tiny_recipe(tmp_path, models)
    command = [sys.executable, "-m", "merge", "run", str(path), "--out", str(tmp_path / "out")]
    child = subprocess.run(command, capture_output=True, text=True)
    assert child.returncode == 9, child.stderr
    assert check in child.stderr
    assert child.stderr.rstrip().splitlines()[-1].startswith("hint: ")
    assert child.stdout == ""
    assert json.loads((tmp_path / "out" / "report.json").read_text())["passed"] is False


def test_verify_finds_a_flipped_bit_and_a_missing_file(exported: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(exported, tmp_path / "copy"))
    path = folder / WEIGHTS
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    (folder / "tokenizer" / "vocab.json").unlink()
    with pytest.raises(VerificationError, match=r"2 file\(s\).*vocab.json is missing.*unet/diff"):
        verify_files(folder)
    with pytest.raises(SourceNotFoundError, match="has no merge_manifest.json"):
        verify_files(tmp_path)


def test_edit_writes_a_picture(exported: Path, tmp_path: Path) -> None:
    Image.effect_noise((100, 150), 90).save(tmp_path / "noise.png")
    command = [sys.executable, "-m", "merge", "edit", str(exported), str(tmp_path / "noise.png")]
    command += ["make it blue", "-o", str(tmp_path / "new.png"), "--seed", "3"]
    child = subprocess.run(command, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    assert child.stdout == f"{tmp_path / 'new.png'}\n"
    with Image.open(tmp_path / "new.png") as image:
        assert image.size == (64, 96)
        assert image.text["instruction"] == "make it blue"
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 8
    assert "exists already" in again.stderr


def test_edits_repeat_and_follow_their_settings(exported: Path) -> None:
    editor = load_editor(exported, device="cpu")
    picture = default_picture(64)
    first = edit(editor, picture, "make it blue", EditSettings())
    again = edit(editor, picture, "make it blue", EditSettings())
    assert np.array_equal(first.image, again.image)
    for settings in (
        EditSettings(seed=1),
        EditSettings(steps=2),
        EditSettings(guidance_scale=1.0),
        EditSettings(image_guidance_scale=1.5),
        EditSettings(original_inference_steps=100),
        EditSettings(timesteps=(999, 749, 499, 249)),
    ):
        other = edit(editor, picture, "make it blue", settings)
        assert not np.array_equal(first.image, other.image), settings
    hundred = edit(editor, picture, "make it blue", EditSettings(original_inference_steps=100))
    listed = edit(editor, picture, "make it blue", EditSettings(timesteps=(999, 749, 499, 249)))
    # With 100 original steps the four timesteps are just these.
    assert np.array_equal(hundred.image, listed.image)
    assert edit(editor, picture, "blue", EditSettings(guidance_scale=1.0)).unet_rows == 4
    lines = editor.warnings_for(EditSettings(guidance_scale=5, image_guidance_scale=0.5))
    assert len(lines) == 2


def test_the_sdxl_export_edits(exported_xl: Path) -> None:
    editor = load_editor(exported_xl, device="cpu")
    assert editor.has_added_conditions
    result = edit(editor, default_picture(96), "make it blue", EditSettings(resolution=96))
    assert result.image.shape == (96, 96, 3)
    assert result.non_finite_count == 0
    assert not verify_folder(exported_xl, device="cpu").failed
    assert (exported_xl / "report.json").is_file()


@pytest.mark.parametrize(
    ("instruction", "settings", "message"),
    [
        (" ", EditSettings(), "the instruction is empty"),
        ("blue", EditSettings(steps=0), "steps 0 is not within 1 to"),
        ("blue", EditSettings(steps=51), "steps 51 is not within 1 to"),
        ("blue", EditSettings(guidance_scale=float("nan")), "guidance_scale nan"),
        ("blue", EditSettings(image_guidance_scale=-1), "image_guidance_scale -1"),
    ],
)
def test_bad_requests_are_refused(
    exported: Path, instruction: str, settings: EditSettings, message: str
) -> None:
    editor = load_editor(exported, device="cpu")
    with pytest.raises(ImageError, match=message):
        edit(editor, default_picture(64), instruction, settings)


def test_bad_checkpoints_are_refused(exported: Path, tmp_path: Path) -> None:
    with pytest.raises(SourceNotFoundError, match="has no model_index.json"):
        load_editor(tmp_path, device="cpu")
    folder = Path(shutil.copytree(exported, tmp_path / "copy"))
    index = folder / "model_index.json"
    index.write_text(index.read_text().replace("InstructPix2Pix", ""))
    with pytest.raises(CheckpointError, match="is a StableDiffusionPipeline, not an Instruct"):
        load_editor(folder, device="cpu")


def test_pictures_of_every_kind_are_read(tmp_path: Path) -> None:
    for mode in ("L", "RGBA", "CMYK", "I;16", "1", "P"):
        path = tmp_path / f"{mode.replace(';', '')}.{'tif' if mode == 'CMYK' else 'png'}"
        Image.new(mode, (30, 20)).save(path)
        assert load_image(path).mode == "RGB"
    rotated = Image.new("RGB", (30, 20))
    exif = rotated.getexif()
    exif[0x0112] = 6
    rotated.save(tmp_path / "rotated.jpg", exif=exif)
    assert load_image(tmp_path / "rotated.jpg").size == (20, 30)
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(ImageError, match="no picture that can be read"):
        load_image(tmp_path / "text.png")
    with pytest.raises(ImageError, match="there is no picture"):
        load_image(tmp_path / "nothing.png")
    assert resize_image(Image.new("RGB", (1, 1)), 64).size == (64, 64)
    assert resize_image(Image.new("RGB", (300, 200)), 64).size == (96, 64)
    with pytest.raises(ImageError, match="too narrow"):
        resize_image(Image.new("RGB", (5000, 2)), 64)
