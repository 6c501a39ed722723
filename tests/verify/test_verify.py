"""The verification: checks made to fail, measurements against oracles, the target's pictures."""

from __future__ import annotations

import dataclasses
import functools
import gc
import io
import json
import logging
import math
import re
import shutil
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image, PngImagePlugin
from safetensors.torch import load_file, save_file

from merge import load_recipe, run_recipe, verify_folder
from merge.cli.main import main as cli_main
from merge.editor.load import load_editor
from merge.editor.result import EditResult
from merge.errors import (
    ImageError,
    OutputError,
    OutputExistsError,
    RecipeError,
    SourceError,
    VerificationError,
)
from merge.verify import compare as compare_module
from merge.verify import folder as folder_module
from merge.verify import metrics, references, weights
from merge.verify.checks import CHECKS, check_expected, check_repeat, make_check, most_changed
from merge.verify.clip import ClipScorer, find_clip
from merge.verify.drawings import DRAWINGS, draw_picture
from merge.verify.edits import DEFAULT_EDITS, read_edits
from merge.verify.model import CompareOptions, Edit, Picture
from merge.verify.report import report_to_json
from merge.verify.roundtrip import round_trip

UNET = "unet/diffusion_pytorch_model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"
ONE = (Edit(None, "make it winter"),)


def write_recipe(folder: Path, models: Path, **verify: object) -> Path:
    tree = {
        "name": "tiny",
        "models": {
            "base": str(models / "base"),
            "distilled": str(models / "distilled"),
            "target": str(models / "target"),
        },
        "verify": {"resolution": 64, "steps": 2, **verify},
    }
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.fixture(scope="session")
def merged(tiny_sd15: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One export of the SD1.5 models that nothing has verified yet."""
    folder = tmp_path_factory.mktemp("merged")
    recipe = load_recipe(write_recipe(folder, tiny_sd15))
    return run_recipe(recipe, folder / "out", device="cpu", verify=False).folder


@pytest.fixture
def export(merged: Path, tmp_path: Path) -> Path:
    """A copy of the export that a test may break."""
    return Path(shutil.copytree(merged, tmp_path / "export"))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "instruct-merge" / "references"


verify = functools.partial(verify_folder, edits=ONE, device="cpu")


def read_report(folder: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return report


def failed_names(folder: Path, severity: str = "judged") -> set[str]:
    checks = read_report(folder)["checks"]
    return {c["name"] for c in checks if not c["passed"] and c["severity"] == severity}


def change_tensor(path: Path, key: str, change: Callable[[torch.Tensor], object]) -> None:
    tensors = load_file(path)
    change(tensors[key])
    save_file(tensors, path, {"format": "pt"})


# A good folder ---------------------------------------------------------------------------------


def test_a_good_folder_passes_every_check(export: Path) -> None:
    found = verify_folder(export, device="cpu")
    report = read_report(export)
    assert report_to_json(found) == report
    assert report["schema_version"] == 1
    assert report["passed"] is True
    whole = [check["name"] for check in report["checks"] if check["edit"] is None]
    assert whole == [
        *("files_as_recorded", "weights_finite", "weight_not_negative", "base_is_nearer"),
        *("deterministic", "noise_left"),
    ]
    for index in range(3):
        names = [check["name"] for check in report["checks"] if check["edit"] == index]
        expected = ["latents_finite", "picture_finite", "not_black", "not_constant"]
        assert names == [*expected, "not_the_source"]
    assert set(CHECKS) == {check["name"] for check in report["checks"]} | {
        *("as_expected", "noise_left_by_target"),
    }
    # Of random weights, so there is one thing to warn of.
    assert failed_names(export, "warned") == {"noise_left"}
    for check in report["checks"]:
        if check["name"] == "noise_left":
            continue
        assert check["passed"] is True
        better = (check["value"], check["limit"])
        assert min(better) == check["limit" if check["rule"] == "at least" else "value"]
    assert report["summary"]["steps"] == 2
    assert report["summary"]["unet_rows"] == 4
    assert report["summary"]["checks_total"] == 21
    assert report["summary"]["checks_failed"] == 0
    assert report["summary"]["checks_warned"] == 1
    assert report["summary"]["device"] == "cpu float32"


def test_the_report_names_its_files_and_no_place_of_this_machine(
    export: Path, tmp_path: Path, tiny_sd15: Path
) -> None:
    picture = tmp_path / "my picture.png"
    draw_picture("boat", 64).save(picture)
    edits = [Edit(picture, "make it red", seed=7, expected=(picture,), expected_limit=1.0)]
    target = list((tiny_sd15 / "target" / "unet").glob("*.safetensors"))
    verify(export, edits=edits, target_weights=target)
    report = read_report(export)
    (edit,) = report["edits"]
    assert edit["image"] == "my picture.png"
    assert edit["seed"] == edit["settings"]["seed"] == 7
    kinds = ("source", "merged", "expected")
    assert edit["files"] == [f"images/00-7-{kind}.png" for kind in kinds]
    assert sorted(edit["files"]) == sorted(
        f"images/{p.name}" for p in (export / "images").iterdir()
    )
    assert edit["unet_rows"] == 4
    assert edit["time_s"] > 0
    with Image.open(export / edit["files"][1]) as image:
        assert json.loads(image.text["settings"])["seed"] == 7
    for name in ("report.json", "report.html"):
        text = (export / name).read_text()
        assert str(tmp_path) not in text
        assert str(tiny_sd15) not in text
        assert str(Path.home()) not in text


def test_pictures_of_an_older_report_go_and_others_stay(export: Path) -> None:
    images = export / "images"
    images.mkdir()
    for name in ("07-3-merged.png", "07-3-target_few.png", "logo.png", "07-3-merged.jpg"):
        (images / name).write_bytes(b"old")
    verify(export)
    assert sorted(path.name for path in images.iterdir()) == [
        *("00-0-merged.png", "00-0-source.png", "07-3-merged.jpg", "logo.png"),
    ]
    assert not [
        path for path in export.rglob("*") if "tmp" in path.suffix or "partial" in path.name
    ]


def test_a_folder_that_takes_no_report_is_an_output_error(export: Path) -> None:
    (export / "images").write_text("no folder")
    with pytest.raises(OutputError, match="images"):
        verify(export)


def test_a_folder_without_manifest_has_no_hashes_to_check(tiny_sd15: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_sd15 / "target", tmp_path / "target"))
    verify(folder)
    report = read_report(folder)
    assert "files_as_recorded" not in {check["name"] for check in report["checks"]}
    assert report["summary"]["name"] == "target"
    assert any("no manifest" in note for note in report["notes"])
    assert any("--compare TARGET" in note for note in report["notes"])
    assert report["block_norms"] == []


# Bad folders: each check fails for its own reason ------------------------------------------------


def test_a_nan_weight_fails_on_the_command_line(export: Path, tmp_path: Path) -> None:
    def spoil(tensor: torch.Tensor) -> None:
        tensor.view(-1)[3] = float("nan")
        tensor.view(-1)[4] = float("inf")

    change_tensor(export / UNET, "mid_block.resnets.0.conv1.weight", spoil)
    draw_picture("house", 64).save(tmp_path / "a.png")
    edits = tmp_path / "edits.yaml"
    edits.write_text("- {image: a.png, instruction: make it blue}")
    words = ["verify", str(export), "--device", "cpu", "--edits", str(edits)]
    child = subprocess.run([sys.executable, "-m", "merge", *words], capture_output=True, text=True)
    assert child.returncode == 9, child.stderr
    assert child.stdout == ""
    first, *lines, hint = child.stderr.splitlines()
    # Nothing is finite here, so no noise was measured.
    assert first == f"error: the merged model in {export} fails {len(lines)} of 10 checks:"
    key = "mid_block.resnets.0.conv1.weight"
    assert f"  weights_finite is 2 and must be at most 0 ({key} (2))" in lines
    assert "  latents_finite of edit 0 is 256 and must be at most 0" in lines
    assert "  picture_finite of edit 0 is 12288 and must be at most 0" in lines
    assert lines[0].startswith("  files_as_recorded is 1 and must be at most 0 (unet/diff")
    assert hint.startswith("hint: ")
    report = read_report(export)
    assert report["passed"] is False
    assert report["summary"]["checks_failed"] == len(
        [check for check in report["checks"] if not check["passed"]]
    )
    assert "failed" in (export / "report.html").read_text()


@pytest.mark.parametrize(
    ("color", "failed"),
    [
        ((-1.0, -1.0, -1.0), {"not_black", "not_constant"}),
        ((1.0, -1.0, -1.0), {"not_constant"}),
        ((float("nan"), 0.0, 0.0), {"picture_finite", "not_constant"}),
    ],
    ids=["black", "red", "nan"],
)
def test_a_dead_decoder_fails(export: Path, color: tuple[float, ...], failed: set[str]) -> None:
    change_tensor(export / VAE, "decoder.conv_out.weight", torch.Tensor.zero_)
    change_tensor(export / VAE, "decoder.conv_out.bias", lambda t: t.copy_(torch.tensor(color)))
    with pytest.raises(VerificationError):
        verify(export)
    # What is one colour, whatever the UNet does, is the VAE's own round trip too.
    assert failed_names(export) == failed | {"files_as_recorded", "not_the_source"}


def replaced_edit(
    change: Callable[[EditResult, Any, int], EditResult],
) -> Callable[..., EditResult]:
    calls = iter(range(100))
    real = folder_module.edit_picture

    def edit(editor: Any, *arguments: Any) -> EditResult:
        return change(real(editor, *arguments), editor, next(calls))

    return edit


@pytest.mark.parametrize("kind", ["round trip", "source", "nearly"])
def test_a_model_that_changes_nothing_fails(
    export: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    def unchanged(result: EditResult, editor: Any, call: int) -> EditResult:
        image = result.source if kind == "source" else round_trip(editor, result.source)
        values = np.asarray(image, dtype=np.float32) / 255
        if kind == "nearly":
            values = values + np.random.default_rng(0).uniform(-0.02, 0.02, values.shape)
        return dataclasses.replace(result, image=values.clip(0, 1).astype(np.float32))

    monkeypatch.setattr(folder_module, "edit_picture", replaced_edit(unchanged))
    with pytest.raises(VerificationError, match="not_the_source of edit 0 is 0.* at least 0.02"):
        verify(export)
    assert failed_names(export) == {"not_the_source"}


@pytest.mark.parametrize("field", ["image", "latents"])
def test_a_model_that_does_not_repeat_itself_fails(
    export: Path, monkeypatch: pytest.MonkeyPatch, field: str
) -> None:
    def other(result: EditResult, editor: Any, call: int) -> EditResult:
        values = getattr(result, field).copy()
        values.flat[5] += call * 1e-6
        return dataclasses.replace(result, **{field: values})

    monkeypatch.setattr(folder_module, "edit_picture", replaced_edit(other))
    with pytest.raises(VerificationError, match="deterministic is 1 and must be at most 0"):
        verify(export)
    assert failed_names(export) == {"deterministic"}


def test_the_same_nan_twice_is_deterministic(export: Path) -> None:
    editor = load_editor(export, device="cpu")
    result = folder_module.edit_picture(editor, draw_picture("house", 64), "x")
    result.image[0, 0, 0] = np.nan
    assert check_repeat(result, result).passed
    other = dataclasses.replace(result, image=np.nan_to_num(result.image))
    assert check_repeat(result, other).value == 1
    short = dataclasses.replace(result, image=result.image[:32])
    assert not check_repeat(result, short).passed


@pytest.mark.parametrize("change", ["bit", "size", "missing"])
def test_a_file_that_is_not_as_recorded_fails(export: Path, change: str) -> None:
    path = export / "safety_checker" / "model.safetensors"
    data = bytearray(path.read_bytes())
    if change == "missing":
        path.unlink()
    else:
        data[-1] ^= 1
        path.write_bytes(data + b"x" * (change == "size"))
    with pytest.raises(VerificationError, match="files_as_recorded is 1 .*safety_checker/model"):
        verify(export)
    assert failed_names(export) == {"files_as_recorded"}


def test_the_result_must_be_near_one_of_the_expected(export: Path, tmp_path: Path) -> None:
    verify(export)
    right = tmp_path / "right.png"
    shutil.copy(export / "images" / "00-0-merged.png", right)
    wrong = tmp_path / "wrong.png"
    Image.new("RGB", (64, 64)).save(wrong)
    edit = dataclasses.replace(ONE[0], expected=(wrong, right), expected_limit=0.0)
    verify(export, edits=[edit])
    (check,) = [c for c in read_report(export)["checks"] if c["name"] == "as_expected"]
    assert (check["value"], check["limit"], check["edit"]) == (0, 0, 0)
    with pytest.raises(VerificationError, match="as_expected of edit 0 is 0.* must be at most 0.1"):
        verify(export, edits=[dataclasses.replace(edit, expected=(wrong,), expected_limit=0.1)])
    assert failed_names(export) == {"as_expected"}


def test_the_distance_to_the_expected_is_the_root_mean_square() -> None:
    black, grey = Image.new("RGB", (8, 8)), Image.new("RGB", (8, 8), (51, 51, 51))
    white = Image.new("RGB", (8, 8), "white")
    check, nearest = check_expected(4, grey, [white, black], 0.2)
    assert check.value == pytest.approx(0.2)
    assert check.passed
    assert nearest is black
    assert not check_expected(4, grey, [black], 0.19)[0].passed
    half = black.copy()
    half.paste((255, 255, 255), (0, 0, 8, 4))
    assert check_expected(0, half, [black], 1)[0].value == pytest.approx(math.sqrt(0.5), abs=1e-6)


def test_a_small_edit_is_not_the_source() -> None:
    source = metrics.to_values(draw_picture("house", 200))
    edited = source.copy()
    edited[20:40, 20:40] = 1 - edited[20:40, 20:40]
    # 1 % of the pixels: the mean over the whole picture would be a hundredth of it.
    assert most_changed(source, edited) > 0.1
    assert np.abs(source - edited).mean() < 0.01


def test_a_measurement_that_is_no_number_fails() -> None:
    assert not make_check("not_black", float("nan")).passed
    assert not make_check("as_expected", float("nan"), limit=1.0).passed


# What is measured, against oracles ---------------------------------------------------------------


def test_metrics_are_those_of_numpy_and_scikit_image() -> None:
    skimage = pytest.importorskip("skimage.metrics")
    rng = np.random.default_rng(0)
    a, b = (Image.fromarray(rng.integers(0, 256, (40, 56, 3), dtype=np.uint8)) for _ in range(2))
    x, y = np.asarray(a), np.asarray(b)
    found = metrics.measure_pair(a, b)
    assert set(found) == {"l1", "psnr", "ssim"}
    assert found["l1"] == pytest.approx(np.abs(x.astype(int) - y).mean() / 255)
    assert found["psnr"] == pytest.approx(skimage.peak_signal_noise_ratio(x, y, data_range=255))
    assert found["ssim"] == pytest.approx(skimage.structural_similarity(x, y, channel_axis=2))
    assert metrics.measure_pair(a, a) == {"l1": 0, "psnr": None, "ssim": pytest.approx(1)}
    tiny = a.resize((8, 6))
    assert metrics.measure_pair(tiny, tiny)["ssim"] == pytest.approx(1)


def test_without_scikit_image_the_report_says_how_to_get_it(
    export: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (metrics, folder_module):
        monkeypatch.setattr(module, "has_ssim", lambda: False)
    verify(export)
    report = read_report(export)
    assert "ssim" not in report["edits"][0]["pictures"]["merged"]["metrics"]
    assert any("instruct-merge[metrics]" in note for note in report["notes"])


def save_unet(path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    save_file(tensors, path, {"format": "pt"})
    return path


@pytest.mark.parametrize("chunk", [5, 1 << 20])
def test_block_norms_are_those_of_numpy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(weights, "_CHUNK_ELEMENTS", chunk)
    rng = torch.Generator().manual_seed(0)
    keys = ["up_blocks.10.a", "up_blocks.2.a", "conv_out.bias", "conv_norm_out.weight"]
    target = {key: torch.randn(3, 7, generator=rng) for key in keys}
    # What the architecture is told by.
    keys.append("conv_in.weight")
    target["conv_in.weight"] = torch.randn(3, 7, 1, 1, generator=rng)
    ours = {
        key: (t + 0.1 * torch.randn(t.shape, generator=rng)).half() for key, t in target.items()
    }
    ours["up_blocks.2.a"] = ours["up_blocks.2.a"].to(torch.bfloat16)
    ours["conv_in.weight"] = target["conv_in.weight"].clone()
    target["conv_out.bias"].zero_()
    target["conv_norm_out.weight"].zero_()
    found = weights.measure_weights(
        [save_unet(tmp_path / "ours.safetensors", ours)],
        [save_unet(tmp_path / "target.safetensors", target)],
    )
    assert found.non_finite == {}
    assert [block.name for block in found.blocks] == [
        *("conv_in", "up_blocks.2", "up_blocks.10", "conv_out"),
    ]
    for block in found.blocks[:3]:
        key = next(key for key in keys if key.startswith(f"{block.name}."))
        a, b = (t[key].float().numpy().astype(np.float64) for t in (ours, target))
        expected = np.linalg.norm(a - b) / np.linalg.norm(b)
        assert block.relative == pytest.approx(expected, rel=1e-6)
        assert block.parameters == 21
    # Nothing there before: no relative size.
    assert found.blocks[3].relative == 0
    assert found.blocks[3].parameters == 42


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_non_finite_values_of_every_dtype_are_counted(tmp_path: Path, dtype: torch.dtype) -> None:
    values = torch.ones(50, dtype=dtype)
    values[[0, 7, 49]] = torch.tensor([math.nan, math.inf, -math.inf], dtype=dtype)
    tensors = {"a": values, "b": torch.full((4,), torch.finfo(dtype).max, dtype=dtype)}
    if dtype == torch.float64:
        # Larger than any float32, and a number for all that.
        tensors["b"] = torch.full((4,), 1e300, dtype=dtype)
    tensors["steps"] = torch.arange(3)
    path = save_unet(tmp_path / "a.safetensors", tensors)
    found = weights.measure_weights([path])
    assert found.non_finite == {"a": 3}
    assert found.blocks == ()


def test_other_keys_or_shapes_are_not_compared(tmp_path: Path) -> None:
    ours = save_unet(tmp_path / "a.safetensors", {"conv_in.w": torch.ones(4, 2)})
    for name, tensors in {
        "key": {"conv_in.v": torch.ones(4, 2)},
        "shape": {"conv_in.w": torch.ones(2, 4)},
    }.items():
        path = save_unet(tmp_path / f"{name}.safetensors", tensors)
        assert weights.measure_weights([ours], [path]).blocks == ()


@pytest.fixture(scope="session")
def tiny_clip(tiny_sd15: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random CLIP model of a few thousand parameters."""
    import transformers

    folder = tmp_path_factory.mktemp("clip") / "tiny-clip"
    shutil.copytree(tiny_sd15 / "target" / "tokenizer", folder)
    words = len(json.loads((folder / "vocab.json").read_text()))
    shared = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    config = transformers.CLIPConfig(
        text_config={**shared, "vocab_size": words, "eos_token_id": 2, "bos_token_id": 0},
        vision_config={**shared, "image_size": 24, "patch_size": 8},
        projection_dim=8,
    )
    torch.manual_seed(0)
    transformers.CLIPModel(config).save_pretrained(folder)
    return folder


def test_clip_scores_are_those_of_the_definition(tiny_clip: Path) -> None:
    import transformers

    before, after = draw_picture("house", 60), draw_picture("boat", 60)
    captions = ("a house", "a boat at sea")
    scorer = ClipScorer(str(tiny_clip), torch.device("cpu"))
    found = scorer.score(before, after, *captions)

    model = transformers.CLIPModel.from_pretrained(tiny_clip)
    tokenizer = transformers.CLIPTokenizer.from_pretrained(tiny_clip)

    def unit(values: Any) -> np.ndarray:
        vector = values.pooler_output[0].detach().numpy().astype(np.float64)
        return vector / np.linalg.norm(vector)

    def image(picture: Image.Image) -> np.ndarray:
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 255
        pixels = torch.nn.functional.interpolate(pixels, (24, 24), mode="bicubic")
        mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])[None, :, None, None]
        std = torch.tensor([0.26862954, 0.26130258, 0.27577711])[None, :, None, None]
        return unit(model.get_image_features(pixel_values=(pixels - mean) / std))

    # One at a time: padding must change nothing.
    texts = [unit(model.get_text_features(**tokenizer(t, return_tensors="pt"))) for t in captions]
    images = [image(before), image(after)]
    change, words = images[1] - images[0], texts[1] - texts[0]
    assert found["clip_image"] == pytest.approx(images[0] @ images[1], abs=1e-5)
    assert found["clip_text"] == pytest.approx(images[1] @ texts[1], abs=1e-5)
    expected = change @ words / np.linalg.norm(change) / np.linalg.norm(words)
    assert found["clip_direction"] == pytest.approx(expected, abs=1e-4)
    assert scorer.score(before, before, *captions)["clip_direction"] is None
    assert set(scorer.score(before, after, None, "a boat")) == {"clip_image"}


@pytest.mark.parametrize("name", ["nothing", "../nothing", ""])
def test_a_wrong_clip_model_fails_before_anything_is_done(
    export: Path, tmp_path: Path, name: str
) -> None:
    with pytest.raises(SourceError, match="--clip: "):
        verify(export, clip=name)
    with pytest.raises(SourceError, match="is no CLIP model"):
        find_clip(str(export))
    assert not (export / "report.json").exists()


def test_clip_scores_are_in_the_report(export: Path, tiny_clip: Path) -> None:
    edits = [DEFAULT_EDITS[0], Edit(None, "no captions")]
    verify(export, edits=edits, clip=str(tiny_clip))
    report = read_report(export)
    assert report["clip"] == "tiny-clip"
    first, second = (edit["pictures"]["merged"]["metrics"] for edit in report["edits"])
    assert {"clip_image", "clip_text", "clip_direction"} <= set(first)
    assert "clip_direction" not in second
    assert -1 <= second["clip_image"] <= 1
    assert "CLIP directional similarity" in (export / "report.html").read_text()


# The target's pictures ---------------------------------------------------------------------------


@pytest.fixture
def options(tiny_sd15: Path) -> CompareOptions:
    return CompareOptions(str(tiny_sd15 / "target"), steps=1)


class Loads:
    """Counts what is loaded, and checks that what was loaded before is gone."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folders: list[Path] = []
        self._unets: list[weakref.ref[Any]] = []
        self._real = load_editor
        for module in (folder_module, compare_module):
            monkeypatch.setattr(module, "load_editor", self)

    def __call__(self, folder: Path, **options: Any) -> Any:
        assert [ref for ref in self._unets if ref() is not None] == [], "two models in memory"
        editor = self._real(folder, **options)
        self.folders.append(Path(folder))
        self._unets.append(weakref.ref(editor.pipeline.unet))
        return editor


def test_the_target_is_shown_with_one_model_in_memory(
    export: Path, tiny_sd15: Path, options: CompareOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads = Loads(monkeypatch)
    ticks: list[tuple[int, int]] = []
    gc.collect()
    verify(export, compare=options, on_edit=lambda *tick: ticks.append(tick))
    assert loads.folders == [export, tiny_sd15 / "target"]
    assert ticks == [(done, 4) for done in range(1, 5)]
    report = read_report(export)
    pictures = report["edits"][0]["pictures"]
    assert list(pictures) == ["merged", "target", "target_few"]
    own, few = pictures["target"], pictures["target_few"]
    assert (own["scheduler"], own["settings"]["steps"], own["unet_rows"]) == ("own", 1, 3)
    assert own["settings"]["guidance_scale"] == 7.5
    assert own["settings"]["image_guidance_scale"] == 1.5
    assert (few["scheduler"], few["settings"]["steps"], few["unet_rows"]) == ("lcm", 2, 4)
    assert few["settings"] == pictures["merged"]["settings"]
    assert "l1_to_target" in pictures["merged"]["metrics"]
    assert "l1_to_target" not in own["metrics"]
    assert report["compared_with"]["model"] == "target"
    assert len(report["block_norms"]) == 12
    assert report["block_norms"][1]["relative"] > 0.01
    # They are what the editor gives for these settings.
    editor = load_editor(tiny_sd15 / "target", device="cpu", scheduler="own")
    settings = dataclasses.replace(
        folder_module.EditSettings(), steps=1, guidance_scale=7.5, image_guidance_scale=1.5
    )
    expected = folder_module.edit_picture(
        editor, draw_picture("house", 64), ONE[0].instruction, settings
    )
    with Image.open(export / own["file"]) as image:
        assert np.array_equal(np.asarray(image), np.asarray(expected.to_pil()))
    editor = load_editor(tiny_sd15 / "target", device="cpu", scheduler="lcm")
    expected = folder_module.edit_picture(
        editor, draw_picture("house", 64), ONE[0].instruction, folder_module.EditSettings(steps=2)
    )
    with Image.open(export / few["file"]) as image:
        assert np.array_equal(np.asarray(image), np.asarray(expected.to_pil()))


def test_the_targets_pictures_are_kept_and_remade_when_damaged(
    export: Path,
    tiny_sd15: Path,
    options: CompareOptions,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    verify(export, compare=options)
    first = {path: path.read_bytes() for path in (export / "images").iterdir()}
    kept = sorted(cache.iterdir())
    assert [path.suffix for path in kept] == [".png", ".png"]
    loads = Loads(monkeypatch)
    verify(export, compare=options)
    assert loads.folders == [export]
    assert {path: path.read_bytes() for path in (export / "images").iterdir()} == first
    kept[0].write_bytes(kept[0].read_bytes()[:-40])
    loads.folders.clear()
    verify(export, compare=options)
    assert loads.folders == [export, tiny_sd15 / "target"]
    assert {path: path.read_bytes() for path in (export / "images").iterdir()} == first
    assert sorted(cache.iterdir()) == kept


def test_a_damaged_picture_is_not_taken(cache: Path) -> None:
    settings = folder_module.EditSettings()
    kept = references.ReferenceCache(cache)
    picture = Picture(draw_picture("boat", 40), settings, "own", 150, 20.5)
    assert kept.get("a", settings, "own") is None
    kept.put("a", picture)
    kept.put("b", dataclasses.replace(picture, image=draw_picture("house", 40)))
    found = kept.get("a", settings, "own")
    assert found is not None
    assert dataclasses.replace(found, image=picture.image) == picture
    assert found.image.tobytes() == picture.image.tobytes()
    good = (cache / "a.png").read_bytes()
    with Image.open(cache / "b.png") as other:
        other.save(cache / "plain.png")
    damaged = {
        "empty": b"",
        "cut": good[:-40],
        "text": good.replace(b'"key"', b'"kez"'),
        "other": (cache / "b.png").read_bytes(),
        "plain": (cache / "plain.png").read_bytes(),
        "html": b"<html>",
    }
    for name, data in damaged.items():
        (cache / "a.png").write_bytes(data)
        assert kept.get("a", settings, "own") is None, name
    with Image.open(io.BytesIO(good)) as image:
        info = PngImagePlugin.PngInfo()
        info.add_text("reference", image.text["reference"])
        draw_picture("apple", 40).save(cache / "a.png", pnginfo=info)
    assert kept.get("a", settings, "own") is None
    kept.put("a", picture)
    assert kept.get("a", settings, "own") is not None
    assert sorted(path.name for path in cache.iterdir()) == ["a.png", "b.png", "plain.png"]


def test_a_disk_that_keeps_nothing_is_no_error(
    cache: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The command line keeps messages to itself, once it ran in this process.
    monkeypatch.setattr(logging.getLogger("merge"), "propagate", True)
    settings = folder_module.EditSettings()
    cache.parent.mkdir(parents=True)
    cache.write_text("a file where the folder would be")
    kept = references.ReferenceCache(cache)
    kept.put("a", Picture(draw_picture("boat", 8), settings, "own", 1, 1.0))
    assert kept.get("a", settings, "own") is None
    assert "is not kept" in caplog.text


def test_without_the_cache_nothing_is_kept(
    export: Path, options: CompareOptions, cache: Path
) -> None:
    verify(export, compare=dataclasses.replace(options, cache=False))
    assert not cache.exists()


def test_another_target_is_another_key(
    export: Path,
    tiny_sd15: Path,
    options: CompareOptions,
    tmp_path: Path,
    cache: Path,
) -> None:
    verify(export, compare=options)
    other = Path(shutil.copytree(tiny_sd15 / "target", tmp_path / "other"))
    verify(export, compare=dataclasses.replace(options, model=str(other)))
    # The same bytes in another folder are the same model.
    assert len(list(cache.iterdir())) == 2
    change_tensor(other / VAE, "decoder.conv_out.bias", lambda t: t.add_(0.25))
    verify(export, compare=dataclasses.replace(options, model=str(other)))
    assert len(list(cache.iterdir())) == 4


def test_every_fact_is_in_the_key() -> None:
    settings = folder_module.EditSettings()
    image = draw_picture("house", 32)
    facts: dict[str, Any] = {
        "files": {"a": "1"},
        "image": image,
        "instruction": "x",
        "settings": settings,
        "scheduler": "own",
        "device": "cpu float32",
    }
    changes: dict[str, Any] = {
        "files": {"a": "2"},
        "image": draw_picture("boat", 32),
        "instruction": "y",
        "settings": dataclasses.replace(settings, seed=1),
        "scheduler": "lcm",
        "device": "cuda float16",
    }
    keys = {references.reference_key(**facts)}
    keys |= {references.reference_key(**{**facts, name: new}) for name, new in changes.items()}
    assert len(keys) == 1 + len(changes)


def test_the_cache_lies_where_the_system_wants_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert references.cache_folder() == Path("/somewhere/instruct-merge/references")
    for value in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert references.cache_folder() == Path.home() / ".cache/instruct-merge/references"


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("nothing", "--compare: there is no folder nothing"),
        ("{base}", "--compare: .* is no pipeline folder"),
        ("{empty}", "--compare: "),
    ],
)
def test_a_wrong_target_fails_before_anything_is_done(
    export: Path, tiny_sd15: Path, tmp_path: Path, model: str, message: str
) -> None:
    (tmp_path / "empty").mkdir()
    model = model.format(base=tiny_sd15 / "base", empty=tmp_path / "empty")
    with pytest.raises(SourceError, match=message):
        verify(export, compare=CompareOptions(model))
    assert not (export / "report.json").exists()


# Lists of edits ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("image: a.png", "is no list of edits but a mapping"),
        ("", "is no list of edits but empty"),
        ("[]", "it is empty: name at least one edit"),
        ("- just text", r"edits\[0\]: must be a mapping of names to values, not 'just text'"),
        ("- {image: a.png}", r"edits\[0\].instruction: missing"),
        ("- {instruction: x}", r"edits\[0\].image: missing"),
        ("- {image: a.png, instruction: x, sead: 1}", "sead: unknown key, did you mean 'seed'"),
        ("- {image: a.png, instruction: ' '}", r"edits\[0\].instruction: it is empty"),
        ("- {image: a.png, instruction: on}", "instruction: True is not text, put it in quotes"),
        ("- {image: a.png, instruction: x, seed: -1}", "seed: -1 is not a whole number"),
        ("- {image: a.png, instruction: x, seed: true}", "seed: True is not a whole number"),
        ("- {image: a.png, instruction: x, seed: 1.5}", "seed: 1.5 is not a whole number"),
        ("- {image: a.png, instruction: x, expected: b.png}", "expected: must be a list of pict"),
        ("- {image: a.png, instruction: x, expected_limit: -1}", "expected_limit: -1 is not a fin"),
        ("- {image: a.png, instruction: x, before_caption: 3}", "before_caption: 3 is not text"),
        ("- {image: a.png, instruction: x, steps: 0}", "steps: 0 is not a whole number within 1"),
        ("- {image: a.png, instruction: x, steps: true}", "steps: True is not a whole number"),
        ("- {image: a.png, instruction: x, timesteps: 9}", "timesteps: 9 is no list of whole"),
        ("- {image: a.png, instruction: x, timesteps: [9, 9]}", r"\[9, 9\] must fall strictly"),
        ("- {image: a.png, instruction: x, timesteps: []}", r"\[\] must fall strictly"),
        ("- {image: a.png, instruction: x, steps: 1, timesteps: [9]}", "steps or timesteps, not"),
        ("- {image: a.png, instruction: x, image: b.png}", "two of its keys are the same"),
        ("- {image: a.png, instruction: [", "cannot be read in line"),
        ("- &a [*a]", r"edits\[0\]: must be"),
        ("[" * 600, "nested too deeply"),
    ],
)
def test_a_bad_list_of_edits_is_a_recipe_error(tmp_path: Path, text: str, message: str) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    path = tmp_path / "edits.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=message) as caught:
        read_edits(path)
    assert "hint: " in str(caught.value)


def test_every_problem_of_a_list_is_named_at_once(tmp_path: Path) -> None:
    path = tmp_path / "edits.yaml"
    path.write_text("- {image: 3, instruction: ''}\n- {seed: x}\n")
    with pytest.raises(RecipeError) as caught:
        read_edits(path)
    assert len(caught.value.problems) == 5
    with pytest.raises(RecipeError, match="No such file"):
        read_edits(tmp_path / "nothing.yaml")


def test_a_list_of_edits_is_read(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    tree = [
        {"image": "a.png", "instruction": "mach es \U0001f384 rot: jetzt #1"},
        {
            "image": str(tmp_path / "b.png"),
            "instruction": "x",
            "seed": 2**63 - 1,
            "before_caption": "b",
            "after_caption": "a",
            "expected": ["a.png"],
            "expected_limit": 1,
            "timesteps": [999, 299],
        },
    ]
    expected = [
        Edit(tmp_path / "a.png", "mach es \U0001f384 rot: jetzt #1"),
        Edit(
            tmp_path / "b.png",
            "x",
            2**63 - 1,
            "b",
            "a",
            (tmp_path / "a.png",),
            1,
            timesteps=(999, 299),
        ),
    ]
    for name, text in {
        "edits.json": json.dumps(tree),
        "edits.yaml": yaml.safe_dump(tree, allow_unicode=True),
    }.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
        assert read_edits(tmp_path / name) == expected
    tree[1]["expected"] = ["a.png", "c.png"]
    (tmp_path / "edits.json").write_text(json.dumps(tree))
    with pytest.raises(ImageError, match=r"there is no picture .*c\.png"):
        read_edits(tmp_path / "edits.json")


def test_the_default_edits_have_captions_and_pictures_of_their_own() -> None:
    assert len({edit.drawing for edit in DEFAULT_EDITS}) == len(DEFAULT_EDITS) == len(DRAWINGS)
    for edit in DEFAULT_EDITS:
        assert edit.instruction
        assert edit.before_caption
        assert edit.after_caption
        picture = draw_picture(edit.drawing, 96)
        assert picture.size == (96, 96)
        assert picture.tobytes() == draw_picture(edit.drawing, 96).tobytes()
        assert metrics.to_values(picture).std() > 0.1


# The command line and `run` ----------------------------------------------------------------------


def call(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        cli_main([str(word) for word in words])
    captured = capsys.readouterr()
    return int(stop.value.code or 0), captured.out, captured.err


def test_verify_prints_the_folder_or_the_report(
    export: Path, tmp_path: Path, tiny_sd15: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draw_picture("apple", 64).save(tmp_path / "a.png")
    edits = tmp_path / "edits.yaml"
    edits.write_text("- {image: a.png, instruction: make it blue}\n")
    words = ["verify", export, "--device", "cpu", "--edits", edits]
    assert call(capsys, *words)[:2] == (0, f"{export}\n")
    target = tiny_sd15 / "target"
    code, out, _ = call(
        capsys, *words, "--json", "--compare", target, "--compare-steps", 2, "--no-cache",
        "--compare-guidance-scale", 4, "--compare-image-guidance-scale", 1,
    )  # fmt: skip
    report = json.loads(out)
    assert code == 0
    assert report == read_report(export)
    assert report["compared_with"] == {
        "model": "target",
        "commit": None,
        "steps": 2,
        "guidance_scale": 4.0,
        "image_guidance_scale": 1.0,
    }
    (edits.parent / "a.png").unlink()
    code, out, err = call(capsys, *words)
    assert (code, out) == (4, "")
    assert "there is no picture" in err
    edits.write_text("x: 1")
    assert call(capsys, *words)[0] == 3
    assert call(capsys, "verify", export, "--files", "--edits", edits)[0] == 2
    assert (
        call(capsys, "verify", export, "--compare", "a/b", "--compare-guidance-scale", "nan")[0]
        == 2
    )
    assert json.loads(call(capsys, "verify", export, "--files", "--json")[1])["passed"] is True


def test_run_verifies_with_the_edits_of_its_recipe(
    tiny_sd15: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    draw_picture("boat", 64).save(folder / "boat ü.png")
    Image.new("RGB", (64, 64)).save(folder / "black.png")
    edit = {
        "image": "./pictures/boat ü.png",
        "instruction": "make it \U0001f384",
        "before_caption": "a boat",
        "after_caption": "a boat in winter",
        "expected": ["./pictures/black.png"],
        "expected_limit": 1.0,
    }
    path = write_recipe(tmp_path, tiny_sd15, edits=[edit], seeds=[3, 4])
    code, out, err = call(capsys, "run", path, "--out", tmp_path / "out", "--device", "cpu")
    assert (code, out) == (0, f"{tmp_path / 'out'}\n"), err
    report = read_report(tmp_path / "out")
    assert [(e["image"], e["instruction"], e["seed"]) for e in report["edits"]] == [
        ("boat ü.png", "make it \U0001f384", 3),
        ("boat ü.png", "make it \U0001f384", 4),
    ]
    assert report["edits"][0]["after_caption"] == "a boat in winter"
    assert [c["limit"] for c in report["checks"] if c["name"] == "as_expected"] == [1.0, 1.0]
    # The target is known, so the blocks are measured though nothing is compared.
    assert len(report["block_norms"]) == 12
    assert report["compared_with"] is None
    lock = yaml.safe_load((tmp_path / "out" / "recipe.lock.yaml").read_text())
    assert lock["recipe"]["verify"]["edits"][0]["expected"] == ["black.png"]
    (folder / "black.png").unlink()
    code, _, err = call(capsys, "run", path, "--out", tmp_path / "other", "--device", "cpu")
    assert code == 4
    assert "verify.edits: there is no picture" in err
    assert not (tmp_path / "other").exists()
    # A later verification has no pictures and says so.
    verify_folder(tmp_path / "out", device="cpu")
    report = read_report(tmp_path / "out")
    assert len(report["edits"]) == 6
    assert any("--edits" in note for note in report["notes"])


def test_run_fails_when_the_result_is_not_as_expected(
    tiny_sd15: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "black.png")
    edit = {"image": "./black.png", "instruction": "x", "expected": ["./black.png"]}
    path = write_recipe(tmp_path, tiny_sd15, edits=[edit])
    code, out, err = call(capsys, "run", path, "--out", tmp_path / "out", "--device", "cpu")
    assert (code, out) == (9, "")
    assert re.search(r"^error: .* fails 1 of 13 checks:\n  as_expected of edit 0 is 0\.\d+ ", err)
    assert "must be at most 0.1\nhint: " in err
    assert read_report(tmp_path / "out")["passed"] is False


def test_an_edit_may_have_steps_of_its_own(export: Path, tiny_sd15: Path) -> None:
    (plain,) = ONE
    edits = [
        plain,
        dataclasses.replace(plain, steps=3),
        dataclasses.replace(plain, timesteps=(999, 299)),
    ]
    options = CompareOptions(str(tiny_sd15 / "target"), steps=4, cache=False)
    verify(export, edits=edits, compare=options)
    rows = read_report(export)["edits"]
    for kind in ("merged", "target_few"):
        settings = [row["pictures"][kind]["settings"] for row in rows]
        assert [s["steps"] for s in settings] == [2, 3, 2]
        assert [s["timesteps"] for s in settings] == [None, None, [999, 299]]
    assert [row["pictures"]["target"]["settings"]["steps"] for row in rows] == [4, 4, 4]
    page = (export / "report.html").read_text()
    assert re.search(r">Steps<.{0,80}>2, 3<", page, re.DOTALL)
    assert page.count("Merged, 2 steps") == 2 * page.count("Merged, 3 steps") > 0


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"steps": 51}, r"edits\[0\].steps: 51 is not within 1 to 50"),
        ({"timesteps": [1, 2]}, r"edits\[0\].timesteps: \[1, 2\] must fall strictly"),
        ({"steps": 2, "timesteps": [2, 1]}, r"edits\[0\]: name steps or timesteps, not both"),
    ],
)
def test_bad_steps_of_an_edit_are_a_recipe_error(
    tiny_sd15: Path, tmp_path: Path, fields: dict[str, Any], words: str
) -> None:
    edit = {"image": "./a.png", "instruction": "x", **fields}
    with pytest.raises(RecipeError, match=words):
        load_recipe(write_recipe(tmp_path, tiny_sd15, edits=[edit]))


def test_a_bad_limit_is_a_recipe_error(tiny_sd15: Path, tmp_path: Path) -> None:
    edit = {"image": "./a.png", "instruction": "x", "expected_limit": -0.5}
    with pytest.raises(
        RecipeError, match=r"verify.edits\[0\].expected_limit: -0.5 is not a number"
    ):
        load_recipe(write_recipe(tmp_path, tiny_sd15, edits=[edit]))


@pytest.mark.parametrize("name", ["report.html", "report.json"])
def test_a_report_of_the_users_own_is_not_replaced(
    tiny_sd15: Path, tmp_path: Path, name: str
) -> None:
    folder = Path(shutil.copytree(tiny_sd15 / "target", tmp_path / "mine"))
    text = "<h1>my own</h1>" if name == "report.html" else '{"mine": 1}'
    (folder / name).write_text(text)
    with pytest.raises(OutputExistsError, match=rf"{name} is there already, and no report of this"):
        verify_folder(folder, device="cpu")
    assert (folder / name).read_text() == text
    assert not (folder / "images").exists()
