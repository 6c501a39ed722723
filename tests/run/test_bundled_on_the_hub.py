"""The bundled recipes, by their names, on tiny stand-ins of the repositories that they name."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from merge import load_recipe
from merge.recipe.bundled import bundled_recipes
from tests.hub import HubServer
from tests.stand_ins import LORA, UNET, write_hub

SD15 = "timbrooks/instruct-pix2pix"
SDXL = "diffusers/sdxl-instructpix2pix-768"
BRUSH = "vinesmsuic/magicbrush-jul7"
BASE = "stabilityai/stable-diffusion-xl-base-1.0"
FP16 = f"{UNET}.fp16.safetensors"
# A key that every architecture has and both a full delta and a LoRA change.
KEY = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight"
# What a pipeline's own weights are fetched in, and what beside them. The scheduler is read too.
PIPELINES = {
    SD15: {
        *("feature_extractor/preprocessor_config.json", "model_index.json"),
        *("safety_checker/config.json", "safety_checker/model.safetensors"),
        *("scheduler/scheduler_config.json", "text_encoder/config.json"),
        *("text_encoder/model.safetensors", "unet/config.json", f"unet/{UNET}.safetensors"),
        *("vae/config.json", f"vae/{UNET}.safetensors"),
        *("tokenizer/merges.txt", "tokenizer/special_tokens_map.json"),
        *("tokenizer/tokenizer_config.json", "tokenizer/vocab.json"),
    },
}
PIPELINES[BRUSH] = {
    name.replace("/model.safetensors", "/pytorch_model.bin").replace(".safetensors", ".bin")
    for name in PIPELINES[SD15]
}
PIPELINES[SDXL] = {
    *(name for name in PIPELINES[SD15] if not name.startswith(("safety_", "feature_"))),
    *("text_encoder_2/config.json", "text_encoder_2/model.safetensors"),
    *("tokenizer_2/merges.txt", "tokenizer_2/special_tokens_map.json"),
    *("tokenizer_2/tokenizer_config.json", "tokenizer_2/vocab.json"),
}
# Of a pipeline that only lends its UNet.
LENT = {"scheduler/scheduler_config.json", "unet/config.json", f"unet/{FP16}"}
# Recipe to the repositories beside the target's, with the files that are needed of each.
NEEDED: dict[str, tuple[str, dict[str, set[str]]]] = {
    "sd15-lcm-lora": (SD15, {"latent-consistency/lcm-lora-sdv1-5": {LORA}}),
    "sd15-hyper-lora": (SD15, {"ByteDance/Hyper-SD": {"Hyper-SD15-4steps-lora.safetensors"}}),
    "sd15-tcd-lora": (SD15, {"h1t/TCD-SD15-LoRA": {LORA}}),
    "magicbrush-lcm-lora": (BRUSH, {"latent-consistency/lcm-lora-sdv1-5": {LORA}}),
    "sdxl-turbo": (SDXL, {BASE: LENT, "stabilityai/sdxl-turbo": LENT}),
    "sdxl-lcm": (SDXL, {BASE: LENT, "latent-consistency/lcm-sdxl": {"config.json", FP16}}),
    "sdxl-lcm-lora": (SDXL, {"latent-consistency/lcm-lora-sdxl": {LORA}}),
    "sdxl-lightning": (
        SDXL,
        {BASE: LENT, "ByteDance/SDXL-Lightning": {"sdxl_lightning_4step_unet.safetensors"}},
    ),
    "sdxl-dmd2": (SDXL, {BASE: LENT, "tianweiy/DMD2": {"dmd2_sdxl_4step_unet_fp16.bin"}}),
}
# The closing edit takes seconds, so one recipe of each architecture has it.
VERIFIED = ("sd15-lcm-lora", "sdxl-turbo")


@pytest.fixture(scope="module")
def hub(
    tiny_sd15: Path, tiny_sdxl: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[HubServer]:
    root = tmp_path_factory.mktemp("hub")
    write_hub(root, tiny_sd15, tiny_sdxl)
    with HubServer(root) as server:
        yield server


def command(
    hub: HubServer, home: Path, *words: object, offline: bool = False
) -> subprocess.CompletedProcess[str]:
    child = subprocess.run(
        [sys.executable, "-m", "merge", *map(str, words)],
        capture_output=True,
        text=True,
        env=hub.environment(home, offline=offline),
        cwd=home.parent,
        timeout=240,
    )
    assert child.returncode == 0, child.stderr
    return child


def read(path: Path) -> dict[str, torch.Tensor]:
    if path.suffix == ".safetensors":
        return load_file(path)
    tensors: dict[str, torch.Tensor] = torch.load(path, weights_only=True)
    return tensors


def float64(tensor: torch.Tensor) -> np.ndarray:
    return tensor.to(torch.float64).numpy()


def expected_delta(hub: HubServer, repo: str, name: str) -> np.ndarray:
    """Return what the distilled model adds to KEY at weight 1, from the repositories' files."""
    tensors = read(hub.root / repo / name)
    if KEY in tensors:
        base = read(hub.root / BASE / "unet" / FP16)
        return float64(tensors[KEY]) - float64(base[KEY])
    module = KEY.removesuffix(".weight")
    kohya = f"lora_unet_{module.replace('.', '_')}"
    if f"{kohya}.alpha" in tensors:
        up, down = (float64(tensors[f"{kohya}.lora_{side}.weight"]) for side in ("up", "down"))
        return up @ down * float(tensors[f"{kohya}.alpha"]) / down.shape[0]
    up, down = (float64(tensors[f"unet.{module}.lora_{side}.weight"]) for side in ("B", "A"))
    return up @ down


def test_every_recipe_of_the_hub_is_tried() -> None:
    on_hub = {
        name
        for name, path in bundled_recipes().items()
        if load_recipe(path).models.target.repo is not None
    }
    assert on_hub == NEEDED.keys()


# Layouts and forms that no other recipe has; the rest is of the slow run.
USUAL = ("sd15-lcm-lora", "magicbrush-lcm-lora", "sdxl-turbo", "sdxl-lcm", "sdxl-dmd2")


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n in USUAL else pytest.mark.slow) for n in NEEDED],
)
def test_a_bundled_recipe_runs_from_its_name_alone(
    hub: HubServer, tmp_path: Path, name: str
) -> None:
    target, others = NEEDED[name]
    home, out = tmp_path / "home", tmp_path / "out"
    # Tiny models make pictures of any size; the recipe's would take minutes without a GPU.
    words = ["verify.resolution=64", "--out", out]
    hub.downloads.clear()
    hub.transfers.clear()
    plan = json.loads(command(hub, home, "plan", name, "--json").stdout)
    assert plan["counts"]["delta"] + plan["counts"]["lora"] > 0
    for sent in hub.transfers:
        if sent.name.endswith((".safetensors", ".bin")):
            size = (hub.root / sent.repo / sent.name).stat().st_size
            # Headers of the tiny LoRAs are nearly half of the file.
            assert sent.length < size / 2, sent
    hub.downloads.clear()
    command(hub, home, "run", name, *words, *([] if name in VERIFIED else ["--no-verify"]))
    needed = {target: PIPELINES[target], **others}
    for repo, names in needed.items():
        snapshot = home / "hub" / f"models--{repo.replace('/', '--')}" / "snapshots"
        (folder,) = snapshot.iterdir()
        cached = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if not p.is_dir()}
        assert cached == names, repo
    assert {download.repo for download in hub.downloads} <= needed.keys()
    manifest = json.loads((out / "merge_manifest.json").read_text())
    origins = {(model["repo"], model["commit"]) for model in manifest["inputs"].values()}
    assert origins == {(repo, hub.commit(repo)) for repo in needed}
    assert not [path for path in out.rglob("*") if path.suffix in (".bin", ".ckpt", ".pt")]
    recipe = load_recipe(name)
    scheduler = json.loads((out / "scheduler" / "scheduler_config.json").read_text())
    assert scheduler["_class_name"] == recipe.scheduler.class_name
    assert scheduler.items() >= recipe.scheduler.config.items()
    index = json.loads((out / "model_index.json").read_text())
    assert index["scheduler"] == ["diffusers", recipe.scheduler.class_name]
    assert "InstructPix2Pix" in index["_class_name"]
    # The formula, in float64 and by another way.
    distilled, files = list(others.items())[-1]
    (weights,) = (file for file in files if file.endswith((".safetensors", ".bin")))
    suffix = ".bin" if target == BRUSH else ".safetensors"
    before = float64(read(hub.root / target / "unet" / f"{UNET}{suffix}")[KEY])
    delta = expected_delta(hub, distilled, weights)
    merged = read(out / "unet" / f"{UNET}.safetensors")[KEY]
    assert merged.dtype == torch.float16
    assert np.abs(delta).max() > 1e-3
    wanted = before + recipe.weight * delta
    np.testing.assert_allclose(float64(merged), wanted, rtol=2**-10, atol=1e-6)
    command(hub, home, "verify", out, "--files")
    if name in VERIFIED:
        assert json.loads((out / "report.json").read_text())["passed"] is True
        # All that is needed is in the cache by now.
        again = command(hub, home, "reproduce", out, "--json", offline=True)
        assert json.loads(again.stdout)["reproduced"] is True
    if name == "magicbrush-lcm-lora":
        assert load_file(out / "vae" / f"{UNET}.safetensors")
