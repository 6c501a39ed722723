"""Merges of pickles: the same weights as from safetensors, and never a pickle in an export."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from merge import load_recipe, run_recipe
from merge.errors import CheckpointError, SourceError, SourceNotFoundError
from merge.family.keys.unet import LDM_UNET_PREFIX, unet_to_ldm
from merge.header.parse import parse_header
from merge.plan.build import build_plan
from merge.plan.model import DIGEST_KEY
from merge.records.describe import describe_path, render_description
from merge.sources.resolve import resolve_sources
from merge.sources.select import Weights, converted_name, plain_name, select_weights
from tests.mini import write_models, write_recipe

UNET = "diffusion_pytorch_model"
WEIGHTS = f"unet/{UNET}.safetensors"


def to_pickle(path: Path, name: str | None = None, **more: Any) -> Path:
    """Save a safetensors file as torch.save does, and remove it."""
    tensors = load_file(path)
    out = path.with_name(name or f"{path.stem}.bin")
    torch.save({"state_dict": tensors, **more} if more else tensors, out)
    path.unlink()
    return out


def content(path: Path) -> tuple[dict[str, Any], bytes]:
    """Return a file's header without the digest of its inputs, and its data."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    parse_header(data[8 : 8 + length], len(data))
    tree = json.loads(data[8 : 8 + length])
    del tree["__metadata__"][DIGEST_KEY]
    return tree, data[8 + length :]


def merged(folder: Path, out: str, *overrides: str) -> Path:
    recipe = load_recipe(folder / "mini.yaml", list(overrides))
    return run_recipe(recipe, folder / out, device="cpu", verify=False).folder


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """Give small models, their recipe, and what it makes of safetensors files."""
    write_models(tmp_path)
    write_recipe(tmp_path)
    merged(tmp_path, "expected")
    return tmp_path


def shards(path: Path) -> None:
    tensors = load_file(path)
    names = sorted(tensors)
    weight_map = {}
    for part, keys in ((1, names[:3]), (2, names[3:])):
        name = f"{UNET}-0000{part}-of-00002.bin"
        torch.save({key: tensors[key] for key in keys}, path.with_name(name))
        weight_map |= dict.fromkeys(keys, name)
    index = {"metadata": {}, "weight_map": weight_map}
    path.with_name(f"{UNET}.bin.index.json").write_text(json.dumps(index))
    path.unlink()


FORMS: dict[str, Callable[[Path], object]] = {
    "bin": to_pickle,
    "a variant": lambda path: to_pickle(path, f"{UNET}.fp16.bin"),
    "ckpt of a training": lambda path: to_pickle(
        path, "step.ckpt", epoch=3, optimizer_states=[{"m": torch.ones(3)}]
    ),
    "pt": lambda path: to_pickle(path, "model.pt"),
    "pth": lambda path: to_pickle(path, "model.pth"),
    "shards": shards,
}


@pytest.mark.parametrize("form", FORMS)
def test_pickles_give_the_bytes_of_safetensors(models: Path, form: str) -> None:
    for role in ("base", "distilled", "target"):
        FORMS[form](models / role / f"{UNET}.safetensors")
    out = merged(models, "out", "allow_pickle=true")
    assert content(out / WEIGHTS) == content(models / "expected" / WEIGHTS)
    assert not [path for path in out.rglob("*") if path.suffix in (".bin", ".ckpt", ".pt", ".pth")]
    manifest = json.loads((out / "merge_manifest.json").read_text())
    left_out = {(item["model"], item["key"]) for item in manifest["left_out"]}
    expected = {"epoch", "optimizer_states"} if "training" in form else set()
    roles = ("base", "distilled", "target")
    assert {(role, key) for role in roles for key in expected} <= left_out
    lock = yaml.safe_load((out / "recipe.lock.yaml").read_text())
    assert lock["recipe"]["allow_pickle"] is True


def test_single_files_of_a_training_with_ldm_keys(models: Path) -> None:
    for role in ("base", "distilled", "target"):
        tensors = load_file(models / role / f"{UNET}.safetensors")
        spelled = unet_to_ldm(tensors)
        tree = {f"{LDM_UNET_PREFIX}{spelled[key]}": value for key, value in tensors.items()}
        tree["model_ema.decay"] = torch.tensor(0.5)
        torch.save({"state_dict": tree, "global_step": 7}, models / f"{role}.ckpt")
        save_file(tree, models / f"{role}.safetensors")
    write_recipe(
        models, models={role: f"./{role}.ckpt" for role in ("base", "distilled", "target")}
    )
    pickled = merged(models, "pickled", "allow_pickle=true")
    write_recipe(
        models, models={role: f"./{role}.safetensors" for role in ("base", "distilled", "target")}
    )
    plain = merged(models, "plain")
    assert content(pickled / WEIGHTS)[1] == content(plain / WEIGHTS)[1]
    assert content(pickled / WEIGHTS)[1] == content(models / "expected" / WEIGHTS)[1]
    manifest = json.loads((pickled / "merge_manifest.json").read_text())
    left_out = {item["key"] for item in manifest["left_out"] if item["model"] == "target"}
    assert {"model_ema.decay", "global_step"} <= left_out


def test_a_pickle_is_an_error_unless_allowed(models: Path) -> None:
    to_pickle(models / "base" / f"{UNET}.safetensors")
    with pytest.raises(SourceError, match=r"base has its weights only as a pickle") as caught:
        merged(models, "out")
    assert "allow_pickle: true" in caught.value.hint
    assert not (models / "out").exists()


def test_safetensors_come_first(models: Path) -> None:
    (models / "base" / f"{UNET}.bin").write_bytes(b"not read")
    merged(models, "out", "allow_pickle=true")
    sources = resolve_sources(load_recipe(models / "mini.yaml", ["allow_pickle=true"]))
    assert sources.base is not None
    assert [file.name for file in sources.base.main_files] == [f"{UNET}.safetensors"]


def test_a_damaged_record_is_found_before_the_merge(models: Path) -> None:
    path = to_pickle(models / "distilled" / f"{UNET}.safetensors")
    data = bytearray(path.read_bytes())
    data[data.index(b"/data/0") + 200] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=rf"{path}: record data/\d is damaged: its CRC-32"):
        merged(models, "out", "allow_pickle=true")
    assert not (models / "out").exists()
    assert not list(models.glob("out.partial-*"))


def test_a_shard_that_is_missing(models: Path) -> None:
    shards(models / "base" / f"{UNET}.safetensors")
    (models / "base" / f"{UNET}-00002-of-00002.bin").unlink()
    with pytest.raises(SourceNotFoundError, match=r"lacks the shard .*-00002-of-00002\.bin"):
        merged(models, "out", "allow_pickle=true")


def test_an_index_that_leads_outside(models: Path) -> None:
    shards(models / "base" / f"{UNET}.safetensors")
    index = models / "base" / f"{UNET}.bin.index.json"
    index.write_text(index.read_text().replace(f"{UNET}-00001", f"../{UNET}-00001"))
    with pytest.raises(SourceError, match="is not the name of a file beside it"):
        merged(models, "out", "allow_pickle=true")


# A whole pipeline ------------------------------------------------------------------------------


def pickled_pipeline(source: Path, folder: Path) -> Path:
    """Copy models, all their weights as the pickles that diffusers and transformers wrote once."""
    shutil.copytree(source, folder)
    for path in sorted(folder.rglob("*.safetensors")):
        if "lora" in path.name:
            continue
        name = "pytorch_model.bin" if path.stem == "model" else f"{UNET}.bin"
        to_pickle(path, name)
    tensors = torch.load(folder / "target" / "vae" / f"{UNET}.bin", weights_only=True)
    (folder / "target" / "vae" / f"{UNET}.bin").unlink()
    save_file(tensors, folder / "target" / "vae" / f"{UNET}.safetensors")
    shards(folder / "target" / "vae" / f"{UNET}.safetensors")
    return folder


def test_a_pipeline_of_pickles_becomes_one_of_safetensors(tiny_sd15: Path, tmp_path: Path) -> None:
    from diffusers import StableDiffusionInstructPix2PixPipeline

    pickled = pickled_pipeline(tiny_sd15, tmp_path / "pickled")
    outs = {}
    for name, models in (("plain", tiny_sd15), ("converted", pickled)):
        recipe = tmp_path / f"{name}.yaml"
        refs = {role: str(models / role) for role in ("base", "distilled", "target")}
        tree = {"name": "tiny", "models": refs, "allow_pickle": name == "converted"}
        recipe.write_text(yaml.safe_dump(tree))
        result = run_recipe(load_recipe(recipe), tmp_path / name, device="cpu", verify=False)
        outs[name] = result.folder
    names = {
        name: {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
        for name, out in outs.items()
    }
    assert names["converted"] == names["plain"]
    assert content(outs["converted"] / WEIGHTS)[1] == content(outs["plain"] / WEIGHTS)[1]
    for name in sorted(names["plain"]):
        if name.endswith(".safetensors") and name != WEIGHTS:
            ours, theirs = (load_file(outs[kind] / name) for kind in ("converted", "plain"))
            assert ours.keys() == theirs.keys()
            assert all(
                ours[k].dtype == v.dtype and torch.equal(ours[k], v) for k, v in theirs.items()
            )
    manifest = json.loads((outs["converted"] / "merge_manifest.json").read_text())
    assert manifest["files"].keys() >= {f"vae/{UNET}.safetensors", "text_encoder/model.safetensors"}
    inputs = manifest["inputs"]["target"]["files"]
    assert {"text_encoder/pytorch_model.bin", f"vae/{UNET}-00001-of-00002.bin"} <= inputs.keys()
    pipeline = StableDiffusionInstructPix2PixPipeline.from_pretrained(
        outs["converted"], use_safetensors=True
    )
    assert pipeline.vae is not None


def test_a_component_that_cannot_be_converted_fails_in_the_plan(
    tiny_sd15: Path, tmp_path: Path
) -> None:
    pickled = pickled_pipeline(tiny_sd15, tmp_path / "pickled")
    path = pickled / "target" / "text_encoder" / "pytorch_model.bin"
    torch.save({"a": torch.ones(2, 3).t()}, path)
    refs = {role: str(pickled / role) for role in ("base", "distilled", "target")}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"name": "x", "models": refs, "allow_pickle": True}))
    loaded = load_recipe(recipe)
    with pytest.raises(
        CheckpointError, match=r"text_encoder/pytorch_model\.bin: a: it is not in row"
    ):
        build_plan(loaded, resolve_sources(loaded))


def test_loras_in_pickles(tiny_sd15: Path, tmp_path: Path) -> None:
    outs = []
    torch.save(load_file(tiny_sd15 / "lora_kohya.safetensors"), tmp_path / "lora.pt")
    for lora in (tiny_sd15 / "lora_kohya.safetensors", tmp_path / "lora.pt"):
        models = {"base": None, "distilled": str(lora), "target": str(tiny_sd15 / "target")}
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(yaml.safe_dump({"name": "x", "models": models, "allow_pickle": True}))
        out = tmp_path / f"out-{len(outs)}"
        run_recipe(load_recipe(recipe), out, device="cpu", verify=False)
        outs.append(content(out / WEIGHTS)[1])
    assert outs[0] == outs[1]


# Names -----------------------------------------------------------------------------------------

CHOICES: dict[str, tuple[list[str], str | None, Weights]] = {
    "safetensors before pickles": (
        [f"{UNET}.bin", "model.safetensors"],
        None,
        Weights(("model.safetensors",), None, ""),
    ),
    "bin before others": (["a.ckpt", "a.bin", "a.pt"], None, Weights(("a.bin",), None, "")),
    "ckpt before pt": (["a.pth", "a.pt", "a.ckpt"], None, Weights(("a.ckpt",), None, "")),
    "transformers' name": (
        ["pytorch_model.bin", "training_args.bin", "optimizer.bin"],
        None,
        Weights(("pytorch_model.bin",), None, ""),
    ),
    "the variant": (
        [f"{UNET}.bin", f"{UNET}.fp16.bin"],
        "fp16",
        Weights((f"{UNET}.fp16.bin",), None, "fp16"),
    ),
    "shards": (
        [*(f"{UNET}-0000{i}-of-00002.bin" for i in (1, 2)), f"{UNET}.bin.index.json"],
        None,
        Weights(
            tuple(f"{UNET}-0000{i}-of-00002.bin" for i in (1, 2)), f"{UNET}.bin.index.json", ""
        ),
    ),
}


@pytest.mark.parametrize("case", CHOICES)
def test_pickles_are_chosen_by_name(case: str) -> None:
    names, variant, expected = CHOICES[case]
    assert select_weights(names, variant, "here", allow_pickle=True) == expected
    assert select_weights(names[::-1], variant, "here", allow_pickle=True) == expected


@pytest.mark.parametrize(
    ("name", "variant", "converted"),
    [
        (f"{UNET}.bin", "", f"{UNET}.safetensors"),
        (f"{UNET}.fp16.bin", "fp16", f"{UNET}.safetensors"),
        (f"{UNET}.fp16-00001-of-00002.bin", "fp16", f"{UNET}.safetensors"),
        (f"{UNET}-00001-of-00002.bin", "", f"{UNET}.safetensors"),
        ("pytorch_model.bin", "", "model.safetensors"),
        ("pytorch_model.fp16.bin", "fp16", "model.safetensors"),
        ("pytorch_model-00001-of-00003.bin", "", "model.safetensors"),
    ],
)
def test_names_of_converted_weights(name: str, variant: str, converted: str) -> None:
    assert converted_name(name, variant) == converted
    assert not plain_name(name, variant).count("fp16")


# show ------------------------------------------------------------------------------------------


def test_show_describes_a_pickle(models: Path) -> None:
    path = to_pickle(models / "target" / f"{UNET}.safetensors", "step.ckpt", epoch=3)
    for shown in (path, models / "target"):
        tree = describe_path(shown)
        assert (tree["architecture"], tree["in_channels"], tree["pickle"]) == ("sd15", 8, True)
        text = render_description(tree)
        assert "a PyTorch pickle, read without running anything of it" in text
        assert "epoch: an integer, outside of state_dict" in text
    assert "pickle" not in describe_path(models / "base")


def test_show_refuses_what_is_no_weight_file(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(SourceError, match="is no weight file"):
        describe_path(tmp_path / "model.gguf")
