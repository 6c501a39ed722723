"""Scales that stand beside a LoRA's tensors, and forms that have none: peft and LyCORIS judge."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from merge import load_recipe, run_recipe
from merge.errors import PlanError
from tests.mini import (
    SHAPES,
    Tensors,
    plan_of,
    read_output,
    write_models,
    write_recipe,
    write_unet,
)

TO_K = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
LINEAR = "time_embedding.linear_1"
CONV = "down_blocks.0.resnets.0.conv1"
NORM = "mid_block.resnets.0.norm1"


class Layers(torch.nn.Module):
    """The mini UNet's layers under their own names, for peft to adapt."""

    def __init__(self, tensors: Tensors) -> None:
        super().__init__()
        for path in (TO_K, LINEAR, CONV):
            weight = tensors[f"{path}.weight"].float()
            if weight.dim() == 4:
                layer: torch.nn.Module = torch.nn.Conv2d(*weight.shape[1::-1], 3, bias=False)
            else:
                layer = torch.nn.Linear(*weight.shape[::-1], bias=False)
            layer.weight = torch.nn.Parameter(weight)
            parent: Any = self
            *parts, last = path.split(".")
            for part in parts:
                if not hasattr(parent, part):
                    parent.add_module(part, torch.nn.Module())
                parent = getattr(parent, part)
            parent.add_module(last, layer)


def save_with_peft(folder: Path, tensors: Tensors, **config: Any) -> dict[str, torch.Tensor]:
    """Save random adapters as peft does; return what they add to each weight, in float64."""
    import peft

    torch.manual_seed(0)
    wanted = {"target_modules": ["to_k", "linear_1", "conv1"], "init_lora_weights": False, **config}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(Layers(tensors), peft.LoraConfig(**wanted))
        model.save_pretrained(folder)
    deltas = {}
    for name, module in model.named_modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            path = name.removeprefix("base_model.model.")
            deltas[path] = module.double().get_delta_weight("default")
    return deltas


CONFIGS: dict[str, dict[str, Any]] = {
    "alpha": {"r": 4, "lora_alpha": 16},
    "rank stabilised": {"r": 4, "lora_alpha": 16, "use_rslora": True},
    "defaults": {},
    "patterns": {
        "r": 4,
        "lora_alpha": 6,
        "alpha_pattern": {"to_k": 3, r"time_embedding\.linear_\d": 24},
        "rank_pattern": {"conv1": 2},
    },
}


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("given", ["folder", "file"])
def test_a_folder_of_peft_is_merged_as_peft_does(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, config: str, given: str
) -> None:
    """huggingface/diffusers#6087, huggingface/peft#2733."""
    models = write_models(tmp_path, dtype=torch.float32)
    deltas = save_with_peft(tmp_path / "lora", models["target"], **CONFIGS[config])
    where = "./lora" if given == "folder" else "./lora/adapter_model.safetensors"
    places = {"distilled": where, "target": "./target"}
    recipe = load_recipe(write_recipe(tmp_path, models=places, out_dtype="float32"))
    run_recipe(recipe, tmp_path / "out", device="cpu", verify=False)
    merged = read_output(tmp_path / "out")
    assert len(deltas) == 3
    for path, delta in deltas.items():
        key = f"{path}.weight"
        expected = models["target"][key] + delta.float()
        torch.testing.assert_close(merged[key], expected, rtol=2e-7, atol=1e-8)
    assert "state no alpha" not in caplog.text
    assert any("from adapter_config.json" in note for note in plan_of(tmp_path).notes)
    # The config decides bytes, so it is one of the inputs that a lock pins.
    lock = (tmp_path / "out" / "recipe.lock.yaml").read_text()
    assert "adapter_config.json" in lock


def test_another_alpha_gives_another_digest(tmp_path: Path) -> None:
    models = write_models(tmp_path)
    save_with_peft(tmp_path / "lora", models["target"], r=4, lora_alpha=16)
    recipe = load_recipe(
        write_recipe(tmp_path, models={"distilled": "./lora", "target": "./target"})
    )
    digests = []
    for alpha in (16, 8):
        path = tmp_path / "lora" / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"lora_alpha": alpha}))
        result = run_recipe(recipe, tmp_path / str(alpha), device="cpu", verify=False)
        digests.append(result.recipe_digest)
    assert digests[0] != digests[1]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"peft_type": "IA3"}, "peft_type IA3 is not supported"),
        ({"peft_type": "VERA"}, "peft_type VERA is not supported"),
        (
            {"init_lora_weights": "pissa_niter_4"},
            "init_lora_weights pissa_niter_4 changes the base",
        ),
        ({"init_lora_weights": "olora"}, "init_lora_weights olora changes the base"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out True is not supported"),
        ({"target_parameters": ["x.weight"]}, r"target_parameters \['x.weight'\] is not supported"),
        ({"layer_replication": [[0, 1]]}, "layer_replication .* is not supported"),
        ({"r": 8}, r"to_k: adapter_config.json says rank 8, and its factors have 4"),
        ({"rank_pattern": {"to_k": 2}}, "adapter_config.json says rank 2, and its factors have 4"),
        ({"use_dora": True}, "adapter_config.json says use_dora, and the module has no magnitude"),
        ({"lora_alpha": "much"}, "adapter_config.json cannot be read"),
        ({"alpha_pattern": {"(": 3}}, "adapter_config.json cannot be read"),
    ],
)
def test_what_a_config_says_and_cannot_be_done_is_named(
    tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    models = write_models(tmp_path)
    save_with_peft(tmp_path / "lora", models["target"], r=4, lora_alpha=16)
    path = tmp_path / "lora" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    write_recipe(tmp_path, models={"distilled": "./lora", "target": "./target"})
    with pytest.raises(PlanError, match=words):
        plan_of(tmp_path)


def test_modules_that_were_saved_whole_are_named(tmp_path: Path) -> None:
    models = write_models(tmp_path)
    save_with_peft(tmp_path / "lora", models["target"], r=4)
    path = tmp_path / "lora" / "adapter_model.safetensors"
    whole = {"base_model.model.conv_out.weight": torch.zeros(4, 8, 3, 3)}
    save_file({**load_file(path), **whole}, path, {"format": "pt"})
    write_recipe(tmp_path, models={"distilled": "./lora", "target": "./target"})
    with pytest.raises(PlanError, match=r"base_model\.model\.conv_out\.weight: not a LoRA key"):
        plan_of(tmp_path)


# Plain numbers in the metadata ------------------------------------------------------------------


def lora(rank: int = 4) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        f"unet.{TO_K}.lora_A.weight": torch.randn(rank, 12, generator=generator),
        f"unet.{TO_K}.lora_B.weight": torch.randn(8, rank, generator=generator),
    }


def merged_scale(folder: Path, metadata: dict[str, str]) -> float:
    models = write_models(folder, dtype=torch.float32)
    tensors = lora()
    save_file(tensors, folder / "lora.safetensors", metadata)
    places = {"distilled": "./lora.safetensors", "target": "./target"}
    recipe = load_recipe(write_recipe(folder, models=places, out_dtype="float32"))
    run_recipe(recipe, folder / "out", device="cpu", verify=False, overwrite=True)
    moved = read_output(folder / "out")[f"{TO_K}.weight"] - models["target"][f"{TO_K}.weight"]
    down, up = tensors.values()
    product = up.double() @ down.double()
    return float((moved.double() * product).sum() / (product * product).sum())


@pytest.mark.parametrize(
    ("metadata", "scale"),
    [
        ({"lora_alpha": "16", "lora_rank": "4"}, 4),
        ({"network_alpha": "16"}, 4),
        ({"ss_network_alpha": "2.0", "ss_network_dim": "64"}, 0.5),
        ({"alpha": "2"}, 0.5),
        ({"ss_network_alpha": "None"}, 1),
        ({}, 1),
    ],
)
def test_plain_numbers_of_the_metadata_count(
    tmp_path: Path, metadata: dict[str, str], scale: float
) -> None:
    """sgl-project/sglang#36082."""
    assert merged_scale(tmp_path, {"format": "pt", **metadata}) == pytest.approx(scale, rel=1e-5)
    silent = any("state no alpha" in line for line in plan_of(tmp_path).warnings)
    assert silent == (scale == 1)


def test_a_rank_that_is_not_the_factors_is_an_error(tmp_path: Path) -> None:
    write_models(tmp_path)
    save_file(lora(), tmp_path / "lora.safetensors", {"lora_alpha": "16", "lora_rank": "8"})
    write_recipe(tmp_path, models={"distilled": "./lora.safetensors", "target": "./target"})
    with pytest.raises(PlanError, match="the metadata's lora_alpha says rank 8, and .* have 4"):
        plan_of(tmp_path)


# Whole differences ------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [("diff", "diff_b"), ("w_norm", "b_norm")])
def test_whole_differences_are_added(tmp_path: Path, names: tuple[str, str]) -> None:
    """Of weights, norms and biases, without alpha, as LyCORIS does."""
    models = write_models(tmp_path)
    weight, bias = names
    generator = torch.Generator().manual_seed(2)
    tensors = {}
    expected = {}
    for key, stem, role in (
        (f"{NORM}.weight", NORM, weight),
        (f"{CONV}.weight", CONV, "diff"),
        (f"{TO_K}.weight", TO_K, "diff"),
        ("conv_in.bias", "conv_in", bias),
    ):
        delta = torch.randn(models["target"][key].shape, generator=generator)
        tensors[f"lora_unet_{stem.replace('.', '_')}.{role}"] = delta
        expected[key] = models["target"][key].float() + (0.5 * delta.double()).float()
    save_file(tensors, tmp_path / "lora.safetensors")
    places = {"distilled": "./lora.safetensors", "target": "./target"}
    recipe = load_recipe(write_recipe(tmp_path, models=places, out_dtype="float32", weight=0.5))
    run_recipe(recipe, tmp_path / "out", device="cpu", verify=False)
    merged = read_output(tmp_path / "out")
    for key, values in expected.items():
        assert torch.equal(merged[key], values), key
    assert not [line for line in plan_of(tmp_path).warnings if "alpha" in line]


def test_a_lora_and_the_difference_of_its_bias(tmp_path: Path) -> None:
    models = write_models(tmp_path)
    stem = "lora_unet_conv_in"
    down, up, bias = torch.randn(2, 8, 3, 3), torch.randn(8, 2, 1, 1), torch.randn(8)
    tensors = {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}
    tensors |= {f"{stem}.alpha": torch.tensor(1.0), f"{stem}.diff_b": bias}
    save_file(tensors, tmp_path / "lora.safetensors")
    places = {"distilled": "./lora.safetensors", "target": "./target"}
    recipe = load_recipe(write_recipe(tmp_path, models=places, out_dtype="float32"))
    run_recipe(recipe, tmp_path / "out", device="cpu", verify=False)
    merged = read_output(tmp_path / "out")
    assert torch.equal(merged["conv_in.bias"], models["target"]["conv_in.bias"].float() + bias)
    delta = 0.5 * (up.double().reshape(8, 2) @ down.double().reshape(2, -1)).reshape(8, 8, 3, 3)
    wanted = models["target"]["conv_in.weight"].float() + delta.float()
    torch.testing.assert_close(merged["conv_in.weight"], wanted, rtol=2e-7, atol=1e-7)


# DoRA by input ----------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [TO_K, CONV, LINEAR])
@pytest.mark.parametrize("weight", [1.0, 0.7])
def test_dora_of_inputs_is_that_of_lycoris(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, weight: float
) -> None:
    """KohakuBlueleaf/LyCORIS#216: `wd_on_out` False, the default for long."""
    from lycoris.functional.general import weight_decompose  # type: ignore[import-untyped]

    key, shape = f"{path}.weight", SHAPES[f"{path}.weight"]
    models = write_models(tmp_path, dtype=torch.float32)
    generator = torch.Generator().manual_seed(3)
    down = torch.randn(3, *shape[1:], generator=generator) * 0.1
    up = torch.randn(shape[0], 3, *[1] * (len(shape) - 2), generator=generator) * 0.1
    scale = torch.rand(1, shape[1], *[1] * (len(shape) - 2), generator=generator) + 0.5
    stem = f"lora_unet_{path.replace('.', '_')}"
    tensors = {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}
    tensors |= {f"{stem}.alpha": torch.tensor(1.5), f"{stem}.dora_scale": scale}
    save_file(tensors, tmp_path / "lora.safetensors")
    # Smaller than the weight, so that it does not come in one block.
    monkeypatch.setattr("merge.engine.execute.CPU_BLOCK_ELEMENTS", 32)
    places = {"base": "./base", "distilled": "./lora.safetensors", "target": "./target"}
    recipe = load_recipe(write_recipe(tmp_path, models=places, out_dtype="float32", weight=weight))
    run_recipe(recipe, tmp_path / "out", device="cpu", verify=False)
    merged = read_output(tmp_path / "out")[key]
    base = models["base"][key].double()
    product = (up.double().flatten(1) @ down.double().flatten(1)).reshape(shape) * 0.5
    theirs = weight_decompose(base + product, scale.double(), 1, wd_on_out=False)
    expected = models["target"][key] + (weight * (theirs - base)).float()
    torch.testing.assert_close(merged, expected, rtol=2e-6, atol=1e-7)
    assert any(
        "a DoRA of inputs needs the whole" in row.reason for row in plan_of(tmp_path).tensors
    )


# What is no LoRA at all -------------------------------------------------------------------------

OTHERS: dict[str, tuple[dict[str, torch.Tensor], str]] = {
    "embedding": ({"emb_params": torch.zeros(2, 8)}, "a textual-inversion embedding"),
    "embedding of XL": (
        {"clip_l": torch.zeros(2, 8), "clip_g": torch.zeros(2, 12)},
        "a textual-inversion embedding",
    ),
    "diffusers' embedding": ({"<cat-toy>": torch.zeros(8)}, "a textual-inversion embedding"),
    "ip-adapter": (
        {
            "image_proj.proj.weight": torch.zeros(4, 4),
            "ip_adapter.1.to_k_ip.weight": torch.zeros(4),
        },
        "an IP-Adapter",
    ),
    "controlnet": ({"controlnet_cond_embedding.conv_in.weight": torch.zeros(4)}, "a ControlNet"),
    "vae": ({"decoder.conv_in.weight": torch.zeros(4, 4, 3, 3)}, "a VAE"),
    "empty": ({}, "an empty file, without a tensor"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_files_are_called_what_they_are(tmp_path: Path, name: str) -> None:
    tensors, kind = OTHERS[name]
    write_models(tmp_path)
    save_file(tensors, tmp_path / "x.safetensors")
    write_recipe(tmp_path, models={"distilled": "./x.safetensors", "target": "./target"})
    with pytest.raises(PlanError) as caught:
        plan_of(tmp_path)
    (problem,) = caught.value.problems
    assert problem == f"distilled (x.safetensors) is no UNet and no LoRA: it is {kind}"


def test_a_unet_saved_with_its_adapters_is_called_that(tmp_path: Path) -> None:
    models = write_models(tmp_path)
    tensors = {
        k.replace("to_k.weight", "to_k.base_layer.weight"): v
        for k, v in models["distilled"].items()
    }
    tensors |= {f"{TO_K}.lora_A.default.weight": torch.zeros(2, 12)}
    write_unet(tmp_path / "distilled", tensors)
    write_recipe(tmp_path)
    with pytest.raises(
        PlanError, match=r"it is a model saved with its adapters \(it has .*base_lay"
    ):
        plan_of(tmp_path)


def test_a_lora_of_another_family_is_one_line(
    tiny_sd15: Path, tiny_sdxl: Path, tmp_path: Path
) -> None:
    for lora_of, target in ((tiny_sdxl, tiny_sd15), (tiny_sd15, tiny_sdxl)):
        models = {"distilled": str(lora_of / "lora_kohya.safetensors")}
        write_recipe(tmp_path, models={**models, "target": str(target / "target")})
        with pytest.raises(PlanError) as caught:
            plan_of(tmp_path)
        (problem,) = caught.value.problems
        assert "it looks like a LoRA for S" in problem
        assert "exclude" not in caught.value.hint


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("transformer.single_transformer_blocks.0.attn.to_q", "FLUX"),
        ("lora_unet_double_blocks_0_img_attn_qkv", "FLUX"),
        ("lora_unet_joint_blocks_0_x_block_attn_qkv", "Stable Diffusion 3"),
    ],
)
def test_a_lora_of_a_transformer_is_one_line(tmp_path: Path, name: str, family: str) -> None:
    write_models(tmp_path)
    tensors = {
        f"{name}.lora_A.weight": torch.zeros(2, 8),
        f"{name}.lora_B.weight": torch.zeros(8, 2),
    }
    save_file(tensors, tmp_path / "lora.safetensors")
    write_recipe(tmp_path, models={"distilled": "./lora.safetensors", "target": "./target"})
    with pytest.raises(PlanError) as caught:
        plan_of(tmp_path)
    (problem,) = caught.value.problems
    assert f"it is a LoRA for {family} (it has {name}" in problem


def test_a_module_of_zeros_is_no_error(tmp_path: Path) -> None:
    models = write_models(tmp_path)
    tensors = {name: torch.zeros_like(value) for name, value in lora().items()}
    stem = "unet.conv_out"
    tensors |= {f"{stem}.lora_A.weight": torch.ones(1, 8, 3, 3)}
    tensors |= {f"{stem}.lora_B.weight": torch.ones(4, 1, 1, 1)}
    save_file(tensors, tmp_path / "lora.safetensors")
    places = {"distilled": "./lora.safetensors", "target": "./target"}
    recipe = load_recipe(write_recipe(tmp_path, models=places))
    run_recipe(recipe, tmp_path / "out", device="cpu", verify=False)
    key = f"{TO_K}.weight"
    assert torch.equal(read_output(tmp_path / "out")[key], models["target"][key])
