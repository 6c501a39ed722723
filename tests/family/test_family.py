"""That an architecture is data: a model of another kind merges after one value is added."""

from __future__ import annotations

import ast
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from diffusers import AutoencoderKL, FluxTransformer2DModel, LCMScheduler
from safetensors.torch import load_file

import merge
from merge import build_plan, load_recipe, merge_in_memory, prepare_run, reproduce, run_recipe
from merge.errors import PlanError, RecipeError
from merge.family import registry
from merge.family.model import Component, Family, GuidanceEmbedding
from merge.plan.render import render_plan
from merge.records.describe import describe_path
from merge.sources.resolve import resolve_sources
from tests.mini import bits, contents, numpy_float32, numpy_round

WEIGHTS = "diffusion_pytorch_model.safetensors"
# Everything that the tool has to know of a diffusion transformer.
DIT = Family(
    name="tiny-dit",
    title="Tiny DiT",
    is_like=lambda shapes: "transformer_blocks.0.attn.to_q.weight" in shapes,
    sign="transformer_blocks.0.attn.to_q.weight",
    components=(
        Component(
            "transformer", "transformer", WEIGHTS, "FluxTransformer2DModel", is_mergeable=True
        ),
        Component("vae", "VAE", WEIGHTS),
    ),
    pipeline_class="FluxKontextPipeline",
    plain_class="FluxPipeline",
    modelspec=("tiny-dit", "tiny-dit-edit"),
    tag="tiny-dit",
    resolution=32,
    context="context_embedder.weight",
    guidance=GuidanceEmbedding("guidance.none", "linear", "bias", "guidance_embeds"),
    config_changes={"is_distilled": True},
    can_edit=False,
)


@pytest.fixture(autouse=True)
def dit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "FAMILIES", (*registry.FAMILIES, DIT))


def transformer(seed: int, like: Any = None) -> Any:
    torch.manual_seed(seed)
    model = FluxTransformer2DModel(
        in_channels=4,
        num_layers=2,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        pooled_projection_dim=8,
        axes_dims_rope=(2, 2, 4),
    )
    if like is not None:
        state = {k: v + 0.1 * model.state_dict()[k] for k, v in like.state_dict().items()}
        model.load_state_dict(state)
    return model.half()


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """Write base, distilled and target pipelines, their transformers in shards."""
    base = transformer(1)
    for role, model in {
        "base": base,
        "distilled": transformer(2, like=base),
        "target": transformer(3, like=base),
    }.items():
        folder = tmp_path / role
        model.save_pretrained(folder / "transformer", max_shard_size="8KB")
        vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4).half()
        vae.save_pretrained(folder / "vae")
        LCMScheduler().save_pretrained(folder / "scheduler")
        index = {
            "_class_name": "FluxKontextPipeline",
            "_diffusers_version": "0.42.0",
            "transformer": ["diffusers", "FluxTransformer2DModel"],
            "vae": ["diffusers", "AutoencoderKL"],
            "scheduler": ["diffusers", "LCMScheduler"],
        }
        (folder / "model_index.json").write_text(json.dumps(index))
    assert len(list((tmp_path / "target" / "transformer").glob("*.safetensors"))) > 1
    tree: dict[str, Any] = {
        "name": "dit",
        "weight": 0.7,
        "models": {"base": "./base", "distilled": "./distilled", "target": "./target"},
    }
    (tmp_path / "dit.yaml").write_text(yaml.safe_dump(tree))
    return tmp_path


def state(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted((folder / "transformer").glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def test_full_deltas_between_folders(models: Path, caplog: pytest.LogCaptureFixture) -> None:
    result = run_recipe(load_recipe(models / "dit.yaml"), models / "out", device="cpu")
    assert result.verified is None
    assert "cannot edit with Tiny DiT" in caplog.text
    target, base, distilled = (state(models / role) for role in ("target", "base", "distilled"))
    merged = load_file(models / "out" / "transformer" / WEIGHTS)
    assert merged.keys() == target.keys()
    weight = np.float32(0.7)
    for key, tensor in merged.items():
        delta = numpy_float32(distilled[key]) - numpy_float32(base[key])
        expected = numpy_float32(target[key]) + delta * weight
        np.testing.assert_array_equal(bits(tensor), numpy_round(expected, torch.float16))
    loaded = FluxTransformer2DModel.from_pretrained(models / "out" / "transformer")
    assert loaded.state_dict().keys() == merged.keys()
    config = json.loads((models / "out" / "transformer" / "config.json").read_text())
    assert config["is_distilled"] is True
    lock = yaml.safe_load((models / "out" / "recipe.lock.yaml").read_text())
    assert lock["recipe"]["components"] == ["transformer"]
    assert (models / "out" / "vae" / WEIGHTS).read_bytes() == (
        models / "target" / "vae" / WEIGHTS
    ).read_bytes()
    described = describe_path(models / "out")
    assert (described["architecture"], described["in_channels"]) == ("tiny-dit", None)
    assert reproduce(models / "out", device="cpu").recipe_digest == result.recipe_digest


def test_a_plan_and_patterns_by_key(models: Path) -> None:
    overrides = ["block_weights[single_transformer_blocks.*]=0.25", "exclude=[proj_out.*]"]
    recipe = load_recipe(models / "dit.yaml", overrides)
    plan = build_plan(recipe, resolve_sources(recipe))
    weights = {row.key: row.weight for row in plan.tensors}
    assert weights["single_transformer_blocks.0.attn.to_q.weight"] == 0.25
    assert weights["proj_out.weight"] is None
    assert plan.blocks == ()
    assert "recipe        dit (tiny-dit)" in render_plan(plan, 0)


def test_a_bare_transformer_and_a_model_of_another_kind(models: Path, tiny_sd15: Path) -> None:
    shutil.copytree(models / "target" / "transformer", models / "bare")
    bare = load_recipe(models / "dit.yaml", [f"models.target={models / 'bare'}"])
    run_recipe(bare, models / "alone", device="cpu", verify=False)
    assert sorted(p.name for p in (models / "alone").iterdir() if p.is_dir()) == ["transformer"]
    other = load_recipe(models / "dit.yaml", [f"models.distilled={tiny_sd15 / 'distilled'}"])
    with pytest.raises(PlanError, match=r"is Stable Diffusion 1\.x .* the target is Tiny DiT"):
        build_plan(other, resolve_sources(other))
    for words, message in {
        "components=[unet]": "components: unet cannot be merged",
        "guidance_embedding=bake bake_guidance=2": "no distilled model has guidance.none",
        "output.single_file=true": "Tiny DiT has no single-file form here",
        "block_weights[M00]=0.5": "block_weights: 'M00' matches no key of the target",
    }.items():
        recipe = load_recipe(models / "dit.yaml", words.split())
        with pytest.raises(PlanError, match=re.escape(message)):
            build_plan(recipe, resolve_sources(recipe))
    with pytest.raises(RecipeError, match="'vae' is not one of unet, text_encoder"):
        load_recipe(models / "dit.yaml", ["components=[vae]"])


def test_inputs_are_hashed_once_for_many_values(models: Path) -> None:
    prepared = prepare_run(load_recipe(models / "dit.yaml"))
    for weight in ("weight=0.25", "weight=1.5"):
        recipe = load_recipe(models / "dit.yaml", [weight])
        other = prepared.with_recipe(recipe)
        (name, data), *more = merge_in_memory(other, device="cpu").items()
        assert not more
        result = run_recipe(recipe, models / weight, device="cpu", verify=False)
        assert other.digest == result.recipe_digest
        assert contents(models / weight)[name] == bytes(data)
    with pytest.raises(ValueError, match="has other models"):
        prepared.with_recipe(load_recipe(models / "dit.yaml", ["models.target=./base"]))


# The house ---------------------------------------------------------------------------------------

_NAMES = re.compile(r"(?<![\w-])(?:unet|sd15|sd21|sdxl)(?![\w-])")


def test_no_other_room_knows_an_architecture_by_name() -> None:
    package = Path(merge.__file__).parent
    found = []
    for path in package.rglob("*.py"):
        if path.is_relative_to(package / "family"):
            continue
        tree = ast.parse(path.read_text())
        texts = {id(docstring) for docstring in map(_docstring_node, ast.walk(tree))}
        for node in ast.walk(tree):
            is_text = isinstance(node, ast.Constant) and isinstance(node.value, str)
            if is_text and id(node) not in texts and _NAMES.search(node.value):
                found.append(f"{path.relative_to(package)}:{node.lineno}: {node.value[:60]!r}")
    assert found == []


def _docstring_node(node: ast.AST) -> Any:
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    if isinstance(node, kinds) and node.body and isinstance(node.body[0], ast.Expr):
        return node.body[0].value
    return None
