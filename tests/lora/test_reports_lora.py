"""What users of other programs reported about LoRA files, tried here: each report is named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from merge import load_recipe, run_recipe
from merge.errors import MergeError, PlanError
from merge.family.foreign import foreign_lora
from merge.family.stable_diffusion import SD1
from merge.lora.forms.table import delta_rows
from merge.lora.parse import parse_adapters
from merge.lora.roles import down_factors
from tests.family.test_keymap import full_unet
from tests.lora.test_lora_names import TEXT
from tests.mini import plan_of, read_output, write_models, write_recipe

Shapes = dict[str, tuple[int, ...]]
Tensors = dict[str, torch.Tensor]
Arrays = dict[str, np.ndarray]

TO_K = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
KOHYA_TO_K = f"lora_unet_{TO_K.replace('.', '_')}"
SDXL_TO_K = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_k"
FC1 = "text_model.encoder.layers.0.mlp.fc1"


def pair(stem: str, shape: tuple[int, ...], rank: int = 2, style: str = "lora_down") -> Shapes:
    """Return the shapes of two factors of a weight of this shape."""
    down, up = {
        "lora_down": ("lora_down.weight", "lora_up.weight"),
        "lora_A": ("lora_A.weight", "lora_B.weight"),
        "lora_A_1": ("lora_A_1.default_0.weight", "lora_B_1.default_0.weight"),
        "lora.down": ("lora.down.weight", "lora.up.weight"),
    }[style]
    ones = (1,) * len(shape[2:])
    return {f"{stem}.{down}": (rank, *shape[1:]), f"{stem}.{up}": (shape[0], rank, *ones)}


# ---------------------------------------------------------------------------------------- names

# Report to family, path of the weight, the module's name in the file and its style.
NAMED: dict[str, tuple[str, str, str, str]] = {
    "Comfy-Org/ComfyUI#5655": (
        "sdxl",
        SDXL_TO_K,
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_k",
        "lora_down",
    ),
    "Nerogar/OneTrainer#885": (
        "sdxl",
        "up_blocks.1.attentions.2.transformer_blocks.1.ff.net.2",
        "unet.output_blocks.5.1.transformer_blocks.1.ff.net.2",
        "lora_down",
    ),
    "shootthesound/comfyUI-Realtime-Lora#28": (
        "sdxl",
        SDXL_TO_K,
        "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_k",
        "lora_down",
    ),
    "huggingface/diffusers#8581": (
        "sdxl",
        "add_embedding.linear_1",
        "lora_unet_label_emb_0_0",
        "lora_down",
    ),
    "huggingface/diffusers#6368": (
        "sdxl",
        "down_blocks.0.downsamplers.0.conv",
        "lora_unet_down_blocks_0_downsamplers_0_conv",
        "lora_down",
    ),
    "huggingface/diffusers#6382": (
        "sdxl",
        "down_blocks.0.resnets.0.conv1",
        "down_blocks.0.resnets.0.conv1",
        "lora_A_1",
    ),
    "bmaltais/kohya_ss#307": (
        "sd15",
        "up_blocks.1.resnets.2.conv_shortcut",
        "lora_unet_up_blocks_1_resnets_2_conv_shortcut",
        "lora_down",
    ),
    "bmaltais/kohya_ss#310": (
        "sd15",
        "down_blocks.0.resnets.0.time_emb_proj",
        "lora_unet_down_blocks_0_resnets_0_time_emb_proj",
        "lora_down",
    ),
    "Open-Model-Initiative/OMI-Model-Standards#5": (
        "sd15",
        "up_blocks.0.upsamplers.0.conv",
        "lora_unet_output_blocks_2_1_conv",
        "lora_down",
    ),
    "luosiallen/latent-consistency-model#57": (
        "sd15",
        "mid_block.resnets.1.time_emb_proj",
        "base_model.model.mid_block.resnets.1.time_emb_proj",
        "lora_A",
    ),
    "Panchovix/stable-diffusion-webui-reForge#244": (
        "sdxl",
        SDXL_TO_K,
        f"diffusion_model._orig_mod.{SDXL_TO_K}",
        "lora_A",
    ),
}


@pytest.mark.parametrize("report", NAMED)
def test_a_unet_key_that_others_did_not_load_is_resolved(report: str) -> None:
    family, path, stem, style = NAMED[report]
    target = full_unet(family)
    table = parse_adapters(
        pair(stem, target[f"{path}.weight"], style=style), {}, {"unet": target}, SD1
    )
    assert table.problems == ()
    assert [module.key for module in table.modules] == [f"{path}.weight"]


@pytest.mark.parametrize(
    ("first", "last"),
    [
        ("unet.unet.", ".processor.to_v_lora"),
        ("unet.", ".processor.to_v_lora"),
        ("", ".processor.to_v_lora"),
    ],
    ids=[
        "huggingface/diffusers#5977",
        "LucianoCirino/efficiency-nodes-comfyui#104",
        "huggingface/diffusers#3279",
    ],
)
def test_processors_with_any_prefix_are_resolved(first: str, last: str) -> None:
    target = full_unet("sdxl")
    path = SDXL_TO_K.replace("to_k", "to_v")
    rows, columns = target[f"{path}.weight"]
    stem = first + path.removesuffix(".to_v") + last
    shapes = {f"{stem}.down.weight": (4, columns), f"{stem}.up.weight": (rows, 4)}
    table = parse_adapters(shapes, {}, {"unet": target}, SD1)
    assert table.problems == ()
    assert [module.key for module in table.modules] == [f"{path}.weight"]


@pytest.mark.parametrize(
    ("component", "path", "stem"),
    [
        ("text_encoder_2", "text_projection", "lora_te2_text_projection"),
        ("text_encoder", FC1, f"lora_te1.{FC1}"),
        ("text_encoder", FC1, f"lora_te_{FC1.replace('.', '_')}"),
        ("text_encoder", FC1, f"lora_te_wrapped_transformer_{FC1.replace('.', '_')}"),
        ("text_encoder_2", FC1, f"text_encoder_2.{FC1}"),
    ],
    ids=[
        "Nerogar/OneTrainer#47, Comfy-Org/ComfyUI#1163",
        "lllyasviel/stable-diffusion-webui-forge#1229",
        "vladmandic/sdnext#4987",
        "kohya-ss/sd-webui-additional-networks#133",
        "leejet/stable-diffusion.cpp#213",
    ],
)
@pytest.mark.parametrize("is_flat", [False, True])
def test_a_text_encoder_key_that_others_did_not_load_is_resolved(
    component: str, path: str, stem: str, is_flat: bool
) -> None:
    def spelled(key: str) -> str:
        return key.removeprefix("text_model.") if is_flat else key

    targets = {name: {spelled(k): s for k, s in keys.items()} for name, keys in TEXT.items()}
    key = f"{spelled(path)}.weight"
    table = parse_adapters(pair(stem, targets[component][key]), {}, {"unet": {}, **targets}, SD1)
    assert table.problems == ()
    assert [(m.component, m.key) for m in table.modules] == [(component, key)]


# -------------------------------------------------------------------------------------- refusals

# Report to the keys that are added to a good module, and words of the refusal.
REFUSED: dict[str, tuple[Shapes, str]] = {
    "Comfy-Org/ComfyUI#6381": ({f"{KOHYA_TO_K}.on_input": ()}, "IA3 is not supported"),
    "Comfy-Org/ComfyUI#5230": (
        {"oft_unet_x.oft_blocks.0": (2, 2)},
        r"oft_unet_x\.oft_blocks\.0: OFT is not supported",
    ),
    "Comfy-Org/ComfyUI#14903": ({"x.boft_R": (2, 2)}, "BOFT is not supported"),
    "Nerogar/OneTrainer#485": ({"bundle_emb.word.clip_l": (2, 4)}, "an embedding stored beside"),
    "kijai/ComfyUI-KJNodes#146": (
        {f"{TO_K}.lora_B.bias": (8,)},
        "a LoRA with a bias is not supported",
    ),
    "huggingface/peft#1539": (
        {"lora_unet_conv_out.lora_down.weight": (0, 8, 3, 3),
         "lora_unet_conv_out.lora_up.weight": (4, 0, 1, 1)},
        "lora_unet_conv_out: it is empty: its factors have rank 0",
    ),
}  # fmt: skip


@pytest.mark.parametrize("report", REFUSED)
def test_what_cannot_be_added_is_named(report: str, tmp_path: Path) -> None:
    shapes, words = REFUSED[report]
    good = pair(KOHYA_TO_K, (8, 12))
    write_models(tmp_path)
    tensors = {name: torch.ones(shape) for name, shape in {**good, **shapes}.items()}
    save_file(tensors, tmp_path / "lora.safetensors")
    write_recipe(tmp_path, models={"distilled": "./lora.safetensors", "target": "./target"})
    with pytest.raises(PlanError, match=words):
        plan_of(tmp_path)


def test_magnitudes_that_lost_their_factors_are_named() -> None:
    """Comfy-Org/ComfyUI#3494: a converter left dots in the names of DoRA's norms alone."""
    target = full_unet("sdxl")
    flat = f"lora_unet_{SDXL_TO_K.replace('.', '_')}"
    shapes = {
        **pair(flat, target[f"{SDXL_TO_K}.weight"]),
        f"{flat.replace('attn1_to_k', 'attn1.to_k')}.lora_magnitude_vector": (640,),
    }
    (problem,) = parse_adapters(shapes, {}, {"unet": target}, SD1).problems
    assert "attn1.to_k: it has no factors" in problem


@pytest.mark.parametrize(
    ("theirs", "ours", "path", "words"),
    [
        ("sd15", "sdxl", "down_blocks.0.attentions.0.proj_in", "Stable Diffusion 1.x or 2.x"),
        ("sdxl", "sd15", SDXL_TO_K.replace("blocks.0.attn1", "blocks.1.attn1"), "SDXL"),
    ],
    ids=["Comfy-Org/ComfyUI#3518", "rupeshs/fastsdcpu#82"],
)
def test_a_lora_of_another_model_is_called_that(
    theirs: str, ours: str, path: str, words: str
) -> None:
    shapes = pair(f"lora_unet_{path.replace('.', '_')}", full_unet(theirs)[f"{path}.weight"])
    assert f"it looks like a LoRA for {words}" in foreign_lora(
        shapes, down_factors(shapes), full_unet(ours), SD1
    )


# ---------------------------------------------------------------------------------------- values


def merged(folder: Path, tensors: Tensors, weight: float) -> tuple[np.ndarray, np.ndarray]:
    """Merge a LoRA of `to_k` into the mini UNet; return its weight before and after."""
    models = write_models(folder, dtype=torch.float32)
    save_file(tensors, folder / "lora.safetensors")
    places = {"target": "./target", "distilled": "./lora.safetensors"}
    path = write_recipe(folder, models=places, weight=weight, out_dtype="float32")
    run_recipe(load_recipe(path), folder / "out", device="cpu", verify=False)
    key = f"{TO_K}.weight"
    before, after = models["target"][key], read_output(folder / "out")[key]
    return before.double().numpy(), after.double().numpy()


def factors(rank: int, alpha: float | None, seed: int = 0) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        f"{KOHYA_TO_K}.lora_down.weight": torch.randn(rank, 12, generator=generator),
        f"{KOHYA_TO_K}.lora_up.weight": torch.randn(8, rank, generator=generator),
    }
    return tensors if alpha is None else {**tensors, f"{KOHYA_TO_K}.alpha": torch.tensor(alpha)}


@pytest.mark.parametrize(
    ("rank", "alpha", "weight", "scale"),
    [
        (16, 64.0, 1.0, 4.0),
        (4, None, 1.0, 1.0),
        (4, 1.0, -0.5, -0.125),
        (3, 3.0, 1.5, 1.5),
        (20, 10.0, 1.0, 0.5),
    ],
    ids=[
        "Comfy-Org/ComfyUI#12191",
        "kohya-ss/sd-webui-additional-networks#133",
        "huggingface/peft#2796",
        "derrian-distro/LoRA_Easy_Training_Scripts#52",
        "huggingface/diffusers#4593",
    ],
)
def test_the_scale_is_alpha_by_rank_times_the_weight(
    tmp_path: Path, rank: int, alpha: float | None, weight: float, scale: float
) -> None:
    """Strong alphas, none, negative weights, weights above 1, ranks above the layer's width."""
    tensors = factors(rank, alpha)
    before, after = merged(tmp_path, tensors, weight)
    down, up = (
        tensors[f"{KOHYA_TO_K}.lora_{part}.weight"].double().numpy() for part in ("down", "up")
    )
    np.testing.assert_allclose(after, before + scale * (up @ down), rtol=0, atol=4e-6)


@pytest.mark.parametrize(
    "bad",
    [float("nan"), float("inf")],
    ids=["bmaltais/kohya_ss#1986", "huggingface/diffusers#5316"],
)
def test_a_broken_lora_is_never_merged_in_silence(tmp_path: Path, bad: float) -> None:
    tensors = factors(2, 2.0)
    tensors[f"{KOHYA_TO_K}.lora_up.weight"][0, 0] = bad
    with pytest.raises(MergeError, match="to_k"):
        merged(tmp_path, tensors, 1.0)


def test_modules_of_several_ranks_without_alpha_have_scale_one() -> None:
    """huggingface/diffusers#14409: one global alpha gave modules of other ranks another scale."""
    target = full_unet("sd15")
    paths = {"mid_block.attentions.0.proj_in": 16, "mid_block.attentions.0.proj_out": 64}
    shapes: Shapes = {}
    for path, rank in paths.items():
        shapes |= pair(f"unet.{path}", target[f"{path}.weight"], rank, "lora_A")
    table = parse_adapters(shapes, {}, {"unet": target}, SD1)
    assert [(m.rank, m.divisor, m.alpha) for m in table.modules] == [(16, 16, None), (64, 64, None)]


def test_alphas_may_differ_between_modules() -> None:
    """huggingface/diffusers#3910: a resized LoRA has an alpha for each module."""
    target = full_unet("sd21")
    paths = {"mid_block.attentions.0.proj_in": 94, "mid_block.attentions.0.proj_out": 123}
    shapes: Shapes = {}
    for path, rank in paths.items():
        stem = f"lora_unet_{path.replace('.', '_')}"
        shapes |= {**pair(stem, target[f"{path}.weight"], rank), f"{stem}.alpha": ()}
    table = parse_adapters(shapes, {}, {"unet": target}, SD1)
    assert table.problems == ()
    assert [(m.rank, (m.alpha_key or "")[-8:]) for m in table.modules] == [
        (94, "in.alpha"),
        (123, "ut.alpha"),
    ]


def test_a_lokr_of_whole_factors_ignores_its_alpha() -> None:
    """Comfy-Org/ComfyUI#15114: with neither factor in two parts LyCORIS has no scale."""
    target = {f"{TO_K}.weight": (8, 12)}
    shapes = {
        f"{KOHYA_TO_K}.lokr_w1": (2, 3),
        f"{KOHYA_TO_K}.lokr_w2": (4, 4),
        f"{KOHYA_TO_K}.alpha": (),
    }
    (module,) = parse_adapters(shapes, {}, {"unet": target}, SD1).modules
    assert (module.rank, module.alpha_key, module.divisor) == (0, None, 1)
    assert module.idle == (f"{KOHYA_TO_K}.alpha",)


@pytest.mark.parametrize(
    "form", ["loha", "locon"], ids=["Comfy-Org/ComfyUI#197", "KohakuBlueleaf/LyCORIS#22"]
)
def test_cores_are_contracted(form: str) -> None:
    """Also ssube/onnx-web#312: what einsum says, for a 3x3 convolution."""
    random = np.random.default_rng(0)
    if form == "locon":
        shapes: Shapes = {"up": (8, 2, 1, 1), "mid": (2, 3, 3, 3), "down": (3, 6, 1, 1)}
    else:
        one = {"_a": (2, 8), "_b": (2, 6)}
        shapes = {f"w{n}{end}": shape for n in "12" for end, shape in one.items()}
        shapes |= {"t1": (2, 2, 3, 3), "t2": (2, 2, 3, 3)}
    f: Arrays = {name: random.standard_normal(shape) for name, shape in shapes.items()}
    if form == "locon":
        expected = np.einsum(
            "or,rqhw,qi->oihw", f["up"][:, :, 0, 0], f["mid"], f["down"][:, :, 0, 0]
        )
    else:
        halves = [
            np.einsum("ro,rqhw,qi->oihw", f[f"w{n}_a"], f[f"t{n}"], f[f"w{n}_b"]) for n in "12"
        ]
        expected = halves[0] * halves[1]
    np.testing.assert_allclose(delta_rows(form, f, 0, 8), expected.reshape(8, -1), atol=1e-12)


def test_whole_differences_of_norms_are_read() -> None:
    """Comfy-Org/ComfyUI#1347 and #1467: `w_norm`, `b_norm`, `diff` and `diff_b` were skipped."""
    target = full_unet("sd15")
    norm = "up_blocks.2.attentions.1.norm"
    proj = "down_blocks.2.attentions.0.proj_in"
    shapes: Shapes = {}
    for path, weight, bias in ((norm, "w_norm", "b_norm"), (proj, "diff", "diff_b")):
        stem = f"lora_unet_{path.replace('.', '_')}"
        shapes[f"{stem}.{weight}"] = target[f"{path}.weight"]
        shapes[f"{stem}.{bias}"] = target[f"{path}.bias"]
    table = parse_adapters(shapes, {}, {"unet": target}, SD1)
    assert table.problems == ()
    assert {m.key for m in table.modules} == {
        f"{p}.{e}" for p in (norm, proj) for e in ("weight", "bias")
    }
