"""LoRAs of every form through whole merges: rounded once, as float64 arithmetic says."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from merge import build_plan, load_recipe, resolve_sources, run_recipe
from merge.errors import PlanError
from merge.plan.model import MergePlan
from tests.lora.test_lora_forms import einsum_delta
from tests.mini import (
    bits,
    numpy_float32,
    plan_of,
    random_tensors,
    read_output,
    write_models,
    write_recipe,
    write_unet,
)

CONV_IN = "conv_in"
PROJ = "down_blocks.0.attentions.0.proj_in"
TO_K = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
CONV = "down_blocks.0.resnets.0.conv1"
LDM_TO_K = "input_blocks.1.1.transformer_blocks.0.attn2.to_k"
Arrays = dict[str, np.ndarray]
Tensors = dict[str, torch.Tensor]


def random(seed: int, **shapes: tuple[int, ...]) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {
        role: (torch.randn(shape, generator=generator) * 0.3).half()
        for role, shape in shapes.items()
    }


def wide(tensors: Mapping[str, torch.Tensor]) -> Arrays:
    return {role: tensor.numpy().astype(np.float64) for role, tensor in tensors.items()}


def kohya(path: str, factors: Tensors, *, prefix: str = "lora_unet_") -> Tensors:
    """Name factors as kohya and LyCORIS do."""
    stem = prefix + path.replace(".", "_")
    words = {"down": "lora_down.weight", "up": "lora_up.weight", "mid": "lora_mid.weight"}
    return {f"{stem}.{words.get(role, role)}": tensor for role, tensor in factors.items()}


def bare(factors: Tensors) -> Arrays:
    """Return factors in float64 under the names of `einsum_delta`."""
    named = {role.removeprefix("hada_").removeprefix("lokr_"): t for role, t in factors.items()}
    return wide({role: t for role, t in named.items() if role not in ("alpha", "dora_scale")})


def rounded_sum(target: torch.Tensor, *deltas: np.ndarray) -> np.ndarray:
    """Add deltas, float64 and summed in order, to a float32 target, rounding their sum once."""
    total = np.zeros_like(deltas[0])
    for delta in deltas:
        total = total + delta
    return numpy_float32(target) + total.astype(np.float32).reshape(tuple(target.shape))


def merge(folder: Path, *overrides: str) -> Tensors:
    recipe = load_recipe(folder / "mini.yaml", overrides)
    run_recipe(recipe, folder / "out", device="cpu", overwrite=True, verify=False)
    return read_output(folder / "out")


def write_lora(folder: Path, tensors: Tensors, **recipe: object) -> dict[str, Tensors]:
    """Write models, a LoRA beside them and a recipe of both; return the models."""
    models = write_models(folder)
    save_file(tensors, folder / "lora.safetensors")
    write_recipe(
        folder,
        **{
            "weight": 0.7,
            "out_dtype": "float32",
            "models": {"distilled": "./lora.safetensors", "target": "./target"},
            **recipe,
        },
    )
    return models


def assert_close(tensor: torch.Tensor, expected: np.ndarray) -> None:
    """Compare to one step of float32: BLAS and einsum add products in different orders."""
    assert tensor.dtype == torch.float32
    step = float(np.spacing(np.abs(expected).max()))
    np.testing.assert_allclose(tensor.numpy(), expected, rtol=0, atol=step)


# -------------------------------------------------------------------------------------- each form

FORMS: dict[str, tuple[str, str, Tensors, float]] = {
    "linear": (TO_K, "lora", random(1, down=(3, 12), up=(8, 3)), 3),
    "a linear LoRA of a 1x1 convolution": (PROJ, "lora", random(2, down=(3, 8), up=(8, 3)), 3),
    "convolution": (CONV, "lora", random(3, down=(3, 8, 3, 3), up=(8, 3, 1, 1)), 3),
    "LoCon with a core": (
        CONV,
        "locon",
        random(4, down=(2, 8, 1, 1), mid=(2, 2, 3, 3), up=(8, 2, 1, 1)),
        2,
    ),
    "LoHa": (
        TO_K,
        "loha",
        random(5, hada_w1_a=(8, 2), hada_w1_b=(2, 12), hada_w2_a=(8, 2), hada_w2_b=(2, 12)),
        2,
    ),
    "LoHa of a convolution": (
        CONV,
        "loha",
        random(6, hada_w1_a=(8, 2), hada_w1_b=(2, 72), hada_w2_a=(8, 2), hada_w2_b=(2, 72)),
        2,
    ),
    "LoHa with cores": (
        CONV,
        "loha",
        random(
            7,
            **{f"hada_w{n}_{side}": (2, 8) for n in "12" for side in "ab"},
            hada_t1=(2, 2, 3, 3),
            hada_t2=(2, 2, 3, 3),
        ),
        2,
    ),
    # Without a low-rank factor LyCORIS knows no scale, whatever alpha says.
    "LoKr": (TO_K, "lokr", random(8, lokr_w1=(2, 3), lokr_w2=(4, 4)), 0),
    "LoKr of a convolution": (CONV, "lokr", random(9, lokr_w1=(2, 2), lokr_w2=(4, 4, 3, 3)), 0),
    "LoKr with factors": (
        TO_K,
        "lokr",
        random(10, lokr_w1_a=(2, 2), lokr_w1_b=(2, 3), lokr_w2_a=(4, 2), lokr_w2_b=(2, 4)),
        2,
    ),
    "LoKr with a core": (
        CONV,
        "lokr",
        random(11, lokr_w1=(2, 2), lokr_w2_a=(2, 4), lokr_w2_b=(2, 4), lokr_t2=(2, 2, 3, 3)),
        2,
    ),
}


@pytest.mark.parametrize(("path", "form", "factors", "rank"), FORMS.values(), ids=FORMS.keys())
def test_a_form_is_added_as_float64_says(
    tmp_path: Path, path: str, form: str, factors: Tensors, rank: float
) -> None:
    models = write_lora(tmp_path, kohya(path, {**factors, "alpha": torch.tensor(5.0)}))
    merged = merge(tmp_path)
    scale = 0.7 * (5.0 / rank if rank else 1.0)
    key = f"{path}.weight"
    delta = scale * einsum_delta(form, bare(factors))
    assert_close(merged[key], rounded_sum(models["target"][key], delta))
    assert not np.array_equal(merged[key].numpy(), numpy_float32(models["target"][key]))
    for other, tensor in models["target"].items():
        if other != key:
            np.testing.assert_array_equal(merged[other].numpy(), numpy_float32(tensor), other)


def test_forms_and_full_deltas_add_up_with_their_own_weights(tmp_path: Path) -> None:
    models = write_lora(tmp_path, {})
    linear = random(20, down=(3, 12), up=(8, 3), alpha=())
    linear["alpha"] = torch.tensor(6.0)
    kron = random(21, lokr_w1=(2, 3), lokr_w2=(4, 4))
    conv = random(22, down=(2, 8, 3, 3), up=(8, 2, 1, 1))
    save_file(kohya(TO_K, linear), tmp_path / "one.safetensors")
    save_file({**kohya(TO_K, kron), **kohya(CONV, conv)}, tmp_path / "two.safetensors")
    distilled = [
        {"path": "./two.safetensors", "weight": 0.5},
        {"path": "./distilled", "weight": 0.25},
        {"path": "./one.safetensors", "weight": -1.5},
    ]
    write_recipe(
        tmp_path,
        weight=0.8,
        out_dtype="float32",
        models={"base": "./base", "target": "./target", "distilled": distilled},
    )
    merged = merge(tmp_path)
    deltas = {
        TO_K: [
            0.8 * 0.5 * einsum_delta("lokr", bare(kron)),
            0.8 * -1.5 * 6 / 3 * einsum_delta("lora", bare(linear)),
        ],
        CONV: [0.8 * 0.5 * einsum_delta("lora", bare(conv))],
    }
    for path, parts in deltas.items():
        key = f"{path}.weight"
        target, distilled_, base = (
            numpy_float32(models[role][key]) for role in ("target", "distilled", "base")
        )
        full = target + np.float32(0.8 * 0.25) * (distilled_ - base)
        assert_close(merged[key], rounded_sum(torch.from_numpy(full), *parts))


def test_ranks_and_alphas_differ_between_modules(tmp_path: Path) -> None:
    factors = {
        TO_K: (random(30, down=(3, 12), up=(8, 3)), 3, 6.0),
        PROJ: (random(31, down=(1, 8, 1, 1), up=(8, 1, 1, 1)), 1, 0.25),
        CONV: (random(32, down=(5, 8, 3, 3), up=(8, 5, 1, 1)), 5, 5.0),
    }
    tensors: Tensors = {}
    for path, (parts, _, alpha) in factors.items():
        tensors |= kohya(path, {**parts, "alpha": torch.tensor(alpha)})
    models = write_lora(tmp_path, tensors)
    merged = merge(tmp_path)
    for path, (parts, rank, alpha) in factors.items():
        delta = 0.7 * alpha / rank * einsum_delta("lora", bare(parts))
        key = f"{path}.weight"
        assert_close(merged[key], rounded_sum(models["target"][key], delta))


@pytest.mark.parametrize("is_rank_stabilised", [False, True])
def test_peft_with_metadata(tmp_path: Path, is_rank_stabilised: bool) -> None:
    factors = random(40, down=(4, 12), up=(8, 4))
    metadata = {"unet.lora_alpha": 8, "unet.r": 4, "unet.use_rslora": is_rank_stabilised}
    models = write_lora(tmp_path, {})
    named = {
        f"unet.{TO_K}.lora_A.weight": factors["down"],
        f"unet.{TO_K}.lora_B.weight": factors["up"],
    }
    text = {"lora_adapter_metadata": json.dumps(metadata)}
    save_file(named, tmp_path / "lora.safetensors", text)
    scale = 0.7 * 8 / (2 if is_rank_stabilised else 4)
    expected = scale * einsum_delta("lora", bare(factors))
    key = f"{TO_K}.weight"
    assert_close(merge(tmp_path)[key], rounded_sum(models["target"][key], expected))


SPELLED = {
    "kohya": ("lora_unet_" + TO_K.replace(".", "_"), "lora_down", "lora_up"),
    "kohya SGM": ("lora_unet_" + LDM_TO_K.replace(".", "_"), "lora_down", "lora_up"),
    "diffusers": (f"unet.{TO_K}", "lora_A", "lora_B"),
    "peft": (f"base_model.model.{TO_K}", "lora_A", "lora_B"),
    "old diffusers": (f"unet.{TO_K}", "lora.down", "lora.up"),
    "processor": (
        f"unet.{TO_K.removesuffix('.to_k')}.processor",
        "to_k_lora.down",
        "to_k_lora.up",
    ),
    "ComfyUI": (f"diffusion_model.{LDM_TO_K}", "lora_down", "lora_up"),
    "bare": (TO_K, "lora_A", "lora_B"),
}


def test_every_spelling_gives_the_same_bytes(tmp_path: Path) -> None:
    factors = random(50, down=(3, 12), up=(8, 3))
    models = write_lora(tmp_path, {})
    digests = {}
    for name, (stem, down, up) in SPELLED.items():
        tensors = {f"{stem}.{down}.weight": factors["down"], f"{stem}.{up}.weight": factors["up"]}
        save_file(tensors, tmp_path / "lora.safetensors")
        digests[name] = bits(merge(tmp_path)[f"{TO_K}.weight"]).tobytes()
    assert set(digests.values()) == {digests["kohya"]}
    assert digests["kohya"] != numpy_float32(models["target"][f"{TO_K}.weight"]).tobytes()


def test_a_narrow_conv_in_follows_the_channel_rule_in_every_form(tmp_path: Path) -> None:
    files = {
        "lora": random(60, down=(2, 4, 3, 3), up=(8, 2, 1, 1)),
        "loha": random(
            61, hada_w1_a=(8, 1), hada_w1_b=(1, 36), hada_w2_a=(8, 1), hada_w2_b=(1, 36)
        ),
        "lokr": random(62, lokr_w1=(2, 2), lokr_w2=(4, 2, 3, 3)),
    }
    for form, factors in files.items():
        models = write_lora(tmp_path, kohya(CONV_IN, factors))
        target = models["target"]["conv_in.weight"]
        with pytest.raises(PlanError, match=r"conv_in\.weight: 8 input channels in the target, 4"):
            plan_of(tmp_path, "channel_rule=error")
        merged = merge(tmp_path, "channel_rule=first")["conv_in.weight"]
        delta = 0.7 * einsum_delta(form, bare(factors))
        assert_close(merged[:, :4].contiguous(), rounded_sum(target[:, :4].contiguous(), delta))
        np.testing.assert_array_equal(merged[:, 4:].numpy(), numpy_float32(target)[:, 4:])


# ------------------------------------------------------------------------------------------ DoRA


def dora_delta(base: torch.Tensor, delta: np.ndarray, magnitude: torch.Tensor) -> np.ndarray:
    weight = base.numpy().astype(np.float64).reshape(len(base), -1)
    adapted = weight + delta
    length = np.linalg.norm(adapted, axis=1, keepdims=True)
    return magnitude.numpy().astype(np.float64).reshape(-1, 1) * adapted / length - weight


DORA: dict[str, tuple[str, str, Tensors, tuple[int, ...]]] = {
    "linear": (TO_K, "lora", random(70, down=(3, 12), up=(8, 3)), (8, 1)),
    "convolution": (CONV, "lora", random(71, down=(3, 8, 3, 3), up=(8, 3, 1, 1)), (8, 1, 1, 1)),
    "LoHa": (
        TO_K,
        "loha",
        random(72, hada_w1_a=(8, 3), hada_w1_b=(3, 12), hada_w2_a=(8, 3), hada_w2_b=(3, 12)),
        (8, 1),
    ),
}


@pytest.mark.parametrize(("path", "form", "factors", "shape"), DORA.values(), ids=DORA.keys())
def test_dora_is_the_difference_that_it_makes_to_its_base(
    tmp_path: Path, path: str, form: str, factors: Tensors, shape: tuple[int, ...]
) -> None:
    magnitude = random(73, m=shape)["m"].abs() + 0.5
    extra = {"alpha": torch.tensor(1.5), "dora_scale": magnitude}
    models = write_lora(
        tmp_path,
        kohya(path, {**factors, **extra}),
        models={"base": "./base", "distilled": "./lora.safetensors", "target": "./target"},
    )
    key = f"{path}.weight"
    delta = 1.5 / 3 * einsum_delta(form, bare(factors))
    expected = 0.7 * dora_delta(models["base"][key], delta, magnitude)
    assert_close(merge(tmp_path)[key], rounded_sum(models["target"][key], expected))


def test_a_dora_of_peft_with_a_convolution(tmp_path: Path) -> None:
    factors = random(80, down=(2, 8, 3, 3), up=(8, 2, 1, 1))
    magnitude = random(81, m=(1, 8, 1, 1))["m"].abs() + 0.5
    named = {
        f"unet.{CONV}.lora_A.weight": factors["down"],
        f"unet.{CONV}.lora_B.weight": factors["up"],
        f"unet.{CONV}.lora_magnitude_vector": magnitude,
    }
    models = write_lora(
        tmp_path,
        named,
        models={"base": "./base", "distilled": "./lora.safetensors", "target": "./target"},
    )
    key = f"{CONV}.weight"
    delta = einsum_delta("lora", bare(factors))
    expected = 0.7 * dora_delta(models["base"][key], delta, magnitude)
    assert_close(merge(tmp_path)[key], rounded_sum(models["target"][key], expected))


def test_large_weights_are_multiplied_in_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = {
        PROJ: ("lokr", random(85, lokr_w1=(2, 2), lokr_w2=(4, 4)), 0),
        CONV: (
            "loha",
            random(86, hada_w1_a=(8, 2), hada_w1_b=(2, 72), hada_w2_a=(8, 2), hada_w2_b=(2, 72)),
            2,
        ),
    }
    magnitude = random(87, m=(8, 1, 1, 1))["m"].abs() + 0.5
    tensors: Tensors = {}
    for path, (_, factors, _) in parts.items():
        tensors |= kohya(
            path, {**factors, "dora_scale": magnitude.clone(), "alpha": torch.tensor(1.0)}
        )
    models = write_lora(
        tmp_path,
        tensors,
        models={"base": "./base", "distilled": "./lora.safetensors", "target": "./target"},
    )
    # Three rows of one weight, less than one of the other.
    monkeypatch.setattr("merge.engine.terms._STEP_ELEMENTS", 24)
    merged = merge(tmp_path)
    for path, (form, factors, rank) in parts.items():
        key = f"{path}.weight"
        delta = (1.0 / rank if rank else 1.0) * einsum_delta(form, bare(factors))
        expected = 0.7 * dora_delta(models["base"][key], delta, magnitude)
        assert_close(merged[key], rounded_sum(models["target"][key], expected))


def test_dora_without_a_base_is_refused(tmp_path: Path) -> None:
    factors = {**random(90, down=(3, 12), up=(8, 3)), "dora_scale": torch.ones(8, 1)}
    write_lora(tmp_path, kohya(TO_K, factors))
    with pytest.raises(PlanError, match=r"1 of its modules are DoRA .*not additive.*models\.base"):
        plan_of(tmp_path)


def test_dora_needs_its_weight_in_the_base(tmp_path: Path) -> None:
    factors = {**random(91, down=(3, 12), up=(8, 3)), "dora_scale": torch.ones(8, 1)}
    write_lora(
        tmp_path,
        kohya(TO_K, factors),
        models={"base": "./base", "distilled": "./lora.safetensors", "target": "./target"},
    )
    base = random_tensors(1)
    del base[f"{TO_K}.weight"]
    write_unet(tmp_path / "base", base)
    with pytest.raises(PlanError, match="a DoRA module needs it, and it is missing in base"):
        plan_of(tmp_path)


# ------------------------------------------------------------------------------------ the refusals


def good(path: str = TO_K, shape: tuple[int, ...] = (8, 12), seed: int = 0) -> Tensors:
    ones = (1,) * len(shape[2:])
    return kohya(path, random(seed, down=(2, *shape[1:]), up=(shape[0], 2, *ones)))


STEM = "lora_unet_" + TO_K.replace(".", "_")
REFUSED: dict[str, tuple[Tensors, str]] = {
    "only unknown keys": (good("up_blocks.9.x"), "lora_unet_up_blocks_9_x: the target has no wei"),
    "half of the keys unknown": (
        {**good(), **good("up_blocks.9.x")},
        "lora_unet_up_blocks_9_x: the target has no weight of this name",
    ),
    "both spellings": (
        {**good(), **kohya(LDM_TO_K, random(1, down=(2, 12), up=(8, 2)))},
        "is already changed by lora_unet_",
    ),
    "alpha zero": ({**good(), f"{STEM}.alpha": torch.tensor(0.0)}, "alpha is 0.0, no usable alpha"),
    "alpha NaN": ({**good(), f"{STEM}.alpha": torch.tensor(torch.nan)}, "alpha is nan, no usable"),
    "two alphas": ({**good(), f"{STEM}.alpha": torch.ones(2)}, "alpha must be one number"),
    "a missing factor": ({f"{STEM}.lora_up.weight": torch.ones(8, 2)}, "only one of its two"),
    "a difference and factors": ({**good(), f"{STEM}.diff": torch.ones(8, 12)}, "and factors of"),
    "a bias": ({**good(), f"{STEM}.lora_up.bias": torch.ones(8)}, "LoRA with a bias"),
    "OFT": ({f"{STEM}.oft_blocks": torch.ones(2, 4, 4)}, "OFT is not supported"),
    "DoRA of inputs": (
        {**good(), f"{STEM}.dora_scale": torch.ones(1, 12)},
        "DoRA .*, which is not additive: it rescales the weight that it was trained on",
    ),
}


@pytest.mark.parametrize(("tensors", "match"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_applied_stops_the_plan(
    tmp_path: Path, tensors: Tensors, match: str
) -> None:
    write_lora(tmp_path, tensors)
    with pytest.raises(PlanError, match=match):
        plan_of(tmp_path)


def test_only_unknown_keys_say_that_nothing_fits(tmp_path: Path) -> None:
    write_lora(tmp_path, good("up_blocks.9.x"))
    with pytest.raises(PlanError, match="none of its keys fits the target"):
        plan_of(tmp_path)


def test_a_lora_for_another_family_is_told(tmp_path: Path) -> None:
    write_lora(tmp_path, good(shape=(8, 16)))
    with pytest.raises(PlanError, match="its cross-attention reads a text of width 16, the target"):
        plan_of(tmp_path)


def test_a_missing_alpha_is_a_warning(tmp_path: Path) -> None:
    write_lora(tmp_path, good())
    warnings = plan_of(tmp_path).warnings
    assert any("1 of 1 LoRA modules state no alpha, so their scale is 1" in w for w in warnings)


# ----------------------------------------------------------------------------------- text encoders

TEXT = "text_encoder/model.safetensors"
FC1 = "text_model.encoder.layers.0.mlp.fc1"


@pytest.fixture(scope="module")
def target(tiny_sd15: Path) -> Path:
    return tiny_sd15 / "target"


def write_text_lora(folder: Path, target: Path, **changes: object) -> tuple[Tensors, torch.Tensor]:
    """Write a LoRA of the UNet and the text encoder; return the latter's factors and weight."""
    weight = load_file(target / TEXT)[f"{FC1}.weight"]
    unet = load_file(target / "unet" / "diffusion_pytorch_model.safetensors")["conv_out.weight"]
    factors = random(100, down=(2, weight.shape[1]), up=(weight.shape[0], 2))
    tensors = {
        **kohya(FC1, {**factors, "alpha": torch.tensor(1.0)}, prefix="lora_te_"),
        **good("conv_out", tuple(unet.shape)),
    }
    save_file(tensors, folder / "lora.safetensors")
    tree = {
        "name": "mini",
        "out_dtype": "float32",
        "models": {"distilled": "./lora.safetensors", "target": str(target)},
        **changes,
    }
    (folder / "mini.yaml").write_text(yaml.safe_dump(tree))
    return factors, weight


def plan(folder: Path) -> MergePlan:
    recipe = load_recipe(folder / "mini.yaml")
    return build_plan(recipe, resolve_sources(recipe))


def test_text_encoder_modules_are_merged_when_the_recipe_says_so(
    tmp_path: Path, target: Path
) -> None:
    factors, weight = write_text_lora(
        tmp_path, target, components=["unet", "text_encoder"], weight=0.5
    )
    recipe = load_recipe(tmp_path / "mini.yaml")
    run_recipe(recipe, tmp_path / "out", device="cpu", verify=False)
    merged = load_file(tmp_path / "out" / TEXT)
    delta = 0.5 * 1.0 / 2 * einsum_delta("lora", bare(factors))
    assert_close(merged[f"{FC1}.weight"], rounded_sum(weight, delta))
    changed = read_output(tmp_path / "out")["conv_out.weight"]
    before = load_file(target / "unet" / "diffusion_pytorch_model.safetensors")["conv_out.weight"]
    assert not torch.equal(changed, before.float())


@pytest.mark.parametrize("components", [["text_encoder"], ["unet", "text_encoder"]])
def test_a_lora_of_text_encoders_alone_is_merged(
    tmp_path: Path, target: Path, components: list[str]
) -> None:
    factors, weight = write_text_lora(tmp_path, target, components=components, weight=0.5)
    tensors = load_file(tmp_path / "lora.safetensors")
    alone = {name: value for name, value in tensors.items() if name.startswith("lora_te_")}
    save_file(alone, tmp_path / "lora.safetensors")
    run_recipe(load_recipe(tmp_path / "mini.yaml"), tmp_path / "out", device="cpu", verify=False)
    merged = load_file(tmp_path / "out" / TEXT)
    delta = 0.5 * 1.0 / 2 * einsum_delta("lora", bare(factors))
    assert_close(merged[f"{FC1}.weight"], rounded_sum(weight, delta))
    unet = read_output(tmp_path / "out")
    before = load_file(target / "unet" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(unet[key].float(), value.float()) for key, value in before.items())


def test_text_encoder_modules_are_an_error_otherwise(tmp_path: Path, target: Path) -> None:
    write_text_lora(tmp_path, target)
    with pytest.raises(PlanError, match="1 of its modules belong to text_encoder, which is not"):
        plan(tmp_path)


def test_text_encoder_modules_can_be_left_out(tmp_path: Path, target: Path) -> None:
    write_text_lora(tmp_path, target, exclude=["text_encoder.*"])
    left = {item.key: item.reason for item in plan(tmp_path).left_out}
    stem = "lora_te_" + FC1.replace(".", "_")
    assert left == {
        f"{stem}.{end}": "excluded by 'text_encoder.*'"
        for end in ("lora_down.weight", "lora_up.weight", "alpha")
    }


def test_the_text_encoder_of_a_lora_that_the_target_lacks(tmp_path: Path, target: Path) -> None:
    second = kohya(FC1, random(110, down=(2, 8), up=(8, 2)), prefix="lora_te2_")
    write_text_lora(tmp_path, target, components=["unet", "text_encoder"])
    tensors = load_file(tmp_path / "lora.safetensors")
    save_file({**tensors, **second}, tmp_path / "lora.safetensors")
    with pytest.raises(PlanError, match="lora_te2_.*_fc1: it belongs to text_encoder_2, and the"):
        plan(tmp_path)


def test_keys_that_fit_nothing_can_be_left_out_by_their_own_names(tmp_path: Path) -> None:
    second = kohya(FC1, random(111, down=(2, 8), up=(8, 2)), prefix="lora_te2_")
    diff = {f"{STEM}_x.diff": torch.ones(3)}
    write_lora(tmp_path, {**good(), **second, **diff})
    with pytest.raises(
        PlanError, match=r"lora_te2_.*: it belongs to text_encoder_2, .*exclude can"
    ):
        plan_of(tmp_path)
    found = plan_of(tmp_path, "exclude=['lora_te2_*','*.diff']")
    assert {item.key: item.reason for item in found.left_out} == {
        **dict.fromkeys(second, "excluded by 'lora_te2_*'"),
        **dict.fromkeys(diff, "excluded by '*.diff'"),
    }
    assert found.counts["lora"] == 1
    # A pattern cannot take a part out of a module that fits.
    with pytest.raises(
        PlanError, match=r"exclude: 'lora_unet_\*' names lora_unet_.* of distilled;"
    ):
        plan_of(tmp_path, "exclude=['lora_te2_*','*.diff','lora_unet_*']")


def test_a_flat_text_encoder_takes_prefixed_names(tmp_path: Path, target: Path) -> None:
    flat = tmp_path / "target"
    shutil.copytree(target, flat)
    tensors = load_file(flat / TEXT)
    renamed = {key.removeprefix("text_model."): value for key, value in tensors.items()}
    save_file(renamed, flat / TEXT, {"format": "pt"})
    changes = {"components": ["unet", "text_encoder"]}
    write_text_lora(tmp_path, target, **changes)
    before = {row.key.removeprefix("text_model."): row.action for row in plan(tmp_path).tensors}
    tree = yaml.safe_load((tmp_path / "mini.yaml").read_text())
    tree["models"]["target"] = str(flat)
    (tmp_path / "mini.yaml").write_text(yaml.safe_dump(tree))
    after = {row.key: row.action for row in plan(tmp_path).tensors}
    assert after == before
    assert after[f"{FC1.removeprefix('text_model.')}.weight"] == "lora"
