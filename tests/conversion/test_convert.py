"""Folders into single files and back: diffusers is the judge, every tensor bit-equal."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from merge import convert
from merge.conversion.metadata import single_file_metadata
from merge.conversion.model import WrittenFile
from merge.errors import (
    CheckpointError,
    IntegrityError,
    MergeError,
    NoSpaceError,
    OutputError,
    OutputExistsError,
    SourceError,
    SourceNotFoundError,
)
from merge.family.model import Recognised
from merge.family.stable_diffusion import SD2

FAMILIES = ("sd15", "sdxl")
PARTS = {
    "sd15": ("unet", "vae", "text_encoder"),
    "sdxl": ("unet", "vae", "text_encoder", "text_encoder_2"),
}
PIPELINES = {
    ("sd15", 8): "StableDiffusionInstructPix2PixPipeline",
    ("sdxl", 8): "StableDiffusionXLInstructPix2PixPipeline",
    ("sd15", 4): "StableDiffusionPipeline",
    ("sdxl", 4): "StableDiffusionXLPipeline",
}
UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module", params=[8, 4], ids=["8ch", "4ch"])
def channels(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture(scope="module")
def pipeline(
    request: pytest.FixtureRequest,
    family: str,
    channels: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A whole pipeline: the tiny target, or the same with the base's 4-channel UNet."""
    models: Path = request.getfixturevalue(f"tiny_{family}")
    if channels == 8:
        return models / "target"
    folder = tmp_path_factory.mktemp(f"{family}-4") / "base"
    shutil.copytree(models / "target", folder)
    shutil.rmtree(folder / "unet")
    shutil.copytree(models / "base", folder / "unet")
    index = json.loads((folder / "model_index.json").read_text())
    index["_class_name"] = PIPELINES[family, 4]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture(scope="module")
def single(pipeline: Path, family: str, channels: int, tmp_path_factory: Any) -> Path:
    out = tmp_path_factory.mktemp("single") / f"{family}-{channels}.safetensors"
    convert(pipeline, out)
    return out


def weights(folder: Path, part: str) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in sorted((folder / part).glob("*.safetensors")):
        found |= load_file(path)
    return found


def load(kind: str, family: str, channels: int, *where: str, **options: Any) -> Any:
    import diffusers
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    diffusers.logging.set_verbosity_error()
    if family == "sd15":
        options["safety_checker"] = None
    if (family, channels) == ("sdxl", 8):
        options["add_watermarker"] = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipeline = getattr(getattr(diffusers, PIPELINES[family, channels]), kind)
        return pipeline(*where, local_files_only=True, torch_dtype=torch.float16, **options)


# Both ways -------------------------------------------------------------------------------------


def test_diffusers_reads_every_tensor_of_a_single_file(
    pipeline: Path, single: Path, family: str, channels: int
) -> None:
    ours = load("from_single_file", family, channels, str(single), config=str(pipeline))
    theirs = load("from_pretrained", family, channels, str(pipeline))
    for part in PARTS[family]:
        found = getattr(ours, part).state_dict()
        expected = getattr(theirs, part).state_dict()
        assert found.keys() == expected.keys()
        for key, tensor in expected.items():
            assert torch.equal(found[key], tensor), f"{part}: {key}"


def test_a_round_trip_is_the_identity(pipeline: Path, single: Path, tmp_path: Path) -> None:
    result = convert(single, tmp_path / "back", config=pipeline)
    assert result.layout == "diffusers"
    assert result.left_out == {}
    names = sorted(
        path.relative_to(pipeline).as_posix() for path in pipeline.rglob("*") if path.is_file()
    )
    for name in names:
        before, after = pipeline / name, tmp_path / "back" / name
        if name.endswith(".safetensors"):
            ours, theirs = load_file(after), load_file(before)
            assert ours.keys() == theirs.keys()
            for key, tensor in theirs.items():
                assert ours[key].dtype == tensor.dtype
                assert torch.equal(ours[key].view(torch.uint8), tensor.view(torch.uint8)), key
        else:
            assert after.read_bytes() == before.read_bytes(), name
    again = tmp_path / "again.safetensors"
    convert(tmp_path / "back", again)
    first, second = load_file(single), load_file(again)
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[key]) for key, tensor in first.items())


def test_the_same_bytes_every_time(pipeline: Path, single: Path, tmp_path: Path) -> None:
    copy = tmp_path / single.name
    shown: list[tuple[str, int, int]] = []
    result = convert(pipeline, copy, on_progress=lambda *words: shown.append(words))
    digest = hashlib.sha256(copy.read_bytes()).hexdigest()
    assert result.files == {single.name: WrittenFile(copy.stat().st_size, digest)}
    assert copy.read_bytes() == single.read_bytes()
    assert {stage for stage, _, _ in shown} == {"convert"}
    assert [done for _, done, _ in shown] == sorted(done for _, done, _ in shown)
    assert shown[-1][1] == shown[-1][2] > 0.7 * copy.stat().st_size
    assert list(tmp_path.iterdir()) == [copy]


def test_names_and_shapes_are_those_of_published_files(
    single: Path, family: str, channels: int
) -> None:
    with safe_open(single, "pt") as file:
        names = set(file.keys())
        metadata = file.metadata()
        conv_in = file.get_slice("model.diffusion_model.input_blocks.0.0.weight").get_shape()
        attention = file.get_slice(
            "first_stage_model.decoder.mid.attn_1.proj_out.weight"
        ).get_shape()
    assert conv_in[1] == channels
    assert len(attention) == 4
    if family == "sd15":
        text = "cond_stage_model.transformer.text_model."
        assert not any(name.startswith("conditioner.") for name in names)
    else:
        text = "conditioner.embedders.0.transformer.text_model."
        second = "conditioner.embedders.1.model."
        assert {f"{second}text_projection", f"{second}positional_embedding"} <= names
        assert f"{second}transformer.resblocks.0.attn.in_proj_weight" in names
        assert not any(".q_proj." in name for name in names if name.startswith(second))
    assert f"{text}final_layer_norm.weight" in names
    kind = "edit" if channels == 8 else ("base" if family == "sdxl" else "")
    stem = {"sd15": "stable-diffusion-v1", "sdxl": "stable-diffusion-xl-v1"}[family]
    assert metadata["modelspec.architecture"] == (f"{stem}-{kind}" if kind else stem)
    assert metadata["modelspec.predict_key"] == "epsilon"
    assert metadata["format"] == "pt"


def test_what_has_no_place_is_named(tiny_sd15: Path, tmp_path: Path) -> None:
    result = convert(tiny_sd15 / "target", tmp_path / "out.safetensors")
    configs = "configs and vocabularies are in no single file"
    assert result.left_out == {
        "feature_extractor": configs,
        "safety_checker": "a single file has no place for it",
        "scheduler": configs,
        "tokenizer": configs,
    }


@pytest.mark.parametrize(
    ("family", "dtype"), [("sd15", torch.bfloat16), ("sdxl", torch.float32)], ids=["sd15", "sdxl"]
)
def test_every_dtype_keeps_its_bits(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    from scripts import make_tiny

    getattr(make_tiny, f"make_{family}")(tmp_path, dtype=dtype)
    target = tmp_path / "target"
    convert(target, tmp_path / "one.safetensors")
    convert(tmp_path / "one.safetensors", tmp_path / "back", config=target)
    for part in PARTS[family]:
        before, after = weights(target, part), weights(tmp_path / "back", part)
        assert before.keys() == after.keys()
        floating = {tensor.dtype for tensor in after.values()} - {torch.int64}
        assert floating == {dtype}
        for key, tensor in before.items():
            assert torch.equal(tensor.view(torch.uint8), after[key].view(torch.uint8)), key


def test_the_header_says_where_a_merge_came_from(tiny_sd15: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    shutil.copytree(tiny_sd15 / "target", target)
    kept = {"instruct_merge.recipe_digest": "ab" * 32, "modelspec.resolution": "512x512"}
    dropped = {"modelspec.implementation": "diffusers", "modelspec.title": "x", "other": "y"}
    save_file(load_file(target / UNET), target / UNET, {"format": "pt"} | kept | dropped)
    scheduler = target / "scheduler" / "scheduler_config.json"
    config = json.loads(scheduler.read_text()) | {"prediction_type": "v_prediction"}
    scheduler.write_text(json.dumps(config))
    convert(target, tmp_path / "mine.safetensors")
    with safe_open(tmp_path / "mine.safetensors", "pt") as file:
        metadata = file.metadata()
    assert kept.items() <= metadata.items()
    assert metadata["modelspec.title"] == "mine"
    assert metadata["modelspec.predict_key"] == "v"
    assert metadata["modelspec.sai_model_spec"] == "1.0.1"
    assert "other" not in metadata
    assert metadata["modelspec.implementation"] != "diffusers"
    convert(tmp_path / "mine.safetensors", tmp_path / "back", config=target)
    with safe_open(tmp_path / "back" / UNET, "pt") as file:
        assert file.metadata()["instruct_merge.recipe_digest"] == "ab" * 32


# Other spellings of the input -----------------------------------------------------------------


def test_flat_text_encoders_and_old_vaes_give_the_same_file(
    tiny_sdxl: Path, tmp_path: Path
) -> None:
    old = tmp_path / "old"
    shutil.copytree(tiny_sdxl / "target", old)
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    path = next((old / "vae").glob("*.safetensors"))
    tensors = {}
    for key, tensor in load_file(path).items():
        for new, before in names.items():
            key = key.replace(f"attentions.0.{new}.", f"attentions.0.{before}.")
        tensors[key] = tensor
    assert any("proj_attn" in key for key in tensors)
    save_file(tensors, path)
    path = next((old / "text_encoder").glob("*.safetensors"))
    flat = {key.removeprefix("text_model."): tensor for key, tensor in load_file(path).items()}
    assert "final_layer_norm.weight" in flat
    save_file(flat, path)
    convert(old, tmp_path / "old.safetensors")
    convert(tiny_sdxl / "target", tmp_path / "new.safetensors")
    ours, theirs = (load_file(tmp_path / f"{name}.safetensors") for name in ("old", "new"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, ours[key]) for key, tensor in theirs.items())


def test_keys_of_training_are_left_out_by_name(tiny_sd15: Path, tmp_path: Path) -> None:
    convert(tiny_sd15 / "target", tmp_path / "plain.safetensors")
    tensors = load_file(tmp_path / "plain.safetensors")
    extra = {
        "model_ema.diffusion_modelinput_blocks00weight": "a moving average kept for training",
        "model_ema.decay": "a moving average kept for training",
        "alphas_cumprod": "a constant of the noise schedule",
        "sqrt_one_minus_alphas_cumprod": "a constant of the noise schedule",
        "log_one_minus_alphas_cumprod": "a constant of the noise schedule",
        "sqrt_recipm1_alphas_cumprod": "a constant of the noise schedule",
        "alphas_cumprod_prev": "a constant of the noise schedule",
        "betas": "a constant of the noise schedule",
        "posterior_mean_coef1": "a constant of the noise schedule",
        "cond_stage_model.logit_scale": "of CLIP's training",
        "first_stage_model.loss.perceptual_loss.scale": "of the VAE's training",
    }
    save_file(tensors | {name: torch.ones(3) for name in extra}, tmp_path / "full.safetensors")
    result = convert(tmp_path / "full.safetensors", tmp_path / "out", config=tiny_sd15 / "target")
    assert result.left_out.keys() == extra.keys()
    for name, reason in extra.items():
        assert result.left_out[name].startswith(reason)
    before, after = (weights(f, "unet") for f in (tiny_sd15 / "target", tmp_path / "out"))
    assert all(torch.equal(tensor, after[key]) for key, tensor in before.items())


def test_plain_files_are_preferred_and_shards_are_joined(tiny_sd15: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_sd15 / "target", other)
    tensors = load_file(other / UNET)
    names = sorted(tensors)
    for number, part in enumerate((names[::2], names[1::2]), 1):
        shard = other / "unet" / f"diffusion_pytorch_model-{number:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, shard)
    (other / UNET).unlink()
    vae = other / "vae" / "diffusion_pytorch_model.safetensors"
    zeros = {name: torch.zeros_like(tensor) for name, tensor in load_file(vae).items()}
    save_file(zeros, vae.with_name("diffusion_pytorch_model.fp16.safetensors"))
    text = other / "text_encoder" / "model.safetensors"
    text.rename(text.with_name("model.fp16.safetensors"))
    convert(other, tmp_path / "out.safetensors")
    convert(tiny_sd15 / "target", tmp_path / "whole.safetensors")
    ours, theirs = (load_file(tmp_path / f"{name}.safetensors") for name in ("out", "whole"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, ours[key]) for key, tensor in theirs.items())


def test_pickles_only_when_allowed(tiny_sd15: Path, tmp_path: Path) -> None:
    target = tiny_sd15 / "target"
    convert(target, tmp_path / "whole.safetensors")
    tensors = load_file(tmp_path / "whole.safetensors")
    state = {"state_dict": tensors, "epoch": 3, "global_step": 7}
    torch.save(state, tmp_path / "whole.ckpt")
    with pytest.raises(CheckpointError, match="PyTorch checkpoint") as refused:
        convert(tmp_path / "whole.ckpt", tmp_path / "out", config=target)
    assert refused.value.hint.startswith("--allow-pickle reads it")
    result = convert(tmp_path / "whole.ckpt", tmp_path / "out", config=target, allow_pickle=True)
    assert {"epoch", "global_step"} <= result.left_out.keys()
    for part in PARTS["sd15"]:
        before, after = weights(target, part), weights(tmp_path / "out", part)
        assert before.keys() == after.keys()
        assert all(torch.equal(tensor, after[key]) for key, tensor in before.items())
    data = bytearray((tmp_path / "whole.ckpt").read_bytes())
    key = "model.diffusion_model.input_blocks.0.0.weight"
    at = data.find(tensors[key].numpy().tobytes())
    data[at] ^= 1
    (tmp_path / "bad.ckpt").write_bytes(data)
    with pytest.raises(CheckpointError, match="CRC|checksum"):
        convert(tmp_path / "bad.ckpt", tmp_path / "bad", config=target, allow_pickle=True)
    assert not list(tmp_path.glob("bad*/"))
    assert not list(tmp_path.glob("*partial*"))


def test_a_folder_without_its_safety_checker(tiny_sd15: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(tiny_sd15 / "target", bare)
    (bare / "safety_checker" / "model.safetensors").unlink()
    convert(tiny_sd15 / "target", tmp_path / "in.safetensors")
    result = convert(tmp_path / "in.safetensors", tmp_path / "out", config=bare)
    assert set(result.left_out) == {"safety_checker"}
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert index["safety_checker"] == [None, None]
    assert not (tmp_path / "out" / "safety_checker").exists()
    loaded = load("from_pretrained", "sd15", 8, str(tmp_path / "out"))
    assert torch.equal(
        loaded.unet.conv_in.weight, load_file(tiny_sd15 / "target" / UNET)["conv_in.weight"]
    )


# What cannot be converted ---------------------------------------------------------------------


@pytest.fixture
def plain(tiny_sd15: Path, tmp_path: Path) -> dict[str, torch.Tensor]:
    convert(tiny_sd15 / "target", tmp_path / "plain.safetensors")
    return load_file(tmp_path / "plain.safetensors")


def refuse(tmp_path: Path, tensors: dict[str, torch.Tensor], config: Path) -> pytest.ExceptionInfo:
    save_file(tensors, tmp_path / "in.safetensors")
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(MergeError) as caught:
        convert(tmp_path / "in.safetensors", tmp_path / "out", config=config)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    return caught


@pytest.mark.parametrize("other", ["conv_in.weight", "diffusion_model.input_blocks.0.0.weight"])
def test_two_unets_in_one_file(
    tmp_path: Path, plain: dict[str, torch.Tensor], tiny_sd15: Path, other: str
) -> None:
    plain[other] = torch.zeros(8, 8, 3, 3)
    caught = refuse(tmp_path, plain, tiny_sd15 / "target")
    assert "the file has two UNets: model.diffusion_model.* and" in str(caught.value)


def test_unknown_keys_are_listed(
    tmp_path: Path, plain: dict[str, torch.Tensor], tiny_sd15: Path
) -> None:
    plain["control_model.zero.weight"] = torch.zeros(3)
    caught = refuse(tmp_path, plain, tiny_sd15 / "target")
    assert "keys that belong to no part of an LDM/SGM file: control_model.zero" in str(caught.value)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("model.diffusion_model.input_blocks.0.7.weight", "input_blocks.0.7.weight: this key of"),
        ("first_stage_model.encoder.strange.weight", "strange.weight: this is no key of a VAE"),
        (
            "cond_stage_model.transformer.text_model.encoder.layers.0.odd.weight",
            "odd.weight: this is no key of CLIP's text model",
        ),
        ("edm_vpred.sigma_max", "is an EDM v-prediction model (it has edm_vpred.sigma_max)"),
    ],
)
def test_keys_that_have_no_place(
    tmp_path: Path, plain: dict[str, torch.Tensor], tiny_sd15: Path, key: str, message: str
) -> None:
    plain[key] = torch.zeros(3)
    assert message in str(refuse(tmp_path, plain, tiny_sd15 / "target").value)


def test_a_map_that_is_not_one_to_one(
    tmp_path: Path, plain: dict[str, torch.Tensor], tiny_sd15: Path
) -> None:
    text = "cond_stage_model.transformer."
    key = "text_model.final_layer_norm.weight"
    plain[f"{text}final_layer_norm.weight"] = plain[f"{text}{key}"].clone()
    message = str(refuse(tmp_path, plain, tiny_sd15 / "target").value)
    assert f"text encoder keys: {key} becomes both" in message


def test_configs_of_another_architecture(
    tmp_path: Path, plain: dict[str, torch.Tensor], tiny_sd15: Path, tiny_sdxl: Path
) -> None:
    message = str(refuse(tmp_path, plain, tiny_sdxl / "target").value)
    assert "the file has no text_encoder_2, and the folder's pipeline has one" in message
    assert "text_encoder: hidden_size is 12 in the config and 32 in the file" in message
    four = tmp_path / "four"
    shutil.copytree(tiny_sd15 / "target", four)
    config = json.loads((four / "unet" / "config.json").read_text()) | {"in_channels": 4}
    (four / "unet" / "config.json").write_text(json.dumps(config))
    message = str(refuse(tmp_path, plain, four).value)
    assert "unet: in_channels is 4 in the config and 8 in the file" in message


def test_parts_that_do_not_fuse(tiny_sdxl: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_sdxl / "target", tmp_path / "odd")
    path = next((tmp_path / "odd" / "text_encoder_2").glob("*.safetensors"))
    tensors = load_file(path)
    key = "text_model.encoder.layers.0.self_attn.k_proj.weight"
    save_file(tensors | {key: tensors[key].float()}, path)
    with pytest.raises(CheckpointError, match=r"k_proj\.weight: F32 .* cannot be fused with"):
        convert(tmp_path / "odd", tmp_path / "out.safetensors")
    del tensors[key]
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=r"text_encoder_2: a weight .* is missing: .*k_proj"):
        convert(tmp_path / "odd", tmp_path / "out.safetensors")
    assert not list(tmp_path.glob("out*"))


def test_a_guidance_embedding_has_no_single_file_name(tiny_sd15: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_sd15 / "target", tmp_path / "lcm")
    path = tmp_path / "lcm" / UNET
    save_file(load_file(path) | {"time_embedding.cond_proj.weight": torch.zeros(8, 4)}, path)
    with pytest.raises(CheckpointError, match=r"cond_proj\.weight, the guidance .* has no name"):
        convert(tmp_path / "lcm", tmp_path / "out.safetensors")


def test_an_edm_folder_is_refused(tiny_sdxl: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_sdxl / "target", tmp_path / "edm")
    path = tmp_path / "edm" / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({"_class_name": "EDMEulerScheduler"}))
    with pytest.raises(CheckpointError, match="the scheduler EDMEulerScheduler: .* marker"):
        convert(tmp_path / "edm", tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_v_prediction_needs_a_scheduler_that_says_so(
    tmp_path: Path, plain: dict[str, torch.Tensor], tiny_sd15: Path
) -> None:
    plain["v_pred"] = torch.zeros(0)
    message = str(refuse(tmp_path, plain, tiny_sd15 / "target").value)
    assert "is a v-prediction model (it has v_pred), and the scheduler of" in message
    assert "has prediction_type epsilon" in message


def test_stable_diffusion_2_is_refused(tiny_sd15: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_sd15 / "target", tmp_path / "two")
    path = tmp_path / "two" / UNET
    tensors = load_file(path)
    flat = {k: v.flatten(1) if ".proj_in.weight" in k else v for k, v in tensors.items()}
    save_file(flat, path)
    config = path.with_name("config.json")
    config.write_text(json.dumps({**json.loads(config.read_text()), "use_linear_projection": True}))
    with pytest.raises(CheckpointError, match=r"Stable Diffusion 2\.x model, whose single-file"):
        convert(tmp_path / "two", tmp_path / "out.safetensors")
    with pytest.raises(CheckpointError, match=r"layout of Stable Diffusion 2\.x models is not"):
        single_file_metadata(Recognised(SD2, 8, 1024, False), "two")


def test_configs_that_cannot_be_used(
    tmp_path: Path, plain: dict[str, torch.Tensor], tiny_sd15: Path
) -> None:
    config = tmp_path / "config"
    shutil.copytree(tiny_sd15 / "target", config)
    unet = json.loads((config / "unet" / "config.json").read_text())
    (config / "unet" / "config.json").write_text(json.dumps(unet | {"time_cond_proj_dim": 256}))
    assert "asks for a guidance embedding" in str(refuse(tmp_path, plain, config).value)
    (config / "unet" / "config.json").unlink()
    assert "the folder has no unet/config.json" in str(refuse(tmp_path, plain, config).value)
    shutil.rmtree(config / "tokenizer")
    assert "lacks the folder of its component tokenizer" in str(
        refuse(tmp_path, plain, config).value
    )
    index = json.loads((config / "model_index.json").read_text())
    code = {"tokenizer": ["my_code", "Tokenizer"]}
    (config / "model_index.json").write_text(json.dumps(index | code))
    assert "is code of its own (my_code.Tokenizer)" in str(refuse(tmp_path, plain, config).value)
    (config / "model_index.json").write_text("{")
    assert "model_index.json cannot be read" in str(refuse(tmp_path, plain, config).value)
    (config / "model_index.json").unlink()
    assert "has no model_index.json" in str(refuse(tmp_path, plain, config).value)


def test_an_input_that_changes_meanwhile_leaves_nothing(tiny_sd15: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_sd15 / "target", tmp_path / "in")

    def touch(stage: str, done: int, total: int) -> None:
        os.utime(tmp_path / "in" / UNET, ns=(1, 1))

    with pytest.raises(IntegrityError, match="changed while it was in use"):
        convert(tmp_path / "in", tmp_path / "deep" / "out.safetensors", on_progress=touch)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_an_interrupt_leaves_nothing(
    tmp_path: Path, plain: dict[str, torch.Tensor], tiny_sd15: Path
) -> None:
    def interrupt(stage: str, done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    before = sorted(tmp_path.iterdir())
    with pytest.raises(KeyboardInterrupt):
        convert(
            tmp_path / "plain.safetensors",
            tmp_path / "out",
            config=tiny_sd15 / "target",
            on_progress=interrupt,
        )
    with pytest.raises(KeyboardInterrupt):
        convert(tiny_sd15 / "target", tmp_path / "b.safetensors", on_progress=interrupt)
    assert sorted(tmp_path.iterdir()) == before


def test_a_full_disk_is_told_before(
    tmp_path: Path, tiny_sd15: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    status = list(os.statvfs(tmp_path))
    status[4] = 10
    monkeypatch.setattr(os, "statvfs", lambda path: os.statvfs_result(status))
    with pytest.raises(NoSpaceError, match="the output needs"):
        convert(tiny_sd15 / "target", tmp_path / "out.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_an_earlier_output_stays_until_the_new_one_is_whole(
    tmp_path: Path, plain: dict[str, torch.Tensor], tiny_sd15: Path
) -> None:
    target = tiny_sd15 / "target"
    convert(tmp_path / "plain.safetensors", tmp_path / "out", config=target)
    (tmp_path / "out" / "README.md").write_text("of the earlier one")
    convert(tmp_path / "plain.safetensors", tmp_path / "out", config=target, overwrite=True)
    assert not (tmp_path / "out" / "README.md").exists()
    record = json.loads((tmp_path / "out" / "conversion.json").read_text())
    assert record["source"] == "plain.safetensors"
    for name, entry in record["files"].items():
        data = (tmp_path / "out" / name).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (
            entry["size_bytes"],
            entry["sha256"],
        )
    link = tmp_path / "link.safetensors"
    link.symlink_to(tmp_path / "plain.safetensors")
    with pytest.raises(OutputExistsError, match="no regular file"):
        convert(target, link, overwrite=True)


def test_wrong_places(tiny_sd15: Path, tmp_path: Path) -> None:
    target = tiny_sd15 / "target"
    out = tmp_path / "out.safetensors"
    convert(target, out)
    with pytest.raises(OutputExistsError, match="exists already"):
        convert(target, out)
    convert(target, out, overwrite=True)
    with pytest.raises(SourceNotFoundError, match="there is no file or folder"):
        convert(tmp_path / "nothing", tmp_path / "b.safetensors")
    with pytest.raises(SourceNotFoundError, match="lacks the folder unet"):
        convert(tiny_sd15 / "base", tmp_path / "b.safetensors")
    with pytest.raises(SourceError, match="has no tokenizers and configs"):
        convert(out, tmp_path / "folder")
    with pytest.raises(SourceError, match="is a folder already"):
        convert(target, tmp_path / "folder")
    with pytest.raises(SourceError, match="is a single file already"):
        convert(out, tmp_path / "b.safetensors")
    with pytest.raises(SourceError, match=r"a name that ends in \.safetensors"):
        convert(target, tmp_path / "b.ckpt", layout="single-file")
    with pytest.raises(OutputError, match="is, holds or lies in the input"):
        convert(target, target / "b.safetensors")
    with pytest.raises(OutputError, match="is, holds or lies in the input"):
        convert(out, out, overwrite=True, layout="diffusers", config=target)
    with pytest.raises(SourceError, match="--config is for single files"):
        convert(target, tmp_path / "b.safetensors", config=target)
    with pytest.raises(ValueError, match="layout 'onnx' is not one of diffusers, single-file"):
        convert(target, tmp_path / "b", "onnx")
    with pytest.raises(CheckpointError, match="no key begins with model.diffusion_model"):
        convert(tiny_sd15 / "lora_kohya.safetensors", tmp_path / "folder", config=target)
    with pytest.raises(CheckpointError, match="no key begins with model.diffusion_model"):
        convert(target / UNET, tmp_path / "folder", config=target)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(OutputExistsError, match="is not an output of this tool"):
        convert(out, tmp_path / "mine", config=target, overwrite=True)
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep"


def test_a_truncated_input_leaves_nothing(tiny_sd15: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_sd15 / "target", tmp_path / "cut")
    path = tmp_path / "cut" / UNET
    os.truncate(path, path.stat().st_size - 10)
    with pytest.raises(CheckpointError, match="truncated"):
        convert(tmp_path / "cut", tmp_path / "out.safetensors")
    assert not list(tmp_path.glob("out*"))


# The command -----------------------------------------------------------------------------------


def run(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "merge", "convert", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_command_converts_both_ways(tiny_sd15: Path, tmp_path: Path) -> None:
    target, out, back = tiny_sd15 / "target", tmp_path / "a.safetensors", tmp_path / "back"
    there = run(target, out)
    assert (there.returncode, there.stdout.splitlines()[-1]) == (0, str(out))
    assert "left out: safety_checker: a single file has no place for it" in there.stderr
    again = run(out, back, "--config", target)
    assert (again.returncode, again.stdout.splitlines()[-1]) == (0, str(back))
    refused = run(out, back, "--config", target)
    assert refused.returncode == 8
    assert refused.stderr.splitlines()[-1].startswith("hint: ")


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["nothing", "a.safetensors"], 4, "there is no file or folder nothing"),
        (["in.safetensors", "out"], 4, "has no tokenizers and configs"),
        (["in.safetensors", "out", "--layout", "onnx"], 2, "'onnx' is not one of"),
    ],
    ids=["missing", "config", "layout"],
)
def test_the_command_fails_with_one_message_and_a_hint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], code: int, message: str
) -> None:
    from merge.cli.main import main

    save_file({"a": torch.zeros(1)}, tmp_path / "in.safetensors")
    words = [str(tmp_path / w) if w.endswith("safetensors") or w == "out" else w for w in words]
    with pytest.raises(SystemExit) as stop:
        main(["convert", *words])
    shown = capsys.readouterr()
    assert (stop.value.code, shown.out) == (code, "")
    assert message in shown.err
    assert shown.err.splitlines()[-1].startswith("hint: ")
    assert [path.name for path in tmp_path.iterdir()] == ["in.safetensors"]


def test_the_command_shortens_long_lists(
    tiny_sd15: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from merge.cli.main import main

    convert(tiny_sd15 / "target", tmp_path / "plain.safetensors")
    tensors = load_file(tmp_path / "plain.safetensors")
    extra = {f"model_ema.w{n}": torch.zeros(1) for n in range(5)}
    save_file(tensors | extra, tmp_path / "in.safetensors")
    words = ["convert", tmp_path / "in.safetensors", tmp_path / "out", "--config"]
    with pytest.raises(SystemExit) as stop:
        main([*map(str, words), str(tiny_sd15 / "target")])
    assert stop.value.code == 0
    reason = "a moving average kept for training; the plain weights are used"
    line = f"left out: model_ema.w0, model_ema.w1, model_ema.w2 and 2 more: {reason}\n"
    assert line in capsys.readouterr().err


def test_show_reads_single_files(tiny_sdxl: Path, tmp_path: Path) -> None:
    from merge.records.describe import describe_path

    convert(tiny_sdxl / "target", tmp_path / "a.safetensors")
    shown = describe_path(tmp_path / "a.safetensors")
    assert shown["layout"] == "LDM/SGM single file"
    assert (shown["architecture"], shown["in_channels"]) == ("sdxl", 8)
    assert shown["components"] == list(PARTS["sdxl"])


@pytest.mark.slow
def test_an_sdxl_size_round_trip(tmp_path: Path) -> None:
    """Identical tensors and bounded memory; the script stops where a limit is broken."""
    if shutil.disk_usage(tmp_path).free < 22e9:
        pytest.skip("needs 22 GB of disk")
    script = Path(__file__).parents[2] / "scripts" / "bench" / "convert.py"
    words = ["--pairs", "1", "--scratch", str(tmp_path), "--out", str(tmp_path / "found.json")]
    subprocess.run([sys.executable, str(script), *words], check=True)
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["identical_tensors"]["unet"] == 1680
    assert found["peak_mb"] < 450
    assert found["bytes"] > 6.9e9


def test_the_loading_line_works_from_where_it_was_typed(
    tiny_sd15: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ast

    (tmp_path / "in it").mkdir()
    shutil.copytree(tiny_sd15 / "target", tmp_path / "in it" / "model")
    monkeypatch.chdir(tmp_path)
    (note,) = convert(Path("in it/model"), Path("in it/one.safetensors")).notes
    call = ast.parse(note.partition(" with ")[2], mode="eval").body
    assert isinstance(call, ast.Call)
    paths = [ast.literal_eval(call.args[0]), ast.literal_eval(call.keywords[0].value)]
    assert paths == ["in it/one.safetensors", "in it/model"]
    assert all(Path(path).exists() for path in paths)
