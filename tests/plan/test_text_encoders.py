"""Text encoders merged beside the UNet: full deltas of whole pipelines."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from merge import load_recipe, run_recipe
from merge.errors import PlanError
from merge.plan.build import build_plan
from merge.plan.render import plan_to_json
from merge.sources.resolve import resolve_sources
from tests.mini import bits, contents, numpy_float32, numpy_round

TEXT = "text_encoder/model.safetensors"
UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def models(tiny_sd15: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Base and distilled as folders with a UNet and a text encoder each."""
    root = tmp_path_factory.mktemp("pipelines")
    shutil.copytree(tiny_sd15 / "target", root / "target")
    text = load_file(tiny_sd15 / "target" / TEXT)
    generator = torch.Generator().manual_seed(3)
    for role in ("base", "distilled"):
        shutil.copytree(tiny_sd15 / role, root / role / "unet")
        (root / role / "text_encoder").mkdir()
        moved = {
            key: value
            if not value.is_floating_point()
            else (value.float() + torch.randn(value.shape, generator=generator) * 0.01).half()
            for key, value in text.items()
        }
        save_file(moved, root / role / TEXT, {"format": "pt"})
    return root


def write(folder: Path, root: Path, **changes: object) -> Path:
    tree = {
        "name": "both",
        "models": {role: str(root / role) for role in ("base", "distilled", "target")},
        "components": ["unet", "text_encoder"],
        "verify": {"resolution": 64},
        **changes,
    }
    path = folder / "both.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def expected(models: Path, name: str, weight: float) -> dict[str, np.ndarray]:
    tensors = {role: load_file(models / role / name) for role in ("target", "distilled", "base")}
    found = {}
    for key, target in tensors["target"].items():
        if target.is_floating_point() and target.shape == tensors["base"][key].shape:
            delta = numpy_float32(tensors["distilled"][key]) - numpy_float32(tensors["base"][key])
            values = numpy_float32(target) + delta * np.float32(weight)
            found[key] = numpy_round(values, torch.float16)
    return found


def test_both_components_are_merged_and_the_export_edits(models: Path, tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, models, weight=0.5, block_weights={"BASE": 0.25}))
    result = run_recipe(recipe, tmp_path / "out", device="cpu")
    assert result.verified is True
    merged = load_file(tmp_path / "out" / TEXT)
    for key, values in expected(models, TEXT, 0.25).items():
        np.testing.assert_array_equal(bits(merged[key]), values, key)
    assert merged.keys() == load_file(models / "target" / TEXT).keys()
    unet = load_file(tmp_path / "out" / UNET)
    key = "mid_block.resnets.0.conv1.weight"
    np.testing.assert_array_equal(bits(unet[key]), expected(models, UNET, 0.5)[key])
    manifest = json.loads((tmp_path / "out" / "merge_manifest.json").read_text())
    assert {TEXT, UNET, "text_encoder/config.json"} <= manifest["files"].keys()
    assert TEXT in manifest["inputs"]["base"]["files"]
    assert TEXT in manifest["inputs"]["target"]["files"]
    header = (tmp_path / "out" / TEXT).read_bytes()[:4000]
    assert result.recipe_digest.encode() in header


def test_a_text_encoder_can_be_spelled_flat(models: Path, tmp_path: Path) -> None:
    from transformers import CLIPTextModel

    plain = load_recipe(write(tmp_path, models))
    run_recipe(plain, tmp_path / "plain", device="cpu", verify=False)
    flat = tmp_path / "flat"
    shutil.copytree(models, flat)
    for role in ("base", "distilled"):
        tensors = load_file(flat / role / TEXT)
        renamed = {toggled(key): value for key, value in tensors.items()}
        assert renamed.keys() != tensors.keys()
        save_file(renamed, flat / role / TEXT, {"format": "pt"})
    run_recipe(load_recipe(write(tmp_path, flat)), tmp_path / "mixed", device="cpu", verify=False)
    before, after = (load_file(tmp_path / name / TEXT) for name in ("plain", "mixed"))
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    CLIPTextModel.from_pretrained(tmp_path / "mixed" / "text_encoder")


def toggled(key: str) -> str:
    prefix = "text_model."
    return key.removeprefix(prefix) if key.startswith(prefix) else prefix + key


def test_the_plan_names_components(models: Path, tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, models, exclude=["text_encoder.*position_embedding*"]))
    tree = plan_to_json(build_plan(recipe, resolve_sources(recipe)), 0)
    counts = {row["component"] for row in tree["tensors"]}
    assert counts == {"unet", "text_encoder"}
    excluded = [row for row in tree["tensors"] if row["reason"].startswith("excluded")]
    assert [row["component"] for row in excluded] == ["text_encoder"]
    left = {(i["model"], i["key"]) for i in tree["left_out"] if "position_embed" in i["key"]}
    key = "text_encoder.text_model.embeddings.position_embedding.weight"
    assert left == {("base", key), ("distilled", key)}


def test_a_component_that_nothing_changes_is_an_error(
    models: Path, tiny_sd15: Path, tmp_path: Path
) -> None:
    parts = {role: str(tiny_sd15 / role) for role in ("base", "distilled", "target")}
    recipe = load_recipe(write(tmp_path, models, models=parts))
    with pytest.raises(PlanError, match="components: nothing is added to text_encoder"):
        build_plan(recipe, resolve_sources(recipe))


def test_only_one_parent_with_a_text_encoder_is_an_error(
    models: Path, tiny_sd15: Path, tmp_path: Path
) -> None:
    parts = {
        "base": str(tiny_sd15 / "base"),
        "distilled": str(models / "distilled"),
        "target": str(models / "target"),
    }
    recipe = load_recipe(write(tmp_path, models, models=parts))
    with pytest.raises(PlanError, match=r"text_model\.\S+\.weight: missing in base"):
        build_plan(recipe, resolve_sources(recipe))


def test_a_target_without_the_component_is_an_error(models: Path, tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, models, components=["unet", "text_encoder_2"]))
    with pytest.raises(PlanError, match="components: text_encoder_2 cannot be merged: the target"):
        build_plan(recipe, resolve_sources(recipe))


def test_the_order_of_components_changes_no_byte(models: Path, tmp_path: Path) -> None:
    outputs = []
    for name, components in (
        ("one", ["unet", "text_encoder"]),
        ("two", ["text_encoder", "unet"]),
    ):
        changes = {"components": components, "output": {"single_file": True}}
        recipe = load_recipe(write(tmp_path, models, **changes))
        assert recipe.components == ["unet", "text_encoder"]
        run_recipe(recipe, tmp_path / name, device="cpu", verify=False)
        outputs.append(contents(tmp_path / name))
    assert "both.safetensors" in outputs[0]
    assert outputs[0] == outputs[1]


def test_a_text_encoder_alone_is_merged(models: Path, tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, models, components=["text_encoder"], weight=0.5))
    run_recipe(recipe, tmp_path / "out", device="cpu", verify=False)
    merged = load_file(tmp_path / "out" / TEXT)
    for key, values in expected(models, TEXT, 0.5).items():
        np.testing.assert_array_equal(bits(merged[key]), values, key)
    unet, before = load_file(tmp_path / "out" / UNET), load_file(models / "target" / UNET)
    assert unet.keys() == before.keys()
    assert all(torch.equal(unet[key], value) for key, value in before.items())
