"""Models of this disk: which layout they have and which of their files are used."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from merge.errors import PlanError, SourceError, SourceNotFoundError
from merge.plan.build import build_plan
from merge.recipe.schema import DistilledRef, ModelRef, Models, Recipe
from merge.sources.model import ResolvedModel
from merge.sources.resolve import resolve_sources
from merge.sources.select import Weights, companion_files, plain_name, select_weights
from tests.mini import random_tensors

UNET = "diffusion_pytorch_model"


def resolve(path: Path, **fields: Any) -> ResolvedModel:
    """Resolve a folder or file as the target; the distilled model beside it is of no interest."""
    target = ModelRef(path=str(path), **fields)
    other = write_files(path.parent / "other", f"{UNET}.safetensors")
    return resolve_sources(Recipe("r", Models(target, [DistilledRef(path=str(other))]))).target


def write_files(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"name": name}) if name.endswith(".json") else name)
    return folder


def write_pipeline(folder: Path, **entries: object) -> Path:
    write_files(
        folder,
        *("unet/config.json", f"unet/{UNET}.safetensors", "scheduler/scheduler_config.json"),
        *("vae/config.json", f"vae/{UNET}.safetensors", f"vae/{UNET}.fp16.safetensors"),
        *("tokenizer/merges.txt", "tokenizer/vocab.json"),
    )
    index = {
        "_class_name": "StableDiffusionInstructPix2PixPipeline",
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
        "scheduler": ["diffusers", "DDIMScheduler"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        **entries,
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


# Layouts ---------------------------------------------------------------------------------------


def test_a_pipeline_folder(tmp_path: Path) -> None:
    model = resolve(write_pipeline(tmp_path / "edit"), variant="fp16")
    assert (model.role, model.label, model.repo, model.commit) == ("target", "edit", None, None)
    assert [file.name for file in model.main_files] == [f"unet/{UNET}.safetensors"]
    assert model.variant == ""
    assert model.config == {"name": "unet/config.json"}
    assert model.scheduler == {"name": "scheduler/scheduler_config.json"}
    assert model.pipeline is not None
    assert model.pipeline.model_index["feature_extractor"] == [None, None]
    components = {
        part.name: [
            (file.name, file.path, export)
            for file, export in zip(part.files, part.export_names, strict=True)
        ]
        for part in model.pipeline.components
    }
    folder = tmp_path / "edit"
    assert components == {
        "tokenizer": [
            (name, folder / name, name) for name in ("tokenizer/merges.txt", "tokenizer/vocab.json")
        ],
        "vae": [
            ("vae/config.json", folder / "vae/config.json", "vae/config.json"),
            (
                f"vae/{UNET}.fp16.safetensors",
                folder / f"vae/{UNET}.fp16.safetensors",
                f"vae/{UNET}.safetensors",
            ),
        ],
    }
    assert model.main_files[0].size_bytes == len(f"unet/{UNET}.safetensors")


def test_a_real_pipeline_of_each_family(tiny_sd15: Path, tiny_sdxl: Path) -> None:
    for models, names in (
        (tiny_sd15, ["feature_extractor", "safety_checker", "text_encoder", "tokenizer", "vae"]),
        (tiny_sdxl, ["text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "vae"]),
    ):
        target = ModelRef(path=str(models / "target"))
        distilled = [DistilledRef(path=str(models / "distilled"))]
        base = ModelRef(path=str(models / "base"))
        sources = resolve_sources(Recipe("r", Models(target, distilled, base)))
        assert [model.role for model in sources.models] == ["target", "base", "distilled"]
        pipeline = sources.target.pipeline
        assert pipeline is not None
        assert [part.name for part in pipeline.components] == names
        assert sources.base is not None
        assert sources.base.pipeline is None
        # Every file of the folder is accounted for.
        files = [file for part in pipeline.components for file in part.files]
        ours = {"unet/config.json", "scheduler/scheduler_config.json", "model_index.json"}
        assert {file.name for file in [*files, *sources.target.main_files]} | ours == {
            path.relative_to(models / "target").as_posix()
            for path in (models / "target").rglob("*")
            if path.is_file()
        }


def test_a_pipeline_is_no_pipeline_for_base_and_distilled(tmp_path: Path) -> None:
    folder = write_pipeline(tmp_path / "edit")
    # Nothing but the UNet is wanted, so nothing but the UNet can be missing.
    shutil.rmtree(folder / "vae")
    refs = [DistilledRef(path=str(folder)), DistilledRef(path=str(folder))]
    target = ModelRef(path=str(folder / "unet"))
    sources = resolve_sources(Recipe("r", Models(target, refs, ModelRef(path=str(folder)))))
    assert [model.role for model in sources.models] == [
        *("target", "base", "distilled[0]", "distilled[1]"),
    ]
    assert all(model.pipeline is None for model in sources.models)
    assert sources.target.main_files[0].name == f"{UNET}.safetensors"
    assert sources.distilled[1].main_files[0].name == f"unet/{UNET}.safetensors"


def test_folders_of_a_unet(tmp_path: Path) -> None:
    plain = resolve(write_files(tmp_path / "plain", "config.json", f"{UNET}.safetensors"))
    assert (plain.main_files[0].name, plain.pipeline) == (f"{UNET}.safetensors", None)
    assert plain.config == {"name": "config.json"}
    nested = resolve(write_files(tmp_path / "nested", f"unet/{UNET}.safetensors"))
    assert (nested.main_files[0].name, nested.config) == (f"unet/{UNET}.safetensors", None)
    subfolder = resolve(write_pipeline(tmp_path / "pipe"), subfolder="unet/")
    assert (subfolder.main_files[0].name, subfolder.pipeline) == (f"unet/{UNET}.safetensors", None)
    assert subfolder.config == {"name": "unet/config.json"}
    with pytest.raises(SourceNotFoundError, match=r"models\.target: it has no folder nothing"):
        resolve(tmp_path / "pipe", subfolder="nothing")


def test_a_pipeline_in_a_subfolder(tmp_path: Path) -> None:
    write_pipeline(tmp_path / "repo" / "v1" / "edit")
    model = resolve(tmp_path / "repo", subfolder="v1/edit", variant="fp16")
    assert model.main_files[0].name == f"v1/edit/unet/{UNET}.safetensors"
    assert model.scheduler == {"name": "scheduler/scheduler_config.json"}
    assert model.pipeline is not None
    vae = model.pipeline.components[1]
    assert [file.name for file in vae.files][1] == f"v1/edit/vae/{UNET}.fp16.safetensors"
    assert vae.export_names == ("vae/config.json", f"vae/{UNET}.safetensors")


def test_a_single_file(tmp_path: Path) -> None:
    write_files(tmp_path / "configs", "unet/config.json")
    write_files(tmp_path / "flat", "config.json")
    file = write_files(tmp_path, "mine.safetensors") / "mine.safetensors"
    model = resolve(file)
    assert (model.label, model.is_folder, model.config) == ("mine.safetensors", False, None)
    assert (model.main_files[0].name, model.main_files[0].path) == ("mine.safetensors", file)
    assert resolve(file, config=str(tmp_path / "configs")).config == {"name": "unet/config.json"}
    assert resolve(file, config=str(tmp_path / "flat")).config == {"name": "config.json"}
    with pytest.raises(SourceNotFoundError, match=r"config: there is no config\.json of a UNet in"):
        resolve(file, config=str(tmp_path))


def test_links_are_followed(tmp_path: Path) -> None:
    folder = write_pipeline(tmp_path / "edit")
    shutil.move(folder / "vae", tmp_path / "shared vae")
    (folder / "vae").symlink_to(tmp_path / "shared vae")
    shutil.move(folder / "unet" / f"{UNET}.safetensors", tmp_path / "blob")
    (folder / "unet" / f"{UNET}.safetensors").symlink_to(tmp_path / "blob")
    # A loop must not be walked for ever.
    (folder / "again").symlink_to(folder)
    model = resolve(folder)
    assert model.pipeline is not None
    assert [part.name for part in model.pipeline.components] == ["tokenizer", "vae"]
    assert model.main_files[0].size_bytes == (tmp_path / "blob").stat().st_size


# What is refused -------------------------------------------------------------------------------


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(SourceNotFoundError, match="there is no file or folder .*nothing") as caught:
        resolve(tmp_path / "nothing")
    assert "relative to the recipe file" in caught.value.hint
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceNotFoundError, match=r"empty has no \.safetensors file"):
        resolve(tmp_path / "empty")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / f"{UNET}.safetensors").symlink_to("gone")
    with pytest.raises(SourceNotFoundError, match=r"cannot read .*model\.safetensors: No such"):
        resolve(tmp_path / "broken")


@pytest.mark.parametrize("name", ["model.ckpt", "model.bin", "model.pt", "model.gguf"])
def test_a_file_that_is_no_safetensors(tmp_path: Path, name: str) -> None:
    path = write_files(tmp_path, name) / name
    with pytest.raises(SourceError, match=rf"{name} is no \.safetensors file") as caught:
        resolve(path)
    assert "allow_pickle: true" in caught.value.hint or name.endswith(".gguf")


def test_a_folder_with_pickles_only(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "unet", "config.json", f"{UNET}.bin", f"{UNET}.fp16.bin")
    message = rf"unet has its weights only as a pickle \({UNET}\.bin\), which can run code"
    with pytest.raises(SourceError, match=message) as caught:
        resolve(folder)
    assert "safetensors" in caught.value.hint
    assert not isinstance(caught.value, SourceNotFoundError)


@pytest.mark.parametrize("suffix", [".bin", ".msgpack", ".onnx"])
def test_a_component_without_safetensors_is_never_left_out(tmp_path: Path, suffix: str) -> None:
    folder = write_pipeline(tmp_path / "edit")
    for path in (folder / "vae").glob("*.safetensors"):
        path.unlink()
    write_files(folder, f"vae/{UNET}{suffix}")
    with pytest.raises(SourceError, match=r"edit/vae has (its weights only|no \.safetensors)"):
        resolve(folder)
    (folder / "vae" / f"{UNET}{suffix}").unlink()
    with pytest.raises(SourceNotFoundError, match=r"edit/vae has no \.safetensors file"):
        resolve(folder)


def test_a_tokenizer_may_have_a_config_and_no_weights(tmp_path: Path) -> None:
    folder = write_pipeline(tmp_path / "edit")
    write_files(folder, "tokenizer/config.json")
    model = resolve(folder)
    assert model.pipeline is not None
    assert "tokenizer/config.json" in model.pipeline.components[0].export_names


def test_components_with_code_of_their_own(tmp_path: Path) -> None:
    folder = write_pipeline(tmp_path / "edit", tagger=["my_tagger", "Tagger"])
    write_files(folder, "tagger/config.json", "tagger/my_tagger.py")
    with pytest.raises(SourceError, match=r"component tagger of edit is code .*my_tagger\.Tagger"):
        resolve(folder)


def test_a_missing_component_folder(tmp_path: Path) -> None:
    folder = write_pipeline(tmp_path / "edit")
    shutil.rmtree(folder / "tokenizer")
    message = r"models\.target: edit lacks the folder of its component tokenizer"
    with pytest.raises(SourceNotFoundError, match=message):
        resolve(folder)


@pytest.mark.parametrize("name", ["../vae", "vae/sub", ".hidden"])
def test_component_names_are_plain(tmp_path: Path, name: str) -> None:
    folder = write_pipeline(tmp_path / "edit", **{name: ["diffusers", "AutoencoderKL"]})
    with pytest.raises(SourceError, match=f"component '{name}' of edit is no folder name"):
        resolve(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read"),
        ("[1]", "is not a JSON object"),
        ("[" * 100_000, "cannot be read"),
        ('"\udcff"', "cannot be read"),
        (" " * (16 * 1024 * 1024 + 1), "is too large for a config"),
    ],
    ids=["broken", "list", "deep", "not utf-8", "large"],
)
def test_configs_that_cannot_be_read(tmp_path: Path, text: str, message: str) -> None:
    folder = write_files(tmp_path / "unet", f"{UNET}.safetensors")
    (folder / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(SourceError, match=rf"models\.target: .*config\.json {message}"):
        resolve(folder)


# Shards ----------------------------------------------------------------------------------------


def write_shards(
    folder: Path, tensors: dict[str, torch.Tensor], count: int, variant: str = ""
) -> Path:
    """Split tensors over files with an index, as diffusers writes them."""
    folder.mkdir(parents=True, exist_ok=True)
    infix = f".{variant}" if variant else ""
    keys = sorted(tensors)
    weight_map = {}
    for part in range(count):
        name = f"{UNET}{infix}-{part + 1:05d}-of-{count:05d}.safetensors"
        chosen = keys[part::count]
        save_file({key: tensors[key] for key in chosen}, folder / name, {"format": "pt"})
        weight_map |= dict.fromkeys(chosen, name)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / f"{UNET}.safetensors.index{infix}.json").write_text(json.dumps(index))
    return folder


def edit_index(folder: Path, **names: str) -> None:
    """Let an index name other files for its first tensors."""
    (path,) = folder.glob("*.index*.json")
    index = json.loads(path.read_text())
    index["weight_map"] |= names
    path.write_text(json.dumps(index))


def test_shards_are_one_model(tiny_sd15: Path, tmp_path: Path) -> None:
    tensors = load_file(tiny_sd15 / "base" / f"{UNET}.safetensors")
    base = write_shards(tmp_path / "base", tensors, 3)
    target = ModelRef(path=str(tiny_sd15 / "target" / "unet"))
    distilled = [DistilledRef(path=str(tiny_sd15 / "distilled"))]
    recipe = Recipe("r", Models(target, distilled, ModelRef(path=str(base))))
    sources = resolve_sources(recipe)
    assert sources.base is not None
    assert [file.name for file in sources.base.main_files] == [
        f"{UNET}-0000{part}-of-00003.safetensors" for part in (1, 2, 3)
    ]
    plan = build_plan(recipe, sources)
    assert plan.counts["delta"] == 685
    assert {file.name for file in plan.files if file.role == "base"} == {
        file.name for file in sources.base.main_files
    }
    # A shard that loses a tensor is a model that lacks it.
    lost = tmp_path / "base" / f"{UNET}-00002-of-00003.safetensors"
    rest = load_file(lost)
    key = sorted(rest)[-1]
    del rest[key]
    save_file(rest, lost)
    with pytest.raises(PlanError, match=f"{key}: missing in base"):
        build_plan(recipe, resolve_sources(recipe))


def test_shards_of_a_variant_and_without_an_index(tmp_path: Path) -> None:
    tensors = random_tensors(1)
    write_shards(tmp_path / "unet", tensors, 2)
    write_shards(tmp_path / "unet", tensors, 3, "fp16")
    assert len(resolve(tmp_path / "unet").main_files) == 2
    model = resolve(tmp_path / "unet", variant="fp16")
    assert [file.name for file in model.main_files] == [
        f"{UNET}.fp16-0000{part}-of-00003.safetensors" for part in (1, 2, 3)
    ]
    for path in (tmp_path / "unet").glob("*.json"):
        path.unlink()
    assert len(resolve(tmp_path / "unet").main_files) == 2


def test_a_missing_shard(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "unet", random_tensors(1), 3)
    (folder / f"{UNET}-00002-of-00003.safetensors").unlink()
    message = rf"unet lacks the shard {UNET}-00002-of-00003\.safetensors"
    with pytest.raises(SourceNotFoundError, match=message) as caught:
        resolve(folder)
    assert caught.value.hint == "download the model again"


def test_two_splits_in_one_folder(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "unet", random_tensors(1), 2)
    write_shards(folder, random_tensors(2), 3)
    with pytest.raises(SourceError, match="unet mixes shards of two different splits"):
        resolve(folder)


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "sub/x", "", "..", "."])
def test_an_index_that_leads_elsewhere(tmp_path: Path, name: str) -> None:
    folder = write_shards(tmp_path / "unet", random_tensors(1), 2)
    write_files(tmp_path, "secret.safetensors")
    edit_index(folder, **{"conv_in.bias": name})
    message = rf"index\.json: '{re.escape(name)}' is not the name of a file beside it"
    with pytest.raises(SourceError, match=message):
        resolve(folder)


def test_an_index_that_names_what_is_not_there(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "unet", random_tensors(1), 2)
    edit_index(folder, **{"conv_in.bias": "other.safetensors"})
    message = r"index\.json names the shard other\.safetensors, which is missing"
    with pytest.raises(SourceNotFoundError, match=message):
        resolve(folder)
    (path,) = folder.glob("*.json")
    for tree in ({}, {"weight_map": []}, {"weight_map": {"conv_in.bias": 1}}):
        path.write_text(json.dumps(tree))
        with pytest.raises(SourceError, match="it has no weight_map from tensors to files"):
            resolve(folder)


def test_shards_of_other_components(tmp_path: Path) -> None:
    folder = write_pipeline(tmp_path / "edit")
    shutil.rmtree(folder / "vae")
    write_files(folder, "vae/config.json")
    write_shards(folder / "vae", random_tensors(1), 2)
    model = resolve(folder, variant="fp16")
    assert model.pipeline is not None
    names = tuple(f"vae/{UNET}-0000{part}-of-00002.safetensors" for part in (1, 2))
    index = f"vae/{UNET}.safetensors.index.json"
    assert model.pipeline.components[1].export_names == ("vae/config.json", *names, index)
    edit_index(folder / "vae", **{"conv_in.bias": "../x.safetensors"})
    with pytest.raises(SourceError, match=r"'\.\./x\.safetensors' is not the name of a file"):
        resolve(folder)
    (folder / index).unlink()
    with pytest.raises(SourceNotFoundError, match="edit/vae has shards and lacks their index"):
        resolve(folder)


def test_shards_of_a_variant_are_not_renamed_under_an_index_that_names_them(tmp_path: Path) -> None:
    folder = write_pipeline(tmp_path / "edit")
    shutil.rmtree(folder / "vae")
    write_files(folder, "vae/config.json")
    write_shards(folder / "vae", random_tensors(1), 2, "fp16")
    message = "edit/vae has its fp16 weights in shards, whose index would name files that"
    with pytest.raises(SourceError, match=message):
        resolve(folder, variant="fp16")


# Digests ---------------------------------------------------------------------------------------


def test_expected_digests_come_from_the_recipe(tmp_path: Path) -> None:
    names = (f"unet/{UNET}.safetensors", f"vae/{UNET}.safetensors", "tokenizer/vocab.json")
    expected = {name: f"{index}" * 64 for index, name in enumerate(names)}
    model = resolve(write_pipeline(tmp_path / "edit"), sha256=expected)
    assert model.pipeline is not None
    parts = [file for part in model.pipeline.components for file in part.files]
    stated = {file.name: file.expected_sha256 for file in [*model.main_files, *parts]}
    assert {name: digest for name, digest in stated.items() if digest} == expected
    assert stated["tokenizer/merges.txt"] == ""


def test_digests_of_files_that_are_not_used(tmp_path: Path) -> None:
    folder = write_pipeline(tmp_path / "edit")
    unused = {f"vae/{UNET}.fp16.safetensors": "0" * 64, "a.safetensors": "0" * 64}
    message = rf"sha256 names files that are not used: a\.safetensors, vae/{UNET}\.fp16\.safeten"
    with pytest.raises(SourceError, match=message):
        resolve(folder, sha256={**unused, f"unet/{UNET}.safetensors": "0" * 64})
    with pytest.raises(SourceError, match=r"not used: unet/diffusion_pytorch_model\.safetensors"):
        resolve(folder, subfolder="vae", sha256={f"unet/{UNET}.safetensors": "0" * 64})


# Choosing by name ------------------------------------------------------------------------------

S = ".safetensors"
# Names in the folder, the variant asked for, and what is chosen: names, index, variant.
CHOICES: dict[str, tuple[list[str], str | None, Weights]] = {
    "plain": ([f"{UNET}{S}", "config.json"], None, Weights((f"{UNET}{S}",), None, "")),
    "variant": (
        [f"{UNET}{S}", f"{UNET}.fp16{S}"],
        "fp16",
        Weights((f"{UNET}.fp16{S}",), None, "fp16"),
    ),
    "plain although there is a variant": (
        [f"{UNET}.fp16{S}", f"{UNET}{S}", f"{UNET}.non_ema{S}"],
        None,
        Weights((f"{UNET}{S}",), None, ""),
    ),
    "variant that is missing": ([f"{UNET}{S}"], "fp16", Weights((f"{UNET}{S}",), None, "")),
    "plain before another variant": (
        [f"{UNET}{S}", f"{UNET}.non_ema{S}"],
        "fp16",
        Weights((f"{UNET}{S}",), None, ""),
    ),
    "the only variant": ([f"{UNET}.fp16{S}"], None, Weights((f"{UNET}.fp16{S}",), None, "fp16")),
    "pickles beside": ([f"{UNET}{S}", f"{UNET}.bin"], None, Weights((f"{UNET}{S}",), None, "")),
    "text encoder": ([f"model{S}", f"model.fp16{S}"], None, Weights((f"model{S}",), None, "")),
    "unet beside a lora": (
        [f"pytorch_lora_weights{S}", f"{UNET}{S}"],
        None,
        Weights((f"{UNET}{S}",), None, ""),
    ),
    "lora": (
        ["README.md", f"pytorch_lora_weights{S}"],
        None,
        Weights((f"pytorch_lora_weights{S}",), None, ""),
    ),
    "any other name": (
        [f"sdxl_lightning_4step_unet{S}"],
        None,
        Weights((f"sdxl_lightning_4step_unet{S}",), None, ""),
    ),
    "whole file and shards": (
        [f"model{S}", f"model-00001-of-00001{S}", f"model{S}.index.json"],
        None,
        Weights((f"model{S}",), None, ""),
    ),
    "shards in order": (
        [f"model-0000{n}-of-00003{S}" for n in (3, 1, 2)] + [f"model{S}.index.json"],
        None,
        Weights(tuple(f"model-0000{n}-of-00003{S}" for n in (1, 2, 3)), f"model{S}.index.json", ""),
    ),
    "plain shards before a whole variant": (
        [f"model-00001-of-00001{S}", f"model.fp16{S}"],
        None,
        Weights((f"model-00001-of-00001{S}",), None, ""),
    ),
    "whole variant before plain shards": (
        [f"model-00001-of-00001{S}", f"model.fp16{S}"],
        "fp16",
        Weights((f"model.fp16{S}",), None, "fp16"),
    ),
    "shards of a variant": (
        [f"model.fp16-00001-of-00001{S}", f"model{S}.index.fp16.json", f"model{S}.index.json"],
        "fp16",
        Weights((f"model.fp16-00001-of-00001{S}",), f"model{S}.index.fp16.json", "fp16"),
    ),
}


@pytest.mark.parametrize("case", CHOICES)
def test_weights_are_chosen_by_name(case: str) -> None:
    names, variant, expected = CHOICES[case]
    assert select_weights(names, variant, "here") == expected
    assert select_weights(names[::-1], variant, "here") == expected


@pytest.mark.parametrize(
    ("names", "variant", "message"),
    [
        ([f"{UNET}.fp16{S}", f"{UNET}.ema{S}"], None, "here has weights only as variants: ema, fp"),
        ([f"{UNET}.fp16{S}", f"{UNET}.ema{S}"], "bf16", "only as variants: ema, fp16"),
        ([f"a{S}", f"b{S}"], None, "here has several weight files: a, b"),
        (["model.ckpt", "a.txt"], None, r"here has its weights only as a pickle \(model\.ckpt\)"),
        (["a.txt"], None, r"here has no \.safetensors file"),
        ([f"model-00001-of-00002{S}"], None, "here lacks the shard model-00002-of-00002"),
        ([f"model-00000-of-00001{S}"], None, "here lacks the shard model-00001-of-00001"),
        (
            [f"model.fp16-00002-of-00002{S}"],
            "fp16",
            r"here lacks the shard model\.fp16-00001-of-00002",
        ),
    ],
)
def test_what_cannot_be_chosen_is_said(names: list[str], variant: str | None, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        select_weights(names, variant, "here")


def test_a_cache_with_one_variant_does_not_stand_for_the_plain_files() -> None:
    names = [f"{UNET}.fp16{S}"]
    with pytest.raises(SourceNotFoundError, match="here has only the variant fp16"):
        select_weights(names, None, "here", is_partial=True)
    assert select_weights(names, "fp16", "here", is_partial=True).variant == "fp16"


def test_companions_are_everything_but_weights_code_and_hidden_files() -> None:
    kept = ["LICENSE", "config.json", "merges.txt", "sub/spiece.model", "vocab.json"]
    dropped = [
        *(f"model{S}", "model.bin", "model.ckpt", "model.pt", "model.pth", "model.msgpack"),
        *("model.h5", "model.onnx", "model.onnx_data", "model.pb", "model.xml", "model.pkl"),
        *("model.pickle", "run.py", "run.pyc", "__init__.py", ".gitattributes", ".git/config"),
        *("sub/.hidden", "../outside.json", f"model{S}.index.json", "model.bin.index.json"),
        *(f"model{S}.index.fp16.json", "model.bin.index.fp16.json"),
    ]
    assert companion_files([*dropped, *kept]) == kept


@pytest.mark.parametrize(
    ("name", "variant", "plain"),
    [
        (f"model{S}", "", f"model{S}"),
        (f"model.fp16{S}", "fp16", f"model{S}"),
        (f"model.fp16{S}", "", f"model.fp16{S}"),
        (f"model.non_ema{S}", "fp16", f"model.non_ema{S}"),
        (f"model.fp16-00001-of-00002{S}", "fp16", f"model-00001-of-00002{S}"),
        (f"model{S}.index.fp16.json", "fp16", f"model{S}.index.json"),
        ("config.json", "fp16", "config.json"),
    ],
)
def test_a_variant_is_taken_off_a_name(name: str, variant: str, plain: str) -> None:
    assert plain_name(name, variant) == plain


def test_a_folder_that_cannot_be_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_files(tmp_path / "unet", f"{UNET}.safetensors")
    real = os.scandir

    def scandir(path: str) -> Any:
        if Path(path) == folder:
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(SourceNotFoundError, match="cannot read the folder .*unet: Permission den"):
        resolve(folder)
