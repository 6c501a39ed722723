"""Checkpoint files of public bug reports, rebuilt small: what was reported does not happen here."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from merge import convert, load_recipe, run_recipe
from merge.errors import (
    CheckpointError,
    MergeError,
    NonFiniteError,
    PlanError,
    SourceError,
)
from tests.mini import (
    Tensors,
    plan_of,
    random_tensors,
    read_output,
    write_models,
    write_recipe,
    write_unet,
)

UNET = "unet/diffusion_pytorch_model.safetensors"
STEM = "diffusion_pytorch_model"
CLIP = "cond_stage_model.transformer.text_model."
POSITIONS = f"{CLIP}embeddings.position_ids"


def folder_of(tensors: Tensors, config: Path, folder: Path) -> Path:
    save_file(dict(tensors), folder / "in.safetensors")
    convert(folder / "in.safetensors", folder / "out", config=config)
    return folder / "out"


def same(found: Path, expected: Path, part: str) -> None:
    ours, theirs = load_file(found / part), load_file(expected / part)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], value) for key, value in theirs.items())


# Text encoders ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "stored",
    [
        pytest.param(
            torch.arange(77).half()[None],
            id="ogkalu2/Merge-Stable-Diffusion-models-without-distortion#29",
        ),
        pytest.param(
            (torch.arange(77) * 0.95)[None], id="AUTOMATIC1111/stable-diffusion-webui#7450"
        ),
        pytest.param(torch.arange(77)[None], id="gligen/GLIGEN#67"),
        pytest.param(None, id="kohya-ss/sd-scripts#694"),
    ],
)
def test_positions_are_never_what_a_merge_left_of_them(
    tiny_sd15: Path, single: Tensors, tmp_path: Path, stored: torch.Tensor | None
) -> None:
    tensors = {key: value for key, value in single.items() if key != POSITIONS}
    if stored is not None:
        tensors[POSITIONS] = stored
    out = folder_of(tensors, tiny_sd15 / "target", tmp_path)
    found = load_file(out / "text_encoder/model.safetensors")
    expected = load_file(tiny_sd15 / "target/text_encoder/model.safetensors")
    key = "text_model.embeddings.position_ids"
    if key in found:
        assert torch.equal(found[key], torch.arange(77)[None])
    assert found.keys() - {key} == expected.keys() - {key}


@pytest.mark.parametrize("report", ["eyriewow/merge-models#5"])
def test_a_text_encoder_without_text_model_in_its_names(
    tiny_sd15: Path, single: Tensors, tmp_path: Path, report: str
) -> None:
    flat = {key.replace(CLIP, "cond_stage_model.transformer."): v for key, v in single.items()}
    assert flat.keys() != single.keys()
    out = folder_of(flat, tiny_sd15 / "target", tmp_path)
    same(out, tiny_sd15 / "target", "text_encoder/model.safetensors")


@pytest.mark.parametrize("report", ["huggingface/diffusers#6934"])
def test_the_second_text_encoder_comes_back(tiny_sdxl: Path, tmp_path: Path, report: str) -> None:
    convert(tiny_sdxl / "target", tmp_path / "s.safetensors")
    convert(tmp_path / "s.safetensors", tmp_path / "back", config=tiny_sdxl / "target")
    same(tmp_path / "back", tiny_sdxl / "target", "text_encoder_2/model.safetensors")


# VAEs, averages and markers ---------------------------------------------------------------------


@pytest.mark.parametrize("report", ["huggingface/diffusers#4790"])
def test_attention_of_the_vae_is_renamed_once(
    tiny_sd15: Path, single: Tensors, tmp_path: Path, report: str
) -> None:
    assert not [key for key in single if "to_to_" in key or "first_stage_model." in key[1:]]
    out = folder_of(single, tiny_sd15 / "target", tmp_path)
    same(out, tiny_sd15 / "target", f"vae/{STEM}.safetensors")


@pytest.mark.parametrize(
    ("prefix", "words"),
    [
        pytest.param("first_stage_model.", "vae", id="lllyasviel/stable-diffusion-webui-forge#512"),
        pytest.param("first_stage_model.encoder.", "vae", id="bmaltais/kohya_ss#346"),
        pytest.param("cond_stage_model.", "text_encoder", id="s1dlx/sd-webui-bayesian-merger#44"),
    ],
)
def test_a_file_without_a_component_is_refused(
    tiny_sd15: Path, single: Tensors, tmp_path: Path, prefix: str, words: str
) -> None:
    tensors = {key: value for key, value in single.items() if not key.startswith(prefix)}
    with pytest.raises(MergeError, match=words):
        folder_of(tensors, tiny_sd15 / "target", tmp_path)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("report", ["huggingface/diffusers#2769"])
def test_a_file_of_stable_diffusion_2_is_called_that(
    tiny_sd15: Path, single: Tensors, tmp_path: Path, report: str
) -> None:
    tensors = {
        key.replace(CLIP, "cond_stage_model.model.transformer."): value
        for key, value in single.items()
    }
    with pytest.raises(CheckpointError, match=r"Stable Diffusion 2\.x file"):
        folder_of(tensors, tiny_sd15 / "target", tmp_path)
    save_file(tensors, tmp_path / "in.safetensors")
    with pytest.raises(MergeError, match="text_encoder"):
        convert(
            tmp_path / "in.safetensors",
            tmp_path / "out",
            config=tiny_sd15 / "target",
            exclude=["cond_stage_model.model.*"],
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("report", ["huggingface/diffusers#1818"])
def test_asking_for_the_average_gives_the_average(
    tiny_sd15: Path, single: Tensors, tmp_path: Path, report: str
) -> None:
    tensors = dict(single)
    for key, value in single.items():
        if key.startswith("model.diffusion_model."):
            tensors["model_ema." + key.removeprefix("model.").replace(".", "")] = value * 2
    save_file(tensors, tmp_path / "in.safetensors")
    found = {}
    for ema in (True, False):
        out = tmp_path / str(ema)
        convert(tmp_path / "in.safetensors", out, config=tiny_sd15 / "target", ema=ema)
        found[ema] = load_file(out / UNET)
    assert all(torch.equal(found[True][key], value * 2) for key, value in found[False].items())


@pytest.mark.parametrize(
    "marker",
    [
        pytest.param("v_pred", id="invoke-ai/InvokeAI#7965"),
        pytest.param("ztsnr", id="invoke-ai/InvokeAI#7495"),
    ],
)
def test_a_v_prediction_file_gets_no_epsilon_scheduler(
    tiny_sd15: Path, single: Tensors, tmp_path: Path, marker: str
) -> None:
    with pytest.raises(MergeError, match=rf"v-prediction model \(it has {marker}\)"):
        folder_of({**single, marker: torch.zeros(0)}, tiny_sd15 / "target", tmp_path)
    assert not (tmp_path / "out").exists()


# Channels and sizes -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("report", "channels"),
    [
        ("AUTOMATIC1111/stable-diffusion-webui#7240", 8),
        ("AUTOMATIC1111/stable-diffusion-webui#3484", 9),
        ("hako-mikan/sd-webui-supermerger#368", 9),
    ],
)
def test_more_input_channels_than_the_delta_has(tmp_path: Path, report: str, channels: int) -> None:
    models = write_models(tmp_path, dtype=torch.float32)
    target = random_tensors(3, dtype=torch.float32, channels=channels)
    write_unet(tmp_path / "target", target)
    recipe = write_recipe(tmp_path, weight=0.5, out_dtype="float32")
    if channels != 8:
        with pytest.raises(PlanError, match=rf"{channels}"):
            plan_of(tmp_path)
        return
    run_recipe(load_recipe(recipe), tmp_path / "out", device="cpu", verify=False)
    found = read_output(tmp_path / "out")
    assert torch.equal(found["conv_in.weight"], target["conv_in.weight"])
    key = "conv_out.weight"
    delta = models["distilled"][key].numpy() - models["base"][key].numpy()
    np.testing.assert_array_equal(found[key].numpy(), target[key].numpy() + delta * np.float32(0.5))


@pytest.mark.parametrize("report", ["ogkalu2/Merge-Stable-Diffusion-models-without-distortion#21"])
def test_two_widths_of_text_are_refused_by_key(tmp_path: Path, report: str) -> None:
    models = write_models(tmp_path)
    key = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"
    for role in ("base", "distilled"):
        write_unet(tmp_path / role, {**models[role], key: torch.zeros(8, 16).half()})
    write_recipe(tmp_path)
    with pytest.raises(PlanError, match=r"16.*12|12.*16"):
        plan_of(tmp_path)


@pytest.mark.parametrize("report", ["huggingface/diffusers#6790"])
def test_a_projection_that_only_the_distilled_has_is_not_added(tmp_path: Path, report: str) -> None:
    models = write_models(tmp_path)
    key = "time_embedding.cond_proj.weight"
    write_unet(tmp_path / "distilled", {**models["distilled"], key: torch.ones(8, 256).half()})
    recipe = load_recipe(write_recipe(tmp_path))
    run_recipe(recipe, tmp_path / "out", device="cpu", verify=False)
    assert read_output(tmp_path / "out").keys() == models["target"].keys()


@pytest.mark.parametrize("report", ["Comfy-Org/ComfyUI#4989"])
def test_three_float8_models_are_added_as_numbers(tmp_path: Path, report: str) -> None:
    models = write_models(tmp_path)
    key, values = "conv_out.weight", {}
    for role, tensors in models.items():
        stored = {k: v.to(torch.float8_e4m3fn) for k, v in tensors.items()}
        values[role] = stored[key].float().numpy()
        write_unet(tmp_path / role, stored)
    recipe = load_recipe(write_recipe(tmp_path, out_dtype="float32"))
    run_recipe(recipe, tmp_path / "out", device="cpu", verify=False)
    expected = values["target"] + (values["distilled"] - values["base"])
    np.testing.assert_array_equal(read_output(tmp_path / "out")[key].numpy(), expected)


@pytest.mark.parametrize("report", ["ICTMCG/Make-Your-Anchor#9"])
def test_a_nan_in_a_published_unet_is_named(tmp_path: Path, report: str) -> None:
    models = write_models(tmp_path)
    key = "down_blocks.0.resnets.0.conv1.weight"
    models["target"][key][0, 0, 0, 0] = torch.nan
    write_unet(tmp_path / "target", models["target"])
    recipe = load_recipe(write_recipe(tmp_path))
    with pytest.raises(NonFiniteError, match=key):
        run_recipe(recipe, tmp_path / "out", device="cpu", verify=False)


# Files that are something else ------------------------------------------------------------------


def pointer(path: Path) -> None:
    path.write_text(
        f"version https://git-lfs.github.com/spec/v1\noid sha256:{'ab' * 32}\nsize 3438167540\n"
    )


def web_page(path: Path) -> None:
    path.write_text("<!doctype html>\n<html><head></head><body>" + "x" * 200 + "</body></html>")


def renamed_pickle(path: Path) -> None:
    torch.save(random_tensors(1), path)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def number_in_metadata(path: Path) -> None:
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    header["__metadata__"] = {"unquoted": 0}
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        pytest.param(pointer, "Git LFS", id="huggingface/diffusers#5520"),
        pytest.param(web_page, "web page|HTML", id="huggingface/diffusers#4406"),
        pytest.param(renamed_pickle, "PyTorch|pickle", id="kohya-ss/sd-scripts#990"),
        pytest.param(cut, "bytes", id="Comfy-Org/ComfyUI#3225"),
        pytest.param(number_in_metadata, "metadata", id="safetensors/safetensors#278"),
    ],
)
def test_what_is_no_whole_safetensors_file_is_said(
    tmp_path: Path, change: Callable[[Path], None], words: str
) -> None:
    write_models(tmp_path)
    write_recipe(tmp_path)
    change(tmp_path / "distilled" / f"{STEM}.safetensors")
    with pytest.raises((CheckpointError, SourceError), match=f"(?i){words}") as caught:
        plan_of(tmp_path)
    assert f"{STEM}.safetensors" in str(caught.value)


@pytest.mark.parametrize(
    ("role", "extra", "words"),
    [
        pytest.param(
            "distilled",
            "control_model.input_hint_block.0.weight",
            "ControlNet",
            id="Mikubill/sd-webui-controlnet#19",
        ),
        pytest.param(
            "distilled",
            "controlnet_down_blocks.0.weight",
            "ControlNet",
            id="huggingface/diffusers#9978",
        ),
        pytest.param(
            "target",
            "controlnet_cond_embedding.conv_in.weight",
            "ControlNet",
            id="huggingface/diffusers#6823",
        ),
        pytest.param(
            "distilled",
            "image_proj.proj.weight",
            "IP-Adapter",
            id="tencent-ailab/IP-Adapter#172",
        ),
    ],
)
def test_a_model_of_another_kind_is_named(
    tmp_path: Path, role: str, extra: str, words: str
) -> None:
    models = write_models(tmp_path)
    own = (
        {} if "image_proj" in extra else {k: v for k, v in models["base"].items() if "out" not in k}
    )
    shutil.rmtree(tmp_path / role)
    (tmp_path / role).mkdir()
    save_file({**own, extra: torch.zeros(4, 4)}, tmp_path / role / f"{STEM}.safetensors")
    write_recipe(tmp_path)
    with pytest.raises(MergeError, match=words):
        plan_of(tmp_path)


@pytest.mark.parametrize("report", ["safetensors/safetensors#549"])
def test_what_is_written_says_its_format(tmp_path: Path, report: str) -> None:
    models = write_models(tmp_path)
    for role in models:
        save_file(models[role], tmp_path / role / f"{STEM}.safetensors")
    recipe = load_recipe(write_recipe(tmp_path))
    run_recipe(recipe, tmp_path / "out", device="cpu", verify=False)
    with safe_open(tmp_path / "out" / UNET, "pt") as file:
        assert file.metadata()["format"] == "pt"


# Shards and variants ----------------------------------------------------------------------------


def split(folder: Path, pattern: str) -> None:
    """Write a UNet's tensors as two shards with an index."""
    tensors = load_file(folder / f"{STEM}.safetensors")
    (folder / f"{STEM}.safetensors").unlink()
    names, places = sorted(tensors), {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        name = pattern.format(f"{number:05d}-of-00002")
        save_file({key: tensors[key] for key in part}, folder / name, {"format": "pt"})
        places |= dict.fromkeys(part, name)
    variant = ".fp16" if "fp16" in pattern else ""
    index = {"metadata": {}, "weight_map": places}
    (folder / f"{STEM}.safetensors.index{variant}.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("pattern", "report"),
    [
        (f"{STEM}-{{}}.safetensors", "huggingface/diffusers#8805"),
        (f"{STEM}.fp16-{{}}.safetensors", "huggingface/diffusers#9061"),
        (f"{STEM}-{{}}.fp16.safetensors", "huggingface/diffusers#8902"),
    ],
)
def test_shards_of_every_spelling_are_one_model(
    tiny_sd15: Path, tmp_path: Path, pattern: str, report: str
) -> None:
    target = Path(shutil.copytree(tiny_sd15 / "target", tmp_path / "target"))
    split(target / "unet", pattern)
    convert(target, tmp_path / "s.safetensors")
    convert(tmp_path / "s.safetensors", tmp_path / "back", config=tiny_sd15 / "target")
    same(tmp_path / "back", tiny_sd15 / "target", UNET)


@pytest.mark.parametrize(
    ("report", "harm"),
    [("sgl-project/sglang#32279", "shard"), ("huggingface/huggingface_hub#4728", "tensor")],
)
def test_an_index_that_names_more_than_there_is(tmp_path: Path, report: str, harm: str) -> None:
    write_models(tmp_path)
    write_recipe(tmp_path)
    folder = tmp_path / "distilled"
    split(folder, f"{STEM}-{{}}.safetensors")
    second = folder / f"{STEM}-00002-of-00002.safetensors"
    if harm == "shard":
        second.unlink()
        words = second.name
    else:
        tensors = load_file(second)
        words, _ = tensors.popitem()
        save_file(tensors, second)
    with pytest.raises((CheckpointError, PlanError, SourceError), match=words):
        plan_of(tmp_path)
