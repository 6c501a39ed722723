from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from merge.errors import CheckpointError, PlanError
from merge.plan.memory import peak_bytes
from merge.plan.model import MergePlan
from merge.plan.render import plan_to_json, render_plan
from merge.reader.checkpoint import read_checkpoint
from tests.mini import plan_of, random_tensors, write_models, write_recipe, write_unet


def rows(plan: MergePlan) -> dict[str, dict[str, Any]]:
    return {row["key"]: row for row in plan_to_json(plan, 0)["tensors"]}


def test_one_row_per_tensor_of_the_target(tmp_path: Path) -> None:
    models = write_models(tmp_path)
    write_recipe(tmp_path, weight=0.5)
    plan = plan_of(tmp_path)
    table = rows(plan)
    assert table.keys() == models["target"].keys()
    assert table["conv_out.weight"] == {
        "key": "conv_out.weight",
        "component": "unet",
        "action": "delta",
        "sources": ["target", "base", "distilled"],
        "shape": [4, 8, 3, 3],
        "dtype_in": "float16",
        "dtype_out": "float16",
        "weight": 0.5,
        "reason": "",
    }
    assert table["conv_in.weight"]["action"] == "copy"
    assert "channel_rule skip" in table["conv_in.weight"]["reason"]
    assert plan.counts == {"delta": 7, "lora": 0, "copy": 1, "cast": 0, "bake": 0}


def test_rows_are_in_the_order_of_the_reference_library(tmp_path: Path) -> None:
    models = write_models(tmp_path)
    write_recipe(tmp_path)
    save_file(models["target"], tmp_path / "reference.safetensors")
    reference = read_checkpoint([tmp_path / "reference.safetensors"])
    order = [spec.name for spec in reference.files[0].header.tensors]
    assert [tensor.key for tensor in plan_of(tmp_path).tensors] == order


def test_every_key_of_every_model_is_used_or_left_out_with_a_reason(tmp_path: Path) -> None:
    models = write_models(tmp_path)
    models["distilled"]["time_embedding.cond_proj.weight"] = torch.randn(8, 4).half()
    models["base"]["extra.weight"] = torch.randn(3).half()
    for role, tensors in models.items():
        write_unet(tmp_path / role, tensors)
    write_recipe(tmp_path, exclude=["conv_out.*", "extra.*"], block_weights={"mid_block.*": 0})
    plan = plan_of(tmp_path)
    used = {"target": set(), "base": set(), "distilled": set()}
    for row in rows(plan).values():
        for role in row["sources"]:
            used[role].add(row["key"])
    for item in plan.left_out:
        assert item.reason
        assert item.key not in used[item.model]
        used[item.model].add(item.key)
    assert {role: set(tensors) for role, tensors in models.items()} == used


def test_bytes_are_exact(tmp_path: Path) -> None:
    models = write_models(tmp_path)
    write_recipe(tmp_path, out_dtype="float32")
    plan = plan_of(tmp_path)
    target = sum(t.numel() * 2 for t in models["target"].values())
    others = sum(t.numel() * 2 for k, t in models["base"].items() if k != "conv_in.weight")
    assert plan.read_bytes == target + 2 * others
    assert plan.write_bytes == plan.components[0].out_header.data_start + 2 * target
    assert (
        len(plan.components[0].header_bytes("f" * 64)) == plan.components[0].out_header.data_start
    )


def test_peak_memory_grows_with_threads_and_not_with_models(tmp_path: Path) -> None:
    write_models(tmp_path)
    write_recipe(tmp_path)
    small = plan_of(tmp_path)
    two = peak_bytes(small, 2)
    assert peak_bytes(small, 4) > two
    assert two < 450_000_000


def test_cond_proj_of_a_full_lcm_is_named_and_dropped(tmp_path: Path) -> None:
    models = write_models(tmp_path)
    key = "time_embedding.cond_proj.weight"
    models["distilled"][key] = torch.randn(8, 4).half()
    write_unet(tmp_path / "distilled", models["distilled"])
    write_recipe(tmp_path)
    (item,) = [item for item in plan_of(tmp_path).left_out if item.key == key]
    assert item.model == "distilled"
    assert "guidance_embedding drop" in item.reason
    with pytest.raises(PlanError, match=f"{key}: distilled has this guidance embedding"):
        plan_of(tmp_path, "guidance_embedding=error")


@pytest.mark.parametrize("role", ["base", "distilled"])
def test_a_key_missing_in_a_model_is_an_error(tmp_path: Path, role: str) -> None:
    models = write_models(tmp_path)
    del models[role]["conv_out.weight"]
    write_unet(tmp_path / role, models[role])
    write_recipe(tmp_path)
    with pytest.raises(PlanError, match=f"conv_out.weight: missing in {role}") as caught:
        plan_of(tmp_path)
    assert "exclude" in caught.value.hint
    assert rows(plan_of(tmp_path, "exclude=[conv_out.*]"))["conv_out.weight"]["action"] == "copy"


def test_a_key_that_the_target_lacks_is_an_error(tmp_path: Path) -> None:
    models = write_models(tmp_path)
    models["base"]["conv_new.weight"] = torch.zeros(4).half()
    write_unet(tmp_path / "base", models["base"])
    write_recipe(tmp_path)
    with pytest.raises(PlanError, match="conv_new.weight: in base, and not in the target"):
        plan_of(tmp_path)


@pytest.mark.parametrize("shape", [(8, 16), (1, 8), (16, 1), (128,), (16, 8, 1, 1)])
def test_shapes_never_broadcast(tmp_path: Path, shape: tuple[int, ...]) -> None:
    models = write_models(tmp_path)
    key = "time_embedding.linear_1.weight"
    models["distilled"][key] = torch.zeros(shape).half()
    write_unet(tmp_path / "distilled", models["distilled"])
    write_recipe(tmp_path)
    with pytest.raises(PlanError, match=rf"{key}: shape \[16, 8\] in target, \[16, 8\] in base"):
        plan_of(tmp_path)


def test_channel_rules(tmp_path: Path) -> None:
    write_models(tmp_path)
    write_recipe(tmp_path)
    first = rows(plan_of(tmp_path, "channel_rule=first"))["conv_in.weight"]
    assert first["action"] == "delta"
    assert "first 4" in first["reason"]
    with pytest.raises(PlanError, match="8 input channels in the target, 4 in the delta"):
        plan_of(tmp_path, "channel_rule=error")


def test_casts_and_copies_are_told_apart(tmp_path: Path) -> None:
    models = write_models(tmp_path)
    models["target"]["conv_out.weight"] = models["target"]["conv_out.weight"].float()
    write_unet(tmp_path / "target", models["target"])
    write_recipe(tmp_path, exclude=["conv_out.*", "conv_in.bias"])
    table = rows(plan_of(tmp_path))
    assert table["conv_out.weight"]["action"] == "cast"
    assert (table["conv_out.weight"]["dtype_in"], table["conv_out.weight"]["dtype_out"]) == (
        "float32",
        "float16",
    )
    assert table["conv_in.bias"]["action"] == "copy"


def test_float64_is_refused_with_the_reason(tmp_path: Path) -> None:
    models = write_models(tmp_path)
    models["base"]["conv_in.bias"] = models["base"]["conv_in.bias"].double()
    for role, tensors in models.items():
        write_unet(tmp_path / role, tensors)
    write_recipe(tmp_path)
    with pytest.raises(PlanError, match=r"conv_in.bias: F64 .float64. cannot be merged .* in base"):
        plan_of(tmp_path)


def test_all_problems_are_shown_together(tmp_path: Path) -> None:
    models = write_models(tmp_path)
    del models["base"]["conv_in.bias"]
    models["distilled"]["conv_out.weight"] = torch.zeros(4, 8, 1, 1).half()
    for role, tensors in models.items():
        write_unet(tmp_path / role, tensors)
    write_recipe(tmp_path, exclude=["nothing.*"], block_weights={"none.*": 1})
    with pytest.raises(PlanError) as caught:
        plan_of(tmp_path)
    text = str(caught.value)
    for part in ("'nothing.*' matches no key", "'none.*' matches no key", "conv_in.bias: missing"):
        assert part in text
    assert "conv_out.weight: shape" in text


# Which models belong together ------------------------------------------------------------------


def test_another_architecture_is_refused_with_one_reason(tmp_path: Path) -> None:
    models = write_models(tmp_path)
    key = "down_blocks.0.attentions.0.proj_in.weight"
    context = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"
    for role in ("base", "distilled"):
        models[role][key] = models[role][key][:, :, 0, 0].contiguous()
        models[role][context] = torch.zeros(8, 16).half()
        write_unet(tmp_path / role, models[role])
    write_recipe(tmp_path)
    with pytest.raises(PlanError, match=r"base .* is Stable Diffusion 2.x .*width 16") as caught:
        plan_of(tmp_path)
    assert len(caught.value.problems) == 2


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"prediction_type": "v_prediction"}, "its scheduler predicts v_prediction"),
        ({"_class_name": "EDMEulerScheduler"}, "its scheduler is EDMEulerScheduler"),
    ],
)
def test_targets_that_are_no_epsilon_models_are_refused(
    tiny_sd15: Path, tmp_path: Path, config: dict[str, str], reason: str
) -> None:
    target = copy_of(tiny_sd15 / "target", tmp_path / "target")
    path = target / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    write_recipe(
        tmp_path,
        models={
            "base": str(tiny_sd15 / "base"),
            "distilled": str(tiny_sd15 / "distilled"),
            "target": "./target",
        },
    )
    with pytest.raises(PlanError, match=f"target .* is no epsilon model: {reason}"):
        plan_of(tmp_path)


def test_a_recipe_may_say_that_all_its_models_predict_v(tiny_sd15: Path, tmp_path: Path) -> None:
    target = copy_of(tiny_sd15 / "target", tmp_path / "target")
    models = {
        "base": str(tiny_sd15 / "base"),
        "distilled": str(tiny_sd15 / "distilled"),
        "target": "./target",
    }
    said: dict[str, Any] = {"config": {"prediction_type": "v_prediction"}}
    write_recipe(tmp_path, models=models, scheduler=said)
    with pytest.raises(PlanError, match="no v_prediction model: its scheduler predicts epsilon"):
        plan_of(tmp_path)
    path = target / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | said["config"]))
    assert plan_of(tmp_path).components[0].metadata["modelspec.prediction_type"] == "v"


def copy_of(source: Path, target: Path) -> Path:
    import shutil

    return Path(shutil.copytree(source, target))


def test_an_edm_marker_is_refused(tmp_path: Path) -> None:
    models = write_models(tmp_path)
    models["target"]["edm_vpred.sigma_max"] = torch.tensor(120.0)
    write_unet(tmp_path / "target", models["target"])
    write_recipe(tmp_path)
    with pytest.raises(PlanError, match=r"EDM v-prediction model .*edm_vpred.sigma_max"):
        plan_of(tmp_path)


def test_swapped_target_and_base_are_recognised(tiny_sd15: Path, tmp_path: Path) -> None:
    target = copy_of(tiny_sd15 / "target", tmp_path / "target")
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        (target / "unet" / name).write_bytes((tiny_sd15 / "base" / name).read_bytes())
    write_recipe(
        tmp_path,
        models={
            "base": str(tiny_sd15 / "base"),
            "distilled": str(tiny_sd15 / "distilled"),
            "target": "./target",
        },
    )
    with pytest.raises(PlanError, match="target .* has 4 input channels.*swapped"):
        plan_of(tmp_path)


def test_roles_that_do_not_fit(tmp_path: Path) -> None:
    models = write_models(tmp_path)
    stem = "lora_unet_conv_out"
    lora = {
        f"{stem}.lora_down.weight": torch.randn(2, 8, 3, 3).half(),
        f"{stem}.lora_up.weight": torch.randn(4, 2, 1, 1).half(),
    }
    save_file(lora, tmp_path / "lora.safetensors")
    write_recipe(tmp_path)
    with pytest.raises(PlanError, match="set models.base=null"):
        plan_of(tmp_path, f"models.distilled={tmp_path}/lora.safetensors")
    with pytest.raises(PlanError, match="distilled .* is a full UNet: name the model"):
        plan_of(tmp_path, "models.base=null")
    with pytest.raises(PlanError, match="target .* is a LoRA, and must be a whole UNet"):
        plan_of(tmp_path, f"models.target={tmp_path}/lora.safetensors")
    save_file({"a.b": torch.zeros(3)}, tmp_path / "other.safetensors")
    with pytest.raises(PlanError, match=r"no UNet with diffusers keys.*\(it has a.b\)"):
        plan_of(tmp_path, f"models.target={tmp_path}/other.safetensors")
    ldm = {f"model.diffusion_model.{k}": v for k, v in models["target"].items()}
    save_file(ldm, tmp_path / "ldm.safetensors")
    # Diffusers names under the prefix of a single file are those of a UNet that is alone.
    assert plan_of(tmp_path, f"models.target={tmp_path}/ldm.safetensors").counts["delta"] == 7


def test_a_bare_unet_of_four_channels_is_no_editor(tmp_path: Path) -> None:
    models = write_models(tmp_path)
    write_unet(tmp_path / "target", models["base"])
    write_recipe(tmp_path)
    with pytest.raises(PlanError, match=r"target \(target\) has 4 input channels; an InstructPix"):
        plan_of(tmp_path)


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    write_models(tmp_path)
    write_recipe(tmp_path)
    path = tmp_path / "distilled" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(CheckpointError, match=r"distilled.*: the file is truncated"):
        plan_of(tmp_path)


# LoRA ------------------------------------------------------------------------------------------


def test_lcm_lora_modules_are_planned(tiny_sd15: Path, tmp_path: Path) -> None:
    models = {
        "distilled": str(tiny_sd15 / "lora_kohya.safetensors"),
        "target": str(tiny_sd15 / "target"),
    }
    write_recipe(tmp_path, models=models, weight=0.5)
    plan = plan_of(tmp_path)
    assert plan.counts["lora"] == 278
    assert plan.counts["copy"] == 686 - 278
    (term,) = next(tensor for tensor in plan.tensors if tensor.loras).loras
    assert term.scale == 0.5 * 8 / 4
    assert plan.left_out == ()
    notes = plan_of(tmp_path, f"models.distilled={tiny_sd15 / 'lora_peft.safetensors'}").warnings
    assert any("278 of 278 LoRA modules state no alpha" in note for note in notes)


@pytest.mark.parametrize("alpha", [0.0, float("nan"), float("inf")])
def test_an_unusable_alpha_is_an_error(tmp_path: Path, alpha: float) -> None:
    write_models(tmp_path)
    stem = "lora_unet_conv_out"
    save_file(
        {
            f"{stem}.lora_down.weight": torch.randn(2, 8, 3, 3).half(),
            f"{stem}.lora_up.weight": torch.randn(4, 2, 1, 1).half(),
            f"{stem}.alpha": torch.tensor(alpha),
        },
        tmp_path / "lora.safetensors",
    )
    write_recipe(tmp_path, models={"distilled": "./lora.safetensors", "target": "./target"})
    with pytest.raises(PlanError, match=f"{stem}.alpha is {alpha}, no usable alpha"):
        plan_of(tmp_path)


def test_a_lora_of_another_model_names_its_keys(tmp_path: Path) -> None:
    write_models(tmp_path)
    stem = "lora_unet_up_blocks_7_attentions_0_proj_in"
    save_file(
        {
            f"{stem}.lora_down.weight": torch.randn(2, 8).half(),
            f"{stem}.lora_up.weight": torch.randn(4, 2).half(),
        },
        tmp_path / "lora.safetensors",
    )
    write_recipe(tmp_path, models={"distilled": "./lora.safetensors", "target": "./target"})
    with pytest.raises(PlanError, match=f"(?s){stem}: the target has no weight.*none of its keys"):
        plan_of(tmp_path)


# Presentation ----------------------------------------------------------------------------------


def test_the_summary_says_what_matters(tmp_path: Path) -> None:
    models = write_models(tmp_path)
    models["distilled"]["time_embedding.cond_proj.weight"] = torch.randn(8, 4).half()
    write_unet(tmp_path / "distilled", models["distilled"])
    write_recipe(tmp_path, weight=0.5)
    text = render_plan(plan_of(tmp_path), 300_000_000)
    for part in (
        "target + weight * (distilled - base)",
        "tensors       8: 7 delta, 1 copy",
        "weight        0.5",
        "peak memory   300.00 MB",
        "conv_in.weight: 8 input channels in the target",
        "distilled: time_embedding.cond_proj.weight:",
        "note: the target is only a UNet",
    ):
        assert part in text


def test_planning_needs_no_torch_and_writes_nothing(tmp_path: Path) -> None:
    write_models(tmp_path)
    recipe = write_recipe(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    code = (
        "import sys\nfrom merge.cli.main import main\n"
        f"try:\n    main(['plan', {str(recipe)!r}, '--json'])\n"
        "except SystemExit as stop:\n"
        "    heavy = {'torch', 'diffusers', 'transformers', 'numpy', 'tqdm'} & set(sys.modules)\n"
        "    print(heavy or 'light', stop.code, file=sys.stderr)\n"
    )
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert child.stderr.strip() == "light 0"
    tree = json.loads(child.stdout)
    assert set(tree) == {
        *("schema_version", "recipe", "architecture", "tensors", "left_out", "counts"),
        *("blocks", "notes", "warnings", "read_bytes", "write_bytes", "peak_bytes"),
    }
    assert sorted(tmp_path.rglob("*")) == before


def test_random_models_of_any_dtype_plan(tmp_path: Path) -> None:
    for role, dtype in (("base", torch.float32), ("distilled", torch.bfloat16)):
        write_unet(tmp_path / role, random_tensors(1, dtype=dtype))
    write_unet(tmp_path / "target", random_tensors(2, channels=8))
    write_recipe(tmp_path, out_dtype="keep")
    assert {row["dtype_out"] for row in rows(plan_of(tmp_path)).values()} == {"float16"}
