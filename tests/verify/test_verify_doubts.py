"""What only warns: noise, negative weights, base and distilled swapped; on models that can edit."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from merge import load_recipe, run_recipe, verify_folder
from merge.editor.batches import edit
from merge.editor.load import load_editor
from merge.editor.settings import EditSettings
from merge.editor.vae import encode_pictures
from merge.errors import VerificationError
from merge.verify.drawings import draw_picture
from merge.verify.model import Check
from merge.verify.residual import Sample, make_sample, noise_left
from merge.verify.verdict import describe, not_judged, verdict
from merge.verify.weights import load_weights
from scripts.make_tiny import _random_state

DEMO = Path(__file__).resolve().parents[2] / "recipes" / "demo"
UNET = "unet/diffusion_pytorch_model.safetensors"
NOISE = {"noise_left", "noise_left_by_target"}
DOUBTS = {*NOISE, "weight_not_negative", "base_is_nearer"}


def write_recipe(folder: Path, **changes: Any) -> Path:
    """Write the demo's recipe with the pictures that come with the tool."""
    names = {"base": DEMO / "base", "distilled": DEMO / "distilled", "target": DEMO / "target"}
    tree = {
        "name": "doubt",
        "weight": 0.5,
        "models": {name: str(path) for name, path in names.items()},
        "scheduler": {"config": {"prediction_type": "v_prediction"}},
        "verify": {"resolution": 32, "guidance_scale": 1.5},
        **changes,
    }
    path = folder / "doubt.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def random_target(folder: Path) -> Path:
    """Copy the demo's target with a UNet of random weights."""
    target = Path(shutil.copytree(DEMO / "target", folder / "random"))
    with torch.device("meta"):
        config = json.loads((target / "unet" / "config.json").read_text())
        unet = diffusers.UNet2DConditionModel.from_config(config)
    state = {key: torch.from_numpy(value) for key, value in _random_state(unet, 5).items()}
    save_file(state, target / UNET, {"format": "pt"})
    return target


def read_report(folder: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return report


def doubts(folder: Path) -> dict[str, bool]:
    """Return the checks that only warn, each with whether it passed."""
    checks = read_report(folder)["checks"]
    return {c["name"]: c["passed"] for c in checks if c["severity"] == "warned"}


def call(*words: object) -> tuple[int, str, str]:
    command = [sys.executable, "-m", "merge", *map(str, words)]
    child = subprocess.run(command, capture_output=True, text=True)
    return child.returncode, child.stdout, child.stderr


def merge_demo(folder: Path, name: str = "demo", *overrides: str) -> Path:
    recipe = load_recipe(name, overrides)
    return run_recipe(recipe, folder / "out", device="cpu", verify=False).folder


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export that edits, which nothing changes."""
    return merge_demo(tmp_path_factory.mktemp("demo"))


# Whole folders ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "overrides", "has_base"),
    [
        ("demo", (), True),
        ("demo", ("weight=1.5",), True),
        # Nothing is added, so base and distilled are not even read.
        ("demo", ("weight=0", "allow_noop=true"), False),
        ("demo-lora", (), False),
    ],
)
def test_real_merges_leave_little_noise(
    tmp_path: Path, name: str, overrides: tuple[str, ...], has_base: bool
) -> None:
    out = merge_demo(tmp_path, name, *overrides)
    verify_folder(out, device="cpu", target_weights=[DEMO / "target" / UNET], strict=True)
    report = read_report(out)
    values = [check["value"] for check in report["checks"] if check["name"] in NOISE]
    assert len(values) == 2
    # A wide margin to the limit of 0.5; measured 0.03 to 0.1.
    assert max(values) < 0.2
    assert report["warnings"] == []
    assert doubts(out) == dict.fromkeys(DOUBTS if has_base else DOUBTS - {"base_is_nearer"}, True)


def test_random_weights_are_not_green(tmp_path: Path) -> None:
    models = {"base": str(DEMO / "base"), "distilled": str(DEMO / "distilled")}
    models["target"] = str(random_target(tmp_path))
    path, out = write_recipe(tmp_path, models=models), tmp_path / "out"
    code, stdout, err = call("run", path, "--out", out, "--device", "cpu")
    assert (code, stdout) == (0, f"{out}\n")
    lines = err.splitlines()
    assert any(line.startswith("warning: noise_left is 0.9") for line in lines)
    assert any(line.startswith("warning: noise_left_by_target is ") for line in lines)
    assert "checks passed, with a warning: pictures look like noise" in err
    assert "Not judged: whether the edits are what was asked for." in lines
    report = read_report(out)
    assert report["passed"] is True
    assert report["schema_version"] == 1
    assert len(report["warnings"]) == 2
    assert all("pictures look like noise" in line for line in report["warnings"])
    assert report["summary"]["checks_warned"] == 2
    assert {name for name, passed in doubts(out).items() if not passed} == NOISE
    page, card = (out / "report.html").read_text(), (out / "README.md").read_text()
    assert 'class="verdict warned"' in page
    assert "<title>doubt – warned</title>" in page
    assert "**Warning**: " in card
    assert "| noise left |" in card
    assert "1 of 1 warned |" in card
    code, _, err = call("verify", out, "--device", "cpu", "--strict", "-q")
    assert code == 9
    first, line, hint = err.splitlines()
    assert first == f"error: the merged model in {out} has 1 warning of 21 checks:"
    assert line.startswith("  noise_left is 0.9")
    assert hint.startswith("hint: see ")


def test_the_target_tells_pictures_of_another_models_noise(tmp_path: Path) -> None:
    folder = random_target(tmp_path)
    verify_folder(folder, device="cpu", target_weights=[DEMO / "target" / UNET])
    values = {check["name"]: check["value"] for check in read_report(folder)["checks"]}
    # By itself it is told from a good one with less of a margin than by the target.
    assert values["noise_left"] > 0.9
    assert values["noise_left_by_target"] > 2


def test_a_target_of_other_shapes_is_not_asked(tmp_path: Path, demo: Path) -> None:
    out = Path(shutil.copytree(demo, tmp_path / "out"))
    verify_folder(out, device="cpu", target_weights=[DEMO / "base" / Path(UNET).name])
    assert set(doubts(out)) == DOUBTS - {"noise_left_by_target"}


@pytest.mark.parametrize("name", ["demo", "demo-lora"])
def test_a_negative_weight_is_not_green(tmp_path: Path, name: str) -> None:
    out = tmp_path / "out"
    words = ["run", name, "weight=-0.5", "--out", out, "--device", "cpu"]
    code, _, err = call(*words)
    assert code == 0
    said = "warning: weight -0.5 is negative: it takes the few-step skill away instead of adding it"
    assert err.splitlines()[0] == said
    assert err.count("\nwarning: ") == 0
    assert "with a warning: the weight is negative" in err
    # It still edits: what cannot be told from a good merge is not claimed to be.
    assert {name for name, passed in doubts(out).items() if not passed} == {"weight_not_negative"}


def test_base_and_distilled_swapped_are_not_green(tmp_path: Path) -> None:
    models = {"base": str(DEMO / "distilled"), "distilled": str(DEMO / "base")}
    models["target"] = str(DEMO / "target")
    path, out = write_recipe(tmp_path, models=models), tmp_path / "out"
    code, _, err = call("run", path, "--out", out, "--device", "cpu")
    assert code == 0
    assert err.startswith("warning: target is nearer to distilled than to base (0.25")
    assert err.count("\nwarning: ") == 0
    assert "with a warning: base and distilled look swapped" in err
    assert {name for name, passed in doubts(out).items() if not passed} == {"base_is_nearer"}
    (origin,) = json.loads((out / "run.json").read_text())["origins"]
    assert origin["to_distilled"] < origin["to_base"]
    with pytest.raises(VerificationError, match=r"base_is_nearer is 0\.8\d+ and must"):
        verify_folder(out, device="cpu", strict=True)
    # Nothing to warn of, and so no word of it, the right way round.
    (out / "run.json").write_text("{")
    verify_folder(out, device="cpu", strict=True)


def test_strict_passes_what_is_green_and_needs_edits(tmp_path: Path, demo: Path) -> None:
    out = Path(shutil.copytree(demo, tmp_path / "out"))
    code, stdout, err = call("verify", out, "--device", "cpu", "--strict")
    assert (code, stdout) == (0, f"{out}\n")
    *_, proven, missing = err.splitlines()
    proofs = "files as recorded, finite, repeats, not blank, changes pictures, no noise"
    assert proven == f"21 checks passed: {proofs}"
    assert missing == "Not judged: whether the edits are what was asked for."
    code, _, err = call("verify", out, "--files", "--strict")
    assert code == 2
    assert "--strict have no use" in err


# The measurement -------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["sd15", "sdxl"])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_the_share_is_that_of_diffusers(
    request: pytest.FixtureRequest, arch: str, kind: str
) -> None:
    editor = load_editor(request.getfixturevalue(f"tiny_{arch}") / "target", device="cpu")
    editor.pipeline.scheduler.register_to_config(prediction_type=kind)
    sample = make_one(editor, 64)
    oracle = diffusers.DDIMScheduler.from_config(
        editor.pipeline.scheduler.config, clip_sample=False, set_alpha_to_one=True
    )
    oracle.set_timesteps(1000)
    noise = torch.randn(sample.latents.shape, generator=torch.Generator().manual_seed(0x5EED0FF5))
    noisy = oracle.add_noise(sample.latents, noise, torch.tensor([100]))
    conditions = sample.conditions
    assert (conditions.added is not None) == (arch == "sdxl")
    with torch.inference_mode():
        output = editor.pipeline.unet(
            torch.cat([noisy, conditions.image_latents], 1),
            100,
            conditions.states,
            added_cond_kwargs=conditions.added,
        ).sample
    clean = oracle.step(output, 100, noisy).pred_original_sample
    found = (noisy - oracle.alphas_cumprod[100].sqrt() * clean) / (
        1 - oracle.alphas_cumprod[100]
    ).sqrt()
    error = np.square((found - noise).double().numpy()).mean()
    expected = error / np.square(noise.double().numpy()).mean()
    assert noise_left(editor, [sample]) == pytest.approx(expected, rel=1e-4)


def make_one(editor: Any, size: int, latents: np.ndarray | None = None) -> Sample:
    picture = draw_picture("house", size)
    result = edit(editor, picture, "make it night", EditSettings(steps=4, resolution=size))
    if latents is not None:
        result = dataclasses.replace(result, latents=latents.reshape(result.latents.shape))
    with torch.inference_mode():
        image_latents = encode_pictures(editor, [result.source])
    return make_sample(editor, result, "make it night", image_latents)


def test_a_good_model_finds_no_noise_in_noise(demo: Path) -> None:
    editor = load_editor(demo, device="cpu")
    assert (noise_left(editor, [make_one(editor, 32)]) or 1) < 0.2
    random = np.random.default_rng(0).standard_normal(256, dtype=np.float32)
    assert (noise_left(editor, [make_one(editor, 32, random)]) or 0) > 1


def test_what_cannot_be_measured_is_not(demo: Path) -> None:
    editor = load_editor(demo, device="cpu")
    good, broken = make_one(editor, 32), make_one(editor, 32, np.full(256, np.nan, np.float32))
    assert noise_left(editor, [broken]) is None
    assert noise_left(editor, [good, broken]) == noise_left(editor, [good])
    editor.pipeline.scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    assert noise_left(editor, [good]) is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_weights_are_put_in_place(tmp_path: Path, dtype: torch.dtype) -> None:
    unet = diffusers.UNet2DConditionModel.from_pretrained(DEMO / "base", dtype=torch.float32)
    state = {
        key: value.to(dtype) for key, value in load_file(DEMO / "base" / Path(UNET).name).items()
    }
    state = {key: value * 2 for key, value in state.items()}
    save_file(state, tmp_path / "two.safetensors")
    assert load_weights(unet, [tmp_path / "two.safetensors"])
    for key, value in unet.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, state[key].float()), key
    del state["conv_in.bias"]
    state = {key: value * 2 for key, value in state.items()}
    save_file(state, tmp_path / "few.safetensors")
    before = {key: value.clone() for key, value in unet.state_dict().items()}
    assert not load_weights(unet, [tmp_path / "few.safetensors"])
    assert all(torch.equal(value, before[key]) for key, value in unet.state_dict().items())


# Words -----------------------------------------------------------------------------------------


def checks(*found: tuple[str, bool, int | None]) -> list[Check]:
    return [Check(name, 1, 2, passed, index) for name, passed, index in found]


def test_a_verdict_claims_what_was_measured() -> None:
    assert verdict(checks(("weights_finite", True, None))) == "1 check passed: finite"
    both = checks(("noise_left", False, None), ("weight_not_negative", False, None))
    assert verdict([*both, *checks(("not_black", True, 0))]) == (
        "1 of 3 checks passed, with warnings: pictures look like noise, the weight is negative"
    )
    assert verdict([*both, *checks(("not_black", False, 0))]) == "1 of 3 checks failed"
    assert describe(both)[0] == "noise_left is 1 and must be at most 2: pictures look like noise"


def test_what_was_not_judged_is_said() -> None:
    black = [("not_black", True, index) for index in range(3)]
    expected = [("as_expected", True, index) for index in range(3)]
    assert not_judged(checks(*black)) == "Not judged: whether the edits are what was asked for."
    assert not_judged(checks(*black, *expected[:2])) == (
        "Not judged: whether 1 of 3 edits are what was asked for."
    )
    assert not_judged(checks(*black, *expected)) == ""


@pytest.mark.parametrize(
    "run",
    [
        {"origins": 3},
        {"origins": [3, {}, {"position": "x"}, {"position": True}]},
        {"origins": [{"position": float("nan")}, {"position": 1.7}]},
        [],
    ],
)
def test_a_run_record_that_somebody_changed_proves_nothing(
    tmp_path: Path, demo: Path, run: Any
) -> None:
    from merge.records.folder import OutputRecords
    from merge.verify.record import check_record

    (tmp_path / "run.json").write_text(json.dumps(run))
    assert check_record({"weight": "much"}, OutputRecords(tmp_path).run) == []
    assert check_record({}, OutputRecords(tmp_path / "nowhere").run) == []
