"""Full-size models under their true key names: minutes and gigabytes, so opted in."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open

pytestmark = pytest.mark.slow
WEIGHTS = "diffusion_pytorch_model.safetensors"
COUNTS = {"sd15": (686, 278), "sdxl": (1680, 788)}
SIZES = {"sd15": 8e9, "sdxl": 23e9}
PEAK_BYTES = 450_000_000


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from scripts.make_synthetic import make_synthetic

    folder = tmp_path_factory.mktemp("full") / request.param
    if shutil.disk_usage(folder.parent).free < SIZES[request.param]:
        pytest.skip(f"needs {SIZES[request.param] / 1e9:.0f} GB of disk")
    make_synthetic(folder, request.param)
    yield folder
    shutil.rmtree(folder)


def run(folder: Path, models: dict[str, str | None], *words: str) -> tuple[Path, dict[str, object]]:
    recipe = folder / "full.yaml"
    recipe.write_text(yaml.safe_dump({"name": "full", "models": models}))
    out = folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "merge", "run", str(recipe), "--out", str(out), *words]
    subprocess.run([*command, "-q", "--no-verify"], check=True)
    return out, json.loads((out / "run.json").read_text())


def test_full_delta(models: Path) -> None:
    keys, _ = COUNTS[models.name]
    names = {"base": "./base", "distilled": "./distilled", "target": "./target"}
    out, record = run(models, names, "weight=0.5", "--threads", "2")
    assert record["peak_rss_bytes"] < PEAK_BYTES
    files = [models / role / WEIGHTS for role in ("target", "distilled", "base")]
    with (
        safe_open(out / "unet" / WEIGHTS, "pt") as merged,
        safe_open(files[0], "pt") as target,
        safe_open(files[1], "pt") as distilled,
        safe_open(files[2], "pt") as base,
    ):
        assert len(merged.keys()) == keys
        for key in merged.keys():  # noqa: SIM118
            expected = target.get_tensor(key)
            if key != "conv_in.weight":
                delta = distilled.get_tensor(key).float() - base.get_tensor(key).float()
                expected = (expected.float() + delta * 0.5).half()
            actual = merged.get_tensor(key)
            assert torch.equal(actual.view(torch.int16), expected.view(torch.int16)), key


def test_lora(models: Path) -> None:
    keys, modules = COUNTS[models.name]
    names = {"base": None, "distilled": "./lora.safetensors", "target": "./target"}
    out, record = run(models, names, "--threads", "2")
    assert record["peak_rss_bytes"] < PEAK_BYTES
    manifest = json.loads((out / "merge_manifest.json").read_text())
    assert manifest["counts"]["lora"] == modules
    assert manifest["counts"]["copy"] == keys - modules
    with (
        safe_open(out / "unet" / WEIGHTS, "pt") as merged,
        safe_open(models / "target" / WEIGHTS, "pt") as target,
        safe_open(models / "lora.safetensors", "pt") as lora,
    ):
        names = list(merged.keys())
        stems = {"lora_unet_" + k.removesuffix(".weight").replace(".", "_"): k for k in names}
        changed = {name.split(".lora_down")[0] for name in lora.keys() if "lora_down" in name}  # noqa: SIM118
        assert len(changed) == modules
        for stem in sorted(changed)[::7]:
            up = lora.get_tensor(f"{stem}.lora_up.weight").double().flatten(1)
            down = lora.get_tensor(f"{stem}.lora_down.weight").double().flatten(1)
            before = target.get_tensor(stems[stem])
            delta = ((up @ down) * (8 / 64)).float().view_as(before)
            expected = (before.float() + delta).half()
            assert torch.equal(merged.get_tensor(stems[stem]), expected), stem
