"""Components held against their configs: nothing is left for a loader to make up."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from merge import convert, load_recipe, run_recipe
from merge.editor.batches import edit
from merge.editor.load import load_editor
from merge.editor.settings import EditSettings
from merge.errors import CheckpointError
from tests.mini import plan_of, write_recipe

UNET = "unet/diffusion_pytorch_model.safetensors"
Tensors = dict[str, torch.Tensor]

MISSING = {
    "sd15": {
        UNET: "up_blocks.1.resnets.0.norm1.bias",
        "vae/diffusion_pytorch_model.safetensors": "decoder.mid_block.attentions.0.to_q.weight",
        "text_encoder/model.safetensors": "text_model.encoder.layers.0.mlp.fc1.bias",
        "safety_checker/model.safetensors": "concept_embeds",
    },
    "sdxl": {"text_encoder_2/model.safetensors": "text_projection.weight"},
}


def copied(tiny: Path, folder: Path) -> Path:
    return Path(shutil.copytree(tiny / "target", folder / "target"))


def change(path: Path, function: Callable[[Tensors], Tensors]) -> None:
    save_file(
        {k: v.contiguous() for k, v in function(load_file(path)).items()}, path, {"format": "pt"}
    )


def without(*keys: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {key: value for key, value in tensors.items() if key not in keys}


def recipe_over(folder: Path, tiny: Path, target: Any, **changes: Any) -> None:
    models = {"distilled": str(tiny / "lora_kohya.safetensors"), "target": target}
    write_recipe(folder, models=models, out_dtype="keep", verify={"resolution": 64}, **changes)


@pytest.mark.parametrize(
    ("family", "name"), [(family, name) for family, names in MISSING.items() for name in names]
)
def test_a_weight_that_is_missing_in_a_folder_is_named(
    request: pytest.FixtureRequest, tmp_path: Path, family: str, name: str
) -> None:
    tiny = request.getfixturevalue(f"tiny_{family}")
    target = copied(tiny, tmp_path)
    key = MISSING[family][name]
    change(target / name, without(key))
    recipe_over(tmp_path, tiny, "./target")
    component = name.partition("/")[0]
    words = rf"{component}: a weight that its config asks for is missing: .*{key}"
    with pytest.raises(CheckpointError, match=words):
        plan_of(tmp_path)
    if component == "safety_checker":
        return
    with pytest.raises(CheckpointError, match=words):
        convert(target, tmp_path / "one.safetensors")
    with pytest.raises(CheckpointError, match=words):
        load_editor(target, device="cpu")
    assert not list(tmp_path.glob("one*"))


SINGLE = {
    "sd15": (
        "model.diffusion_model.out.2.bias",
        "first_stage_model.quant_conv.weight",
        "cond_stage_model.transformer.text_model.final_layer_norm.weight",
    ),
    "sdxl": (
        "conditioner.embedders.1.model.text_projection",
        "conditioner.embedders.1.model.ln_final.bias",
        "model.diffusion_model.label_emb.0.2.weight",
    ),
}


@pytest.mark.parametrize(
    ("family", "key"), [(family, key) for family, keys in SINGLE.items() for key in keys]
)
def test_a_weight_that_is_missing_in_a_single_file_is_named(
    request: pytest.FixtureRequest, tmp_path: Path, family: str, key: str
) -> None:
    tiny = request.getfixturevalue(f"tiny_{family}")
    convert(tiny / "target", tmp_path / "s.safetensors")
    change(tmp_path / "s.safetensors", without(key))
    words = r"a weight that its config asks for is missing: \S+\Z"
    recipe_over(tmp_path, tiny, {"path": "./s.safetensors", "config": str(tiny / "target")})
    for attempt in (
        lambda: plan_of(tmp_path),
        lambda: convert(tmp_path / "s.safetensors", tmp_path / "f", config=tiny / "target"),
        lambda: load_editor(tmp_path / "s.safetensors", config=tiny / "target", device="cpu"),
    ):
        with pytest.raises(CheckpointError) as caught:
            attempt()
        assert "a weight that its config asks for is missing: " in caught.value.message, words
        assert "draw a missing weight anew" in caught.value.hint
    assert not (tmp_path / "f").exists()


def test_many_missing_weights_are_counted(tiny_sd15: Path, tmp_path: Path) -> None:
    target = copied(tiny_sd15, tmp_path)
    change(target / UNET, lambda t: {k: v for k, v in t.items() if not k.startswith("mid_block.")})
    recipe_over(tmp_path, tiny_sd15, "./target", exclude=["mid_block.*", "lora_unet_mid_block*"])
    with pytest.raises(CheckpointError, match=r"unet: \d+ weights .* are missing: .* and \d+ more"):
        plan_of(tmp_path)


# Shapes -----------------------------------------------------------------------------------------


def as_matrices(tensors: Tensors) -> Tensors:
    return {
        k: v[:, :, 0, 0]
        if k.endswith(("proj_in.weight", "proj_out.weight")) and v.dim() == 4
        else v
        for k, v in tensors.items()
    }


def as_convolutions(tensors: Tensors) -> Tensors:
    return {
        k: v[:, :, None, None]
        if k.endswith(("proj_in.weight", "proj_out.weight")) and v.dim() == 2
        else v
        for k, v in tensors.items()
    }


def old_attention(tensors: Tensors) -> Tensors:
    """What diffusers' converter of December 2023 wrote: huggingface/diffusers#6226."""
    return {
        k: v.reshape(-1, 1, 1) if "attentions.0.to_" in k and k.endswith(".bias") else v
        for k, v in tensors.items()
    }


@pytest.mark.parametrize(
    ("family", "name", "function"),
    [
        ("sd15", UNET, as_matrices),
        ("sdxl", UNET, as_convolutions),
        ("sd15", "vae/diffusion_pytorch_model.safetensors", old_attention),
    ],
    ids=["matrices", "convolutions", "attention"],
)
def test_the_same_numbers_get_the_shape_of_the_config(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    family: str,
    name: str,
    function: Callable[[Tensors], Tensors],
) -> None:
    tiny = request.getfixturevalue(f"tiny_{family}")
    target = copied(tiny, tmp_path)
    before = load_file(target / name)
    recipe_over(tmp_path, tiny, "./target")
    run_recipe(load_recipe(tmp_path / "mini.yaml"), tmp_path / "a", device="cpu", verify=False)
    change(target / name, function)
    assert any(v.shape != before[k].shape for k, v in load_file(target / name).items())
    run_recipe(load_recipe(tmp_path / "mini.yaml"), tmp_path / "b", device="cpu", verify=False)
    expected, found = load_file(tmp_path / "a" / name), load_file(tmp_path / "b" / name)
    assert found.keys() == expected.keys()
    for key, values in expected.items():
        assert found[key].shape == values.shape
        assert torch.equal(found[key], values)
    assert "stored in another shape than their config's" in caplog.text
    load_editor(tmp_path / "b", device="cpu")
    # And by conversion, both ways.
    convert(target, tmp_path / "one.safetensors")
    result = convert(tmp_path / "one.safetensors", tmp_path / "back", config=tiny / "target")
    back = load_file(tmp_path / "back" / name)
    assert all(torch.equal(back[key], values) for key, values in before.items())
    assert result.notes == ()


def test_a_base_in_the_other_layout_gives_the_same_merge(tiny_sd15: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_sd15, tmp_path / "m")
    models = {role: f"./m/{role}" for role in ("base", "distilled", "target")}
    recipe = load_recipe(write_recipe(tmp_path, models=models))
    run_recipe(recipe, tmp_path / "a", device="cpu", verify=False)
    for role in ("base", "distilled"):
        change(tmp_path / "m" / role / "diffusion_pytorch_model.safetensors", as_matrices)
    run_recipe(recipe, tmp_path / "b", device="cpu", verify=False)
    expected, found = load_file(tmp_path / "a" / UNET), load_file(tmp_path / "b" / UNET)
    assert all(torch.equal(found[key], values) for key, values in expected.items())


def test_positions_that_the_config_does_not_have_are_an_error(
    tiny_sd15: Path, tmp_path: Path
) -> None:
    """LongCLIP: huggingface/diffusers#11285."""
    target = copied(tiny_sd15, tmp_path)
    key = "text_model.embeddings.position_embedding.weight"
    width = load_file(target / "text_encoder/model.safetensors")[key].shape[1]
    change(
        target / "text_encoder/model.safetensors",
        lambda t: {**t, key: torch.zeros(248, width).half()},
    )
    recipe_over(tmp_path, tiny_sd15, "./target")
    words = rf"text_encoder: {key} has shape \[248, {width}\], and its config asks for \[77, "
    with pytest.raises(CheckpointError, match=words):
        plan_of(tmp_path)
    with pytest.raises(CheckpointError, match=words):
        convert(target, tmp_path / "one.safetensors")
    # With a config that says so, it is a model like any other.
    path = target / "text_encoder" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"max_position_embeddings": 248}))
    assert plan_of(tmp_path).counts["lora"] > 0


@pytest.mark.parametrize("role", ["base", "distilled"])
def test_every_1x1_convolution_of_a_parent_may_be_a_matrix(
    tiny_sd15: Path, tmp_path: Path, role: str
) -> None:
    models = {name: str(tiny_sd15 / name) for name in ("base", "distilled", "target")}
    parent = Path(shutil.copytree(tiny_sd15 / role, tmp_path / "parent"))
    change(
        parent / Path(UNET).name,
        lambda t: {k: v[:, :, 0, 0] if v.shape[2:] == (1, 1) else v for k, v in t.items()},
    )
    shapes = {k: v.shape for k, v in load_file(parent / Path(UNET).name).items()}
    assert any(len(s) == 2 for k, s in shapes.items() if k.endswith("conv_shortcut.weight"))
    found = []
    for name, used in (("a", models), ("b", {**models, role: str(parent)})):
        write_recipe(tmp_path, models=used)
        recipe = load_recipe(tmp_path / "mini.yaml")
        run_recipe(recipe, tmp_path / name, device="cpu", verify=False)
        found.append(load_file(tmp_path / name / UNET))
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(value, found[1][key]) for key, value in found[0].items())


@pytest.mark.parametrize(
    ("name", "component"),
    [
        ("vae/diffusion_pytorch_model.safetensors", "vae"),
        ("text_encoder/model.safetensors", "text_encoder"),
    ],
)
def test_keys_that_nothing_loads_are_named(
    tiny_sd15: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, component: str
) -> None:
    target = copied(tiny_sd15, tmp_path)
    change(target / name, lambda t: {**t, "loss.logvar": torch.zeros(1)})
    recipe_over(tmp_path, tiny_sd15, "./target")
    run_recipe(load_recipe(tmp_path / "mini.yaml"), tmp_path / "a", device="cpu", verify=False)
    assert caplog.text.count(f"{component}: nothing loads its keys loss.logvar") == 1
    assert (tmp_path / "a" / name).read_bytes() == (target / name).read_bytes()


def test_scales_of_a_component_that_is_not_merged_are_applied(
    tiny_sd15: Path, tmp_path: Path
) -> None:
    target = copied(tiny_sd15, tmp_path)
    name, key = "text_encoder/model.safetensors", "text_model.encoder.layers.0.mlp.fc1"
    plain = load_file(target / name)[f"{key}.weight"].float()
    scale = plain.abs().amax() / 448
    stored = (plain / scale).to(torch.float8_e4m3fn)
    scaled = {f"{key}.weight": stored, f"{key}.weight_scale": scale}
    change(target / name, lambda t: {**t, **scaled})
    recipe_over(tmp_path, tiny_sd15, "./target")
    run_recipe(load_recipe(tmp_path / "mini.yaml"), tmp_path / "a", device="cpu", verify=False)
    found = load_file(tmp_path / "a" / name)
    assert torch.equal(found[f"{key}.weight"], stored.float() * scale)
    assert f"{key}.weight_scale" not in found
    with pytest.raises(CheckpointError, match=f"{key}.weight has a scale beside it"):
        load_editor(target, device="cpu")
    load_editor(tmp_path / "a", device="cpu")


def test_a_config_that_says_little_is_not_asked(tmp_path: Path) -> None:
    """A UNet folder whose config names its class alone may be of any size."""
    from tests.mini import write_models

    write_models(tmp_path)
    write_recipe(tmp_path)
    assert plan_of(tmp_path).counts["delta"] == 7


def test_what_is_whole_edits_the_same_every_time(tiny_sd15: Path, tmp_path: Path) -> None:
    recipe_over(tmp_path, tiny_sd15, str(tiny_sd15 / "target"))
    run_recipe(load_recipe(tmp_path / "mini.yaml"), tmp_path / "a", device="cpu", verify=False)
    settings = EditSettings(steps=1, resolution=64)
    picture = Image.new("RGB", (64, 64), (200, 40, 90))
    pictures = [
        edit(load_editor(tmp_path / "a", device="cpu"), picture, "make it blue", settings)
        for _ in range(2)
    ]
    assert pictures[0].to_pil().tobytes() == pictures[1].to_pil().tobytes()
