"""What the keys of a file mean: averages, markers, wrappers, and UNets under other names."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from merge import convert, load_recipe, run_recipe
from merge.errors import CheckpointError, MergeError, PlanError, RecipeError
from merge.family.keys.unet import unet_to_ldm
from tests.mini import (
    Tensors,
    contents,
    plan_of,
    read_output,
    write_models,
    write_recipe,
    write_unet,
)

PREFIX = "model.diffusion_model."


def write_single(
    folder: Path, tensors: Tensors, config: Path, metadata: dict[str, str] | None = None
) -> dict[str, str]:
    save_file(dict(tensors), folder / "target.safetensors", {"format": "pt", **(metadata or {})})
    return {"path": "./target.safetensors", "config": str(config)}


def recipe_over(folder: Path, tiny: Path, target: dict[str, Any], **changes: Any) -> Path:
    models = {"distilled": str(tiny / "lora_kohya.safetensors"), "target": target}
    return write_recipe(folder, models=models, out_dtype="keep", **changes)


def with_average(single: Tensors) -> dict[str, torch.Tensor]:
    """Return a training's file: what was plain is the average, and the plain weights went on."""
    tensors = dict(single)
    for key, values in single.items():
        if key.startswith(PREFIX):
            name = "model_ema." + key.removeprefix("model.").replace(".", "")
            tensors[name] = values
            tensors[key] = (values.float() * 1.1).half()
    tensors["model_ema.decay"] = torch.tensor(0.9999)
    tensors["model_ema.num_updates"] = torch.tensor(10, dtype=torch.int32)
    return tensors


# Moving averages --------------------------------------------------------------------------------


@pytest.mark.parametrize("ema", ["auto", True])
def test_the_average_is_the_published_folder(
    tiny_sd15: Path, single: Tensors, tmp_path: Path, ema: str | bool
) -> None:
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    tensors = with_average(single)
    target = tiny_sd15 / "target"
    save_file(tensors, tmp_path / "ip2p.safetensors")
    result = convert(tmp_path / "ip2p.safetensors", tmp_path / "f", config=target, ema=ema)
    found = load_file(tmp_path / "f" / "unet" / "diffusion_pytorch_model.safetensors")
    published = load_file(target / "unet" / "diffusion_pytorch_model.safetensors")
    config = json.loads((target / "unet" / "config.json").read_text())
    theirs = convert_ldm_unet_checkpoint(dict(tensors), config, extract_ema=True)
    assert found.keys() == published.keys()
    for key, values in published.items():
        assert torch.equal(found[key], values)
        assert torch.equal(theirs[key], values)
    told = "holds plain weights and a moving average of them: the moving average is used"
    assert any(told in line for line in result.notes) is (ema == "auto")
    assert result.left_out["model_ema.decay"] == "of the moving average's training"
    assert result.left_out[f"{PREFIX}out.0.bias"].startswith("a plain weight; its moving average")


def test_the_plain_weights_can_be_asked_for(
    tiny_sd15: Path, single: Tensors, tmp_path: Path
) -> None:
    tensors = with_average(single)
    save_file(tensors, tmp_path / "ip2p.safetensors")
    path = tmp_path / "ip2p.safetensors"
    result = convert(path, tmp_path / "f", config=tiny_sd15 / "target", ema=False)
    found = load_file(tmp_path / "f" / "unet" / "diffusion_pytorch_model.safetensors")
    names = unet_to_ldm(list(found))
    assert all(torch.equal(found[key], tensors[PREFIX + names[key]]) for key in found)
    assert result.notes == ()


def test_a_recipe_chooses_and_the_run_warns(
    tiny_sd15: Path, single: Tensors, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    target = write_single(tmp_path, with_average(single), tiny_sd15 / "target")
    weights = {}
    digests = {}
    for ema in ("auto", True, False):
        caplog.clear()
        recipe = load_recipe(recipe_over(tmp_path, tiny_sd15, {**target, "ema": ema}))
        result = run_recipe(recipe, tmp_path / str(ema), device="cpu", verify=False)
        weights[ema] = read_output(tmp_path / str(ema))
        digests[ema] = result.recipe_digest
        warned = [r.message for r in caplog.records if "moving average" in r.message]
        assert len(warned) == (1 if ema == "auto" else 0)
    plain = {"path": "./plain.safetensors", "config": target["config"]}
    save_file(dict(single), tmp_path / "plain.safetensors")
    recipe = load_recipe(recipe_over(tmp_path, tiny_sd15, plain))
    run_recipe(recipe, tmp_path / "plain", device="cpu", verify=False)
    expected = read_output(tmp_path / "plain")
    assert all(torch.equal(weights["auto"][key], expected[key]) for key in expected)
    assert all(torch.equal(weights[True][key], expected[key]) for key in expected)
    assert not all(torch.equal(weights[False][key], expected[key]) for key in expected)
    assert digests[True] != digests[False]


def test_an_average_with_a_gap_is_not_taken_without_a_word(
    tiny_sd15: Path, single: Tensors, tmp_path: Path
) -> None:
    tensors = with_average(single)
    del tensors["model_ema.diffusion_modelout0bias"]
    target = write_single(tmp_path, tensors, tiny_sd15 / "target")
    recipe_over(tmp_path, tiny_sd15, target)
    (line,) = (line for line in plan_of(tmp_path).warnings if "moving average" in line)
    assert f"the plain weights are used, since {PREFIX}out.0.bias has no average" in line
    recipe_over(tmp_path, tiny_sd15, {**target, "ema": True})
    with pytest.raises(CheckpointError, match=r"no moving average of .*out\.0\.bias, and ema: tru"):
        plan_of(tmp_path)
    write_single(tmp_path, single, tiny_sd15 / "target")
    with pytest.raises(CheckpointError, match=r"target \(.*no moving average of its UNet"):
        plan_of(tmp_path)


@pytest.mark.parametrize("value", ["yes please", 1, "true"])
def test_ema_is_one_of_three(tmp_path: Path, value: object) -> None:
    write_recipe(tmp_path, models={"distilled": "./a", "target": {"path": "./b", "ema": value}})
    with pytest.raises(RecipeError, match=r"models\.target\.ema: .* is not one of auto, true, fa"):
        load_recipe(tmp_path / "mini.yaml")


# What a model predicts --------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["target", "base", "distilled"])
@pytest.mark.parametrize("marker", ["v_pred", "ztsnr"])
def test_v_prediction_is_refused_in_every_role(tmp_path: Path, role: str, marker: str) -> None:
    models = write_models(tmp_path)
    write_unet(tmp_path / role, {**models[role], marker: torch.zeros(0)})
    write_recipe(tmp_path)
    words = rf"{role} \({role}\) is a v-prediction model \(it has {marker}\), and not an epsilon"
    with pytest.raises(PlanError, match=words):
        plan_of(tmp_path)


def test_v_prediction_is_merged_where_the_recipe_says_so(tmp_path: Path) -> None:
    models = write_models(tmp_path)
    for role in models:
        write_unet(tmp_path / role, {**models[role], "v_pred": torch.zeros(0)})
    scheduler = {"config": {"prediction_type": "v_prediction"}}
    recipe = load_recipe(write_recipe(tmp_path, scheduler=scheduler))
    run_recipe(recipe, tmp_path / "out", device="cpu", verify=False)
    assert read_output(tmp_path / "out").keys() == models["target"].keys()


@pytest.mark.parametrize(
    ("key", "stated"),
    [
        *(("modelspec.prediction_type", word) for word in ("v", "v_prediction", "V", "velocity")),
        # Comfy-Org/ComfyUI#12579: nothing else in the file says so.
        ("prediction_type", "v"),
        ("ss_v_parameterization", "True"),
    ],
)
def test_a_lora_says_in_its_metadata_what_it_predicts(
    tiny_sd15: Path, tmp_path: Path, key: str, stated: str
) -> None:
    lora = load_file(tiny_sd15 / "lora_kohya.safetensors")
    save_file(lora, tmp_path / "lora.safetensors", {key: stated})
    models = {"distilled": "./lora.safetensors", "target": str(tiny_sd15 / "target")}
    write_recipe(tmp_path, models=models)
    words = rf"distilled .* v-prediction model \(its metadata has {re.escape(key)} {stated}"
    with pytest.raises(PlanError, match=words):
        plan_of(tmp_path)


@pytest.mark.parametrize("marker", ["edm_mean", "edm_std", "edm_vpred.sigma_min"])
def test_edm_is_refused_as_edm_by_every_command(
    tiny_sd15: Path, single: Tensors, tmp_path: Path, marker: str
) -> None:
    tensors = {**single, marker: torch.zeros(4)}
    target = write_single(tmp_path, tensors, tiny_sd15 / "target")
    recipe_over(tmp_path, tiny_sd15, target)
    words = rf"is an EDM (?:v-prediction )?model \(it has {marker}\)"
    with pytest.raises(PlanError, match=words):
        plan_of(tmp_path)
    with pytest.raises(CheckpointError, match=words):
        convert(tmp_path / "target.safetensors", tmp_path / "f", config=tiny_sd15 / "target")


def test_a_file_of_one_prediction_is_not_converted_with_the_scheduler_of_another(
    tiny_sd15: Path, single: Tensors, tmp_path: Path
) -> None:
    said = {"modelspec.prediction_type": "v"}
    write_single(tmp_path, single, tiny_sd15 / "target", said)
    with pytest.raises(CheckpointError, match=r"modelspec\.prediction_type v\), and the scheduler"):
        convert(tmp_path / "target.safetensors", tmp_path / "f", config=tiny_sd15 / "target")


# Names ------------------------------------------------------------------------------------------


def under(prefix: str) -> Callable[[str], str]:
    return lambda key: prefix + key


def deep(key: str) -> str:
    head, _, tail = key.partition(".")
    return f"_orig_mod.{head}._orig_mod.{tail}"


SPELLINGS: dict[str, Callable[[str], str]] = {
    "module": under("module."),
    "compiled": under("_orig_mod."),
    "compiled in parts": deep,
    "both": under("module._orig_mod."),
    "unet": under("unet."),
    "twice": under("unet.unet."),
    "comfy": under("diffusion_model."),
    "comfy, whole": under("model.diffusion_model."),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("role", ["base", "distilled", "target"])
def test_a_unet_in_other_wrappings_gives_the_same_weights(
    tmp_path: Path, spelling: str, role: str
) -> None:
    models = write_models(tmp_path)
    recipe = load_recipe(write_recipe(tmp_path))
    run_recipe(recipe, tmp_path / "plain", device="cpu", verify=False)
    renamed = {SPELLINGS[spelling](key): values for key, values in models[role].items()}
    write_unet(tmp_path / role, renamed, config=False)
    run_recipe(recipe, tmp_path / "out", device="cpu", verify=False)
    found, expected = read_output(tmp_path / "out"), read_output(tmp_path / "plain")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("prefix", ["", "diffusion_model.", "model.diffusion_model.", "unet."])
def test_a_unet_alone_may_have_the_names_of_single_files(
    tiny_sdxl: Path, tmp_path: Path, prefix: str
) -> None:
    models = {r: str(tiny_sdxl / r) for r in ("base", "distilled", "target")}
    path = write_recipe(tmp_path, models=models)
    run_recipe(load_recipe(path), tmp_path / "plain", device="cpu", verify=False)
    for role in ("base", "distilled"):
        unet = load_file(tiny_sdxl / role / "diffusion_pytorch_model.safetensors")
        unet.pop("time_embedding.cond_proj.weight", None)
        names = unet_to_ldm(list(unet))
        renamed = {prefix + names[key]: values for key, values in unet.items()}
        save_file(renamed, tmp_path / f"{role}.safetensors")
        models[role] = f"./{role}.safetensors"
    path = write_recipe(tmp_path, models=models)
    run_recipe(load_recipe(path), tmp_path / "out", device="cpu", verify=False)
    found, expected = read_output(tmp_path / "out"), read_output(tmp_path / "plain")
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_one_key_in_two_wrappings_is_an_error(tmp_path: Path) -> None:
    models = write_models(tmp_path)
    key = "conv_in.bias"
    write_unet(tmp_path / "base", {**models["base"], f"_orig_mod.{key}": torch.ones(8)})
    write_recipe(tmp_path)
    with pytest.raises(CheckpointError, match=r"base .*conv_in\.bias .* in two wrappings"):
        plan_of(tmp_path)


# Keys that are nothing --------------------------------------------------------------------------


def test_stray_keys_change_no_byte(tiny_sd15: Path, single: Tensors, tmp_path: Path) -> None:
    target = write_single(tmp_path, single, tiny_sd15 / "target")
    recipe = load_recipe(recipe_over(tmp_path, tiny_sd15, target))
    run_recipe(recipe, tmp_path / "plain", device="cpu", verify=False)
    stray = {
        "embedding_manager.string_to_param_dict.*": torch.ones(1, 8),
        "cond_stage_model.logit_scale": torch.tensor(4.6),
        "model_ema.decay": torch.tensor(0.9),
        "alphas_cumprod": torch.ones(3),
        "scale_factor": torch.tensor(0.18215),
    }
    write_single(tmp_path, {**single, **stray}, tiny_sd15 / "target")
    plan = plan_of(tmp_path)
    assert stray.keys() <= {item.key for item in plan.left_out}
    run_recipe(recipe, tmp_path / "out", device="cpu", verify=False)
    found, expected = contents(tmp_path / "out"), contents(tmp_path / "plain")
    weights = [name for name in expected if name.endswith(".safetensors") and "unet" not in name]
    assert len(weights) > 1
    assert all(found[name] == expected[name] for name in weights)
    unet, before = read_output(tmp_path / "out"), read_output(tmp_path / "plain")
    assert all(torch.equal(unet[key], values) for key, values in before.items())


def test_constants_of_the_second_encoder_are_left_out(tiny_sdxl: Path, tmp_path: Path) -> None:
    convert(tiny_sdxl / "target", tmp_path / "s.safetensors")
    stray = {
        f"conditioner.embedders.1.{key}": torch.arange(77)[None]
        for key in (
            "model.position_ids",
            "model.transformer.text_model.embeddings.position_ids",
            "model.attn_mask",
        )
    }
    tensors = {**load_file(tmp_path / "s.safetensors"), **stray}
    save_file(tensors, tmp_path / "t.safetensors")
    result = convert(tmp_path / "t.safetensors", tmp_path / "f", config=tiny_sdxl / "target")
    assert stray.keys() <= result.left_out.keys()


def test_unknown_keys_can_be_excluded(tiny_sd15: Path, single: Tensors, tmp_path: Path) -> None:
    odd = {"odd.table": torch.ones(3), "odd.other": torch.ones(2)}
    inside = (
        "model.diffusion_model.input_blocks.1.9.weight",
        "first_stage_model.encoder.strange",
        "cond_stage_model.transformer.text_model.strange",
    )
    for key in inside:
        target = write_single(tmp_path, {**single, key: torch.ones(2)}, tiny_sd15 / "target")
        recipe_over(tmp_path, tiny_sd15, target)
        with pytest.raises(CheckpointError, match=key.rpartition(".")[2]):
            plan_of(tmp_path)
        left = {item.key for item in plan_of(tmp_path, f"exclude=['{key}']").left_out}
        assert key in left
    target = write_single(tmp_path, {**single, **odd}, tiny_sd15 / "target")
    recipe_over(tmp_path, tiny_sd15, target)
    with pytest.raises(CheckpointError, match=r"no part of an LDM/SGM file: odd\.other, odd") as e:
        plan_of(tmp_path)
    assert "`exclude`" in e.value.hint
    left = {item.key: item.reason for item in plan_of(tmp_path, "exclude=['odd.*']").left_out}
    assert left["odd.table"] == "excluded by 'odd.*'"
    source = tmp_path / "target.safetensors"
    with pytest.raises(MergeError, match="belong to no part"):
        convert(source, tmp_path / "f", config=tiny_sd15 / "target")
    line = [sys.executable, "-m", "merge", "convert", str(source), str(tmp_path / "f")]
    words = ["--config", str(tiny_sd15 / "target"), "--exclude", "odd.*"]
    child = subprocess.run([*line, *words], capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    assert "left out: odd.other, odd.table: excluded by 'odd.*'" in child.stderr


def test_the_scales_of_a_whole_file_may_be_excluded_by_nobody(tmp_path: Path) -> None:
    """A key that numbers depend on is no stray key."""
    models = write_models(tmp_path)
    models["target"]["conv_in.weight_scale"] = torch.tensor(2.0)
    write_unet(tmp_path / "target", models["target"])
    write_recipe(tmp_path, exclude=["*_scale"])
    with pytest.raises(PlanError, match="exclude: .* matches no key"):
        plan_of(tmp_path)
