"""Files as LyCORIS and peft write them, merged here and by these libraries themselves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionInstructPix2PixPipeline, UNet2DConditionModel
from diffusers.training_utils import _collate_lora_metadata
from lycoris import LycorisNetwork, create_lycoris
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from merge import load_recipe, run_recipe
from tests.mini import read_output, write_recipe

State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def target(tiny_sd15: Path) -> Path:
    return tiny_sd15 / "target"


def load_unet(target: Path) -> UNet2DConditionModel:
    unet = UNet2DConditionModel.from_pretrained(target / "unet", torch_dtype=torch.float32)
    return unet.double()


def randomise(parameters: list[tuple[str, torch.nn.Parameter]], seed: int) -> None:
    """Fill factors with values that float32 holds exactly; libraries start with zeros."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in parameters:
            values = torch.randn(parameter.shape, generator=generator) * 0.2
            if "dora" in name or "magnitude" in name:
                values = parameter.float() * (1 + values)
            parameter.copy_(values)


def merge(folder: Path, target: Path, weight: float, *, base: bool = False) -> State:
    models = {"distilled": "./lora.safetensors", "target": str(target)}
    if base:
        models["base"] = str(target / "unet")
    write_recipe(folder, models=models, weight=weight, out_dtype="float32")
    run_recipe(load_recipe(folder / "mini.yaml"), folder / "out", device="cpu", verify=False)
    return read_output(folder / "out")


def assert_same(merged: State, theirs: State, before: State, modules: int) -> None:
    """Compare float32 weights to float64 ones, and count those that changed."""
    assert merged.keys() == theirs.keys()
    changed = 0
    for key, values in theirs.items():
        torch.testing.assert_close(
            merged[key].double(),
            values,
            rtol=3e-7,
            atol=1e-7,
            msg=lambda text, key=key: f"{key}: {text}",
        )
        changed += not torch.equal(values, before[key])
    assert changed == modules


# --------------------------------------------------------------------------------------- LyCORIS

ALGOS: dict[str, dict[str, object]] = {
    "LoCon": {"algo": "lora", "use_tucker": True},
    "LoHa": {"algo": "loha"},
    "LoHa with cores": {"algo": "loha", "use_tucker": True},
    "LoKr with cores": {"algo": "lokr", "factor": 2, "use_tucker": True, "linear_dim": 1},
    "LoKr in factors": {"algo": "lokr", "factor": 4, "decompose_both": True, "linear_dim": 1},
    "DoRA": {"algo": "lora", "dora_wd": True},
    "DoRA of LoKr": {"algo": "lokr", "factor": 2, "dora_wd": True},
}


@pytest.mark.parametrize("options", ALGOS.values(), ids=ALGOS.keys())
def test_the_merged_unet_computes_what_lycoris_does(
    target: Path, tmp_path: Path, options: dict[str, object]
) -> None:
    # By their forward pass: `merge_to` of lycoris-lora 4.1 squares the scale of LoHa and LoKr.
    is_dora = "dora_wd" in options
    # Their DoRA moves the strength between the norms; at 1 it is the published formula.
    weight = 1.0 if is_dora else 0.625
    unet = load_unet(target)
    before = {key: value.clone() for key, value in unet.state_dict().items()}
    plain = predict(unet)
    LycorisNetwork.apply_preset({"target_module": ["Transformer2DModel", "ResnetBlock2D"]})
    sizes = {"linear_dim": 2, "linear_alpha": 1.5, "conv_dim": 1, "conv_alpha": 2.0}
    network = create_lycoris(unet, weight, **{**sizes, **options})
    network.apply_to()
    network.double()
    randomise(list(network.named_parameters()), 1)
    saved = {key: value.float().contiguous() for key, value in network.state_dict().items()}
    save_file(saved, tmp_path / "lora.safetensors")
    expected = predict(unet)
    network.restore()
    merged = merge(tmp_path, target, weight, base=is_dora)
    assert sum(not torch.equal(merged[key].double(), before[key]) for key in before) == 272
    unet.load_state_dict({key: value.double() for key, value in merged.items()})
    ours = predict(unet)
    # The merged weights are float32, everything else is float64.
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
    assert (expected - plain).abs().max() > 0.01


def predict(unet: UNet2DConditionModel) -> torch.Tensor:
    """Return what a UNet makes of fixed noise."""
    generator = torch.Generator().manual_seed(9)
    sample = torch.randn(1, 8, 8, 8, generator=generator, dtype=torch.float64)
    text = torch.randn(1, 7, 32, generator=generator, dtype=torch.float64)
    # diffusers embeds the time in float32 and casts it to the dtype of the sample.
    with torch.no_grad():
        return unet(sample, 500, text).sample


# ------------------------------------------------------------------------------------------ peft

MODULES = ["to_q", "to_k", "to_v", "to_out.0", "conv1", "time_emb_proj", "proj_in"]
CONFIGS: dict[str, Callable[[], LoraConfig]] = {
    "alpha": lambda: LoraConfig(r=4, lora_alpha=6, target_modules=MODULES),
    "rank-stabilised": lambda: LoraConfig(
        r=3, lora_alpha=6, target_modules=MODULES, use_rslora=True
    ),
    "patterns": lambda: LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=MODULES,
        rank_pattern={"to_q": 2, "conv1": 1},
        alpha_pattern={"to_q": 3, "attn2.to_k": 5, "conv1": 0.5},
    ),
    "DoRA": lambda: LoraConfig(r=4, lora_alpha=6, target_modules=MODULES, use_dora=True),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_merges_as_peft_does(target: Path, tmp_path: Path, name: str) -> None:
    unet = load_unet(target)
    before = {key: value.clone() for key, value in unet.state_dict().items()}
    unet.add_adapter(CONFIGS[name]())
    randomise([(n, p) for n, p in unet.named_parameters() if "lora_" in n], 2)
    layers = {k: v.float() for k, v in get_peft_model_state_dict(unet).items()}
    StableDiffusionInstructPix2PixPipeline.save_lora_weights(
        tmp_path,
        unet_lora_layers=layers,
        weight_name="lora.safetensors",
        **_collate_lora_metadata({"unet": unet}),
    )
    with safe_open(tmp_path / "lora.safetensors", "pt") as file:
        assert "unet.lora_alpha" in file.metadata()["lora_adapter_metadata"]
    merged = merge(tmp_path, target, 1.0, base=name == "DoRA")
    unet.fuse_lora()
    unet.unload_lora()
    modules = sum(".lora_B" in key for key in load_file(tmp_path / "lora.safetensors"))
    assert modules > 150
    assert_same(merged, unet.state_dict(), before, modules)
