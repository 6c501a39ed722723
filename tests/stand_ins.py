"""Tiny repositories with the names and the layouts of the public ones that bundled recipes use.

What is in each is what was published: formats beside each other, variants for some components and
not for others, UNets at the root, bare state dicts, pickles, and files that nobody needs.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

Tensors = Mapping[str, torch.Tensor]
UNET = "diffusion_pytorch_model"
LORA = "pytorch_lora_weights.safetensors"
GUIDANCE = "time_embedding.cond_proj.weight"


def write_hub(root: Path, sd15: Path, sdxl: Path) -> None:
    """Write every repository below a Hub's root.

    Args:
        root: Receives `org/name/...`.
        sd15: Written by `scripts.make_tiny.make_sd15`.
        sdxl: Written by `scripts.make_tiny.make_sdxl`.
    """
    _write_sd15(root, sd15)
    _write_sdxl(root, sdxl)
    for repo in root.glob("*/*"):
        (repo / "README.md").write_text("---\nlicense: other\n---\nA model.\n")
        (repo / ".gitattributes").write_text("*.bin filter=lfs\n")
        _write(repo / "images" / "grid.png", b"no picture")


def _write_sd15(root: Path, models: Path) -> None:
    target = root / "timbrooks" / "instruct-pix2pix"
    shutil.copytree(models / "target", target)
    unet = _unet(models / "target" / "unet")
    _save_both(target / "unet", _as(unet, torch.float32), UNET)
    _save_both(target / "text_encoder", load_file(target / "text_encoder/model.safetensors"))
    # The same weights as one file of 2023, with its moving averages.
    _write(target / "instruct-pix2pix-00-22000.ckpt", b"not read")
    _write(target / "instruct-pix2pix-00-22000.safetensors", b"not read")
    brush = root / "vinesmsuic" / "magicbrush-jul7"
    shutil.copytree(models / "target", brush)
    for path in brush.rglob("*.safetensors"):
        name = "pytorch_model.bin" if path.name == "model.safetensors" else f"{UNET}.bin"
        torch.save(dict(load_file(path)), path.with_name(name))
        path.unlink()
    index = json.loads((brush / "model_index.json").read_text())
    index["_class_name"] = "StableDiffusionPipeline"
    (brush / "model_index.json").write_text(json.dumps(index))
    kohya, peft = models / "lora_kohya.safetensors", models / "lora_peft.safetensors"
    _copy(kohya, root / "latent-consistency" / "lcm-lora-sdv1-5" / LORA)
    _copy(peft, root / "h1t" / "TCD-SD15-LoRA" / LORA)
    hyper = root / "ByteDance" / "Hyper-SD"
    for steps in (1, 2, 4, 8):
        source = kohya if steps == 4 else peft
        plural = "step" if steps == 1 else "steps"
        _copy(source, hyper / f"Hyper-SD15-{steps}{plural}-lora.safetensors")


def _write_sdxl(root: Path, models: Path) -> None:
    target = root / "diffusers" / "sdxl-instructpix2pix-768"
    shutil.copytree(models / "target", target)
    _save_both(target / "unet", _as(_unet(models / "target" / "unet"), torch.float32), UNET)
    base, distilled = _unet(models / "base"), _unet(models / "distilled")
    plain = {key: value for key, value in distilled.items() if key != GUIDANCE}
    config = json.loads((models / "base" / "config.json").read_text())
    for repo, tensors in (("stable-diffusion-xl-base-1.0", base), ("sdxl-turbo", plain)):
        folder = root / "stabilityai" / repo
        shutil.copytree(models / "target", folder)
        (folder / "unet" / "config.json").write_text(json.dumps(config))
        _save_both(folder / "unet", _as(tensors, torch.float32), UNET)
        save_file(dict(tensors), folder / "unet" / f"{UNET}.fp16.safetensors", {"format": "pt"})
        _write(folder / "sd_xl.safetensors", b"not read")
    lcm = root / "latent-consistency" / "lcm-sdxl"
    _copy(models / "distilled" / "config.json", lcm / "config.json")
    save_file(_as(distilled, torch.float32), lcm / f"{UNET}.safetensors", {"format": "pt"})
    save_file(dict(distilled), lcm / f"{UNET}.fp16.safetensors", {"format": "pt"})
    lightning = root / "ByteDance" / "SDXL-Lightning"
    for steps in (2, 4, 8):
        path = lightning / f"sdxl_lightning_{steps}step_unet.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(plain, path)
        _copy(models / "lora_kohya.safetensors", lightning / f"{path.stem[:-5]}_lora.safetensors")
    dmd2 = root / "tianweiy" / "DMD2"
    dmd2.mkdir(parents=True)
    for name, dtype in (("", torch.float32), ("_fp16", torch.float16)):
        torch.save(_as(plain, dtype), dmd2 / f"dmd2_sdxl_4step_unet{name}.bin")
    _copy(models / "lora_kohya.safetensors", root / "latent-consistency" / "lcm-lora-sdxl" / LORA)


def _unet(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / f"{UNET}.safetensors")


def _as(tensors: Tensors, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {key: value.to(dtype) for key, value in tensors.items()}


def _save_both(folder: Path, tensors: Tensors, stem: str = "") -> None:
    """Save the same weights as safetensors and as a pickle."""
    save_file(dict(tensors), folder / f"{stem or 'model'}.safetensors", {"format": "pt"})
    torch.save(dict(tensors), folder / f"{stem or 'pytorch_model'}.bin")


def _copy(source: Path, to: Path) -> None:
    to.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(source, to)


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
