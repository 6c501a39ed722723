"""Single LDM/SGM files as base, distilled and target of a recipe, and as its output."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from merge import load_recipe, run_recipe, verify_files
from merge.editor.batches import edit
from merge.editor.load import load_editor
from merge.editor.settings import EditSettings
from merge.errors import CheckpointError, PlanError, SourceNotFoundError
from merge.plan.build import build_plan
from merge.reader.checkpoint import read_checkpoint
from merge.sources.resolve import resolve_sources
from merge.writer.copies.single_file import plan_single_file
from merge.writer.copies.write import write_tensor_copies

UNET = "unet/diffusion_pytorch_model.safetensors"
PARTS = {
    "sd15": ("unet", "vae", "text_encoder"),
    "sdxl": ("unet", "vae", "text_encoder", "text_encoder_2"),
}


def write_single(folder: Path, parts: tuple[str, ...], out: Path) -> Path:
    """Write the components of a folder as one file."""
    where = {part: folder / part if (folder / part).is_dir() else folder for part in parts}
    checkpoints = {
        part: read_checkpoint(sorted(path.glob("*.safetensors"))) for part, path in where.items()
    }
    # A full LCM's guidance embedding has no name in a single file.
    for checkpoint in checkpoints.values():
        checkpoint.tensors.pop("time_embedding.cond_proj.weight", None)
    write_tensor_copies(out, plan_single_file(checkpoints).copies[""], {"format": "pt"})
    return out


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folders(request: pytest.FixtureRequest, family: str) -> Path:
    found: Path = request.getfixturevalue(f"tiny_{family}")
    return found


@pytest.fixture(scope="module")
def files(folders: Path, family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same models as single files: a whole target, and UNets alone."""
    root = tmp_path_factory.mktemp(f"files-{family}")
    write_single(folders / "target", PARTS[family], root / "target.safetensors")
    for role in ("base", "distilled"):
        write_single(folders / role, ("unet",), root / f"{role}.safetensors")
    return root


def recipe_of(folder: Path, models: dict[str, Any], *overrides: str, **changes: Any) -> Any:
    tree = {"name": "single", "models": models, "verify": {"resolution": 64}, **changes}
    path = folder / "single.yaml"
    path.write_text(yaml.safe_dump(tree))
    return load_recipe(path, overrides)


def as_files(files: Path, folders: Path) -> dict[str, Any]:
    models: dict[str, Any] = {r: str(files / f"{r}.safetensors") for r in ("base", "distilled")}
    target = {"path": str(files / "target.safetensors"), "config": str(folders / "target")}
    return {**models, "target": target}


def as_folders(folders: Path) -> dict[str, Any]:
    return {role: str(folders / role) for role in ("base", "distilled", "target")}


def same_tensors(a: Path, b: Path) -> None:
    ours, theirs = load_file(a), load_file(b)
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert torch.equal(ours[key].view(torch.uint8), tensor.view(torch.uint8)), key


# As inputs -------------------------------------------------------------------------------------


def test_single_files_give_the_weights_of_the_folders(
    files: Path, folders: Path, family: str, tmp_path: Path
) -> None:
    first = run_recipe(
        recipe_of(tmp_path, as_files(files, folders)), tmp_path / "files", device="cpu"
    )
    assert first.verified is True
    run_recipe(
        recipe_of(tmp_path, as_folders(folders)), tmp_path / "folders", device="cpu", verify=False
    )
    same_tensors(tmp_path / "files" / UNET, tmp_path / "folders" / UNET)
    for part in PARTS[family][1:]:
        ours, theirs = (
            next((tmp_path / name / part).glob("*.safetensors")) for name in ("files", "folders")
        )
        same_tensors(ours, theirs)
    index = json.loads((tmp_path / "files" / "model_index.json").read_text())
    assert not index.get("safety_checker", [None])[0]
    manifest = json.loads((tmp_path / "files" / "merge_manifest.json").read_text())
    assert "vae/diffusion_pytorch_model.safetensors" in manifest["files"]
    assert verify_files(tmp_path / "files") == len(manifest["files"])
    lock = yaml.safe_load((tmp_path / "files" / "recipe.lock.yaml").read_text())
    assert lock["recipe"]["models"]["target"]["config"] == "./target"


def test_the_plan_names_what_a_single_file_holds_besides(
    files: Path, folders: Path, family: str, tmp_path: Path
) -> None:
    tensors = load_file(files / "target.safetensors")
    extra = {"model_ema.decay": torch.ones(1), "alphas_cumprod": torch.ones(1000)}
    save_file(tensors | extra, tmp_path / "target.safetensors")
    models = as_files(files, folders)
    models["base"] = str(files / "target.safetensors")
    models["target"]["path"] = str(tmp_path / "target.safetensors")
    with pytest.raises(PlanError, match="conv_in.weight: shape"):
        build_plan(*planned(tmp_path, models))
    models["base"] = as_files(files, folders)["base"]
    plan = build_plan(*planned(tmp_path, models))
    reasons = {item.key: item.reason for item in plan.left_out if item.model == "target"}
    assert "average kept for training" in reasons["model_ema.decay"]
    assert "noise schedule" in reasons["alphas_cumprod"]
    assert reasons.keys() == extra.keys()
    whole = write_single(folders / "target", PARTS[family], tmp_path / "whole.safetensors")
    distilled = {**as_files(files, folders), "base": str(whole), "distilled": str(whole)}
    plan = build_plan(*planned(tmp_path, distilled, allow_noop=True))
    left = [item for item in plan.left_out if item.model == "base"]
    assert left
    assert {item.reason for item in left} == {"not the UNet, which alone is merged"}


def planned(folder: Path, models: dict[str, Any], **changes: Any) -> tuple[Any, Any]:
    recipe = recipe_of(folder, models, **changes)
    return recipe, resolve_sources(recipe)


def test_a_whole_file_as_target_needs_configs(files: Path, folders: Path, tmp_path: Path) -> None:
    models = as_files(files, folders)
    models["target"] = str(files / "target.safetensors")
    with pytest.raises(PlanError, match="is a whole single file, which holds no tokenizers"):
        build_plan(*planned(tmp_path, models))
    models["target"] = {"path": str(files / "target.safetensors"), "config": str(tmp_path)}
    with pytest.raises(SourceNotFoundError, match=r"config: there is no config\.json of a UNet"):
        planned(tmp_path, models)


def test_a_unet_alone_gives_a_unet(files: Path, folders: Path, tmp_path: Path) -> None:
    only = write_single(folders / "target", ("unet",), tmp_path / "only.safetensors")
    models = {**as_files(files, folders), "target": str(only)}
    result = run_recipe(recipe_of(tmp_path, models), tmp_path / "out", device="cpu")
    assert result.verified is None
    assert not (tmp_path / "out" / "vae").exists()
    run_recipe(
        recipe_of(tmp_path, as_folders(folders)), tmp_path / "folders", device="cpu", verify=False
    )
    same_tensors(tmp_path / "out" / UNET, tmp_path / "folders" / UNET)


def test_files_that_cannot_be_read(files: Path, folders: Path, family: str, tmp_path: Path) -> None:
    tensors = load_file(files / "base.safetensors")
    bad = tmp_path / "bad.safetensors"
    models = {**as_files(files, folders), "base": str(bad)}
    save_file(tensors | {"conv_in.weight": torch.zeros(8, 4, 3, 3)}, bad)
    with pytest.raises(CheckpointError, match=r"base \(bad\.safetensors\): the file has two UNets"):
        build_plan(*planned(tmp_path, models))
    save_file(tensors | {"some.other.key": torch.zeros(3)}, bad)
    with pytest.raises(CheckpointError, match=r"belong to no part of an LDM/SGM file: some\.other"):
        build_plan(*planned(tmp_path, models))
    marked = load_file(files / "target.safetensors") | {"edm_vpred.sigma_max": torch.ones(1)}
    save_file(marked, bad)
    models = as_files(files, folders)
    models["target"]["path"] = str(bad)
    with pytest.raises(PlanError, match=r"is an EDM v-prediction model \(it has edm_vpred\.sigma_"):
        build_plan(*planned(tmp_path, models))


def test_configs_of_another_architecture(tiny_sd15: Path, tiny_sdxl: Path, tmp_path: Path) -> None:
    path = write_single(tiny_sd15 / "target", PARTS["sd15"], tmp_path / "t.safetensors")
    models = {
        "base": str(tiny_sd15 / "base"),
        "distilled": str(tiny_sd15 / "distilled"),
        "target": {"path": str(path), "config": str(tiny_sdxl / "target")},
    }
    with pytest.raises(PlanError, match=r"has no text_encoder_2, and its config \(target\)"):
        build_plan(*planned(tmp_path, models))


# As output -------------------------------------------------------------------------------------


def test_the_output_can_be_a_single_file_too(folders: Path, family: str, tmp_path: Path) -> None:
    import diffusers

    recipe = recipe_of(tmp_path, as_folders(folders), "output.single_file=true")
    result = run_recipe(recipe, tmp_path / "out", device="cpu")
    assert result.verified is True
    path = result.folder / "single.safetensors"
    manifest = json.loads((result.folder / "merge_manifest.json").read_text())
    assert manifest["files"]["single.safetensors"]["size"] == path.stat().st_size
    assert verify_files(result.folder) == len(manifest["files"])
    diffusers.logging.set_verbosity_error()
    diffusers.logging.disable_progress_bar()
    infix = "XL" if family == "sdxl" else ""
    name = f"StableDiffusion{infix}InstructPix2PixPipeline"
    extra = {"add_watermarker": False} if infix else {"safety_checker": None}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipeline = getattr(diffusers, name).from_single_file(
            str(path), config=str(result.folder), local_files_only=True, **extra
        )
    for key, tensor in load_file(result.folder / UNET).items():
        assert torch.equal(pipeline.unet.state_dict()[key], tensor.float()), key
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert metadata["instruct_merge.recipe_digest"] == result.recipe_digest
    assert metadata["modelspec.architecture"].endswith("-edit")
    again = run_recipe(recipe, tmp_path / "again", device="cpu", verify=False)
    assert again.files == {**result.files}


def test_a_single_file_edits_like_its_folder(files: Path, folders: Path, tmp_path: Path) -> None:
    settings = EditSettings(steps=2, resolution=64)
    picture = Image.effect_noise((64, 64), 80).convert("RGB")
    pictures = []
    for checkpoint, config in (
        (folders / "target", None),
        (files / "target.safetensors", folders / "target"),
    ):
        editor = load_editor(checkpoint, config=config, device="cpu")
        pictures.append(edit(editor, picture, "make it blue", settings).image)
    assert pictures[0].tobytes() == pictures[1].tobytes()
    with pytest.raises(SourceNotFoundError, match="is a single file, which has no tokenizers"):
        load_editor(files / "target.safetensors", device="cpu")
    (tmp_path / "odd.safetensors").write_bytes(b"not a checkpoint")
    with pytest.raises(CheckpointError, match=r"odd\.safetensors: the header claims"):
        load_editor(tmp_path / "odd.safetensors", config=folders / "target", device="cpu")


def test_a_unet_cannot_become_a_single_file(folders: Path, tmp_path: Path) -> None:
    models = {**as_folders(folders), "target": str(folders / "target" / "unet")}
    shutil.copytree(folders / "target" / "unet", tmp_path / "unet")
    with pytest.raises(PlanError, match=r"output\.single_file: the target is only a UNet"):
        build_plan(*planned(tmp_path, models, output={"single_file": True}))
