"""Small UNet-like checkpoints whose every value a test decides, and recipes over them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors.torch import load_file, save_file

from merge import build_plan, load_recipe, resolve_sources
from merge.plan.model import MergePlan

Tensors = Mapping[str, torch.Tensor]

SHAPES: dict[str, tuple[int, ...]] = {
    "conv_in.weight": (8, 4, 3, 3),
    "conv_in.bias": (8,),
    "time_embedding.linear_1.weight": (16, 8),
    "down_blocks.0.attentions.0.proj_in.weight": (8, 8, 1, 1),
    "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight": (8, 12),
    "down_blocks.0.resnets.0.conv1.weight": (8, 8, 3, 3),
    "mid_block.resnets.0.norm1.weight": (8,),
    "conv_out.weight": (4, 8, 3, 3),
}


def random_tensors(
    seed: int,
    *,
    dtype: torch.dtype = torch.float16,
    channels: int = 4,
    scale: float = 0.1,
    like: Tensors | None = None,
) -> dict[str, torch.Tensor]:
    """Return normal values of the mini UNet's shapes, near `like` when that is given."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for key, shape in SHAPES.items():
        if key == "conv_in.weight":
            shape = (shape[0], channels, *shape[2:])
        values = torch.randn(shape, generator=generator) * scale
        if like is not None and like[key].shape == values.shape:
            values = like[key].float() + values * 0.1
        tensors[key] = values.to(dtype)
    return tensors


def write_unet(folder: Path, tensors: Tensors, *, config: bool = True) -> Path:
    """Write a UNet folder and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(dict(tensors), folder / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    if config:
        channels = tensors["conv_in.weight"].shape[1]
        text = json.dumps({"_class_name": "UNet2DConditionModel", "in_channels": channels})
        (folder / "config.json").write_text(text)
    return folder


def write_models(
    folder: Path, *, dtype: torch.dtype = torch.float16
) -> dict[str, dict[str, torch.Tensor]]:
    """Write base, distilled and an 8-channel target UNet; return their tensors."""
    base = random_tensors(1, dtype=dtype)
    models = {
        "base": base,
        "distilled": random_tensors(2, dtype=dtype, like=base),
        "target": random_tensors(3, dtype=dtype, channels=8, like=base),
    }
    for name, tensors in models.items():
        write_unet(folder / name, tensors)
    return models


def write_recipe(folder: Path, **changes: Any) -> Path:
    """Write a recipe over `base`, `distilled` and `target` in the same folder."""
    tree: dict[str, Any] = {
        "name": "mini",
        "models": {"base": "./base", "distilled": "./distilled", "target": "./target"},
        **changes,
    }
    path = folder / "mini.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def plan_of(folder: Path, *overrides: str) -> MergePlan:
    """Plan the recipe in a folder."""
    recipe = load_recipe(folder / "mini.yaml", overrides)
    return build_plan(recipe, resolve_sources(recipe))


def read_output(folder: Path) -> dict[str, torch.Tensor]:
    """Load the merged UNet with the reference library."""
    return load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")


def contents(folder: Path, but: Sequence[str] = ("run.json",)) -> dict[str, bytes]:
    """Return the bytes of every file below a folder, without those that tell of a single run."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name not in but
    }


def numpy_float32(tensor: torch.Tensor) -> np.ndarray:
    """Widen exactly, without torch's own casts: bfloat16 is the upper half of a float32."""
    if tensor.dtype == torch.bfloat16:
        halves = tensor.contiguous().view(torch.uint16).numpy().astype(np.uint32)
        return (halves << 16).view(np.float32)
    return tensor.numpy().astype(np.float32)


def numpy_round(values: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """Round float32 to a dtype, to nearest even, in numpy; returns the bits as integers."""
    if dtype == torch.float16:
        return values.astype(np.float16).view(np.uint16)
    if dtype == torch.bfloat16:
        bits = values.view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return values.view(np.uint32)


def bits(tensor: torch.Tensor) -> np.ndarray:
    """Return a tensor's bits as unsigned integers."""
    width = {2: torch.uint16, 4: torch.uint32}[tensor.element_size()]
    return tensor.contiguous().view(width).numpy()
