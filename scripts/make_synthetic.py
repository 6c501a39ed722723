"""Write full-size SD1.5 or SDXL UNets and an LCM-LoRA with random weights, for benchmarks.

    python scripts/make_synthetic.py OUT_FOLDER --arch sd15 --dtype float16

OUT_FOLDER receives three UNet folders (config.json, diffusion_pytorch_model.safetensors) under
the true key names and shapes, and a LoRA:

    base/               the published 4-channel UNet's shape
    distilled/          base plus a little noise, with a full LCM's guidance embedding
    target/             base plus a little noise, conv_in widened to 8 channels
    lora.safetensors    kohya keys, rank 64, alpha 8, the modules of LCM-LoRA

Tensors are drawn in pieces and written as they come, so memory stays small whatever the model.
A seed fixes every byte: each tensor has its own generator, in whatever order it is written.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from tqdm import tqdm

Shape = tuple[int, ...]
Pieces = Iterator[np.ndarray]

# Name in a safetensors header, and torch's type.
DTYPES = {
    "float16": ("F16", torch.float16),
    "bfloat16": ("BF16", torch.bfloat16),
    "float32": ("F32", torch.float32),
}
ROLES = ("base", "distilled", "target", "lora")
PIECE = 1 << 20  # values drawn at once: 4 MiB, which stays in a core's cache
THREADS = 2
DELTA = 0.02  # of distilled, target and LoRA against base, relative to the tensor's own size

# Source: unet/config.json of stable-diffusion-v1-5/stable-diffusion-v1-5; what is missing here is
# diffusers' default.
SD15_UNET: dict[str, Any] = {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "attention_head_dim": 8,
    "cross_attention_dim": 768,
    "down_block_types": (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
}
# Source: unet/config.json of stabilityai/stable-diffusion-xl-base-1.0.
SDXL_UNET: dict[str, Any] = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "down_block_types": ("DownBlock2D", *("CrossAttnDownBlock2D",) * 2),
    "up_block_types": (*("CrossAttnUpBlock2D",) * 2, "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}

# The modules of LCM-LoRA. Source: diffusers, train_lcm_distill_lora_sd_wds.py.
LORA_MODULES = (
    *("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
    *("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv"),
    "time_emb_proj",
)
LORA_RANK = 64
LORA_ALPHA = 8.0


@dataclass(frozen=True)
class Architecture:
    """A UNet config and the counts that prove that it is the published one."""

    config: dict[str, Any]
    keys: int
    parameters: int
    lora_modules: int


ARCHITECTURES = {
    "sd15": Architecture(SD15_UNET, keys=686, parameters=859_520_964, lora_modules=278),
    "sdxl": Architecture(SDXL_UNET, keys=1680, parameters=2_567_463_684, lora_modules=788),
}


def _pieces(size: int, *names: object) -> Pieces:
    """Yield `size` standard normals in pieces, the same ones for the same names.

    Every piece has a memory of its own, which the caller may change.
    """
    digest = hashlib.sha256("/".join(map(str, names)).encode()).digest()
    rng = np.random.Generator(np.random.SFC64(int.from_bytes(digest[:16], "little")))
    for start in range(0, size, PIECE):
        yield rng.standard_normal(min(PIECE, size - start), dtype=np.float32)


def _scale(key: str, shape: Shape) -> tuple[float, float]:
    """Return the mean and the spread of a tensor that would keep activations near unit scale."""
    if len(shape) > 1:
        return 0.0, 1 / math.sqrt(math.prod(shape[1:]))
    return (1.0, 0.1) if key.endswith(".weight") else (0.0, 0.05)


def _base_pieces(key: str, shape: Shape, seed: int) -> Pieces:
    """Yield a tensor of the base model."""
    mean, spread = _scale(key, shape)
    for piece in _pieces(math.prod(shape), seed, "base", key):
        piece *= np.float32(spread)
        piece += np.float32(mean)
        yield piece


def _near_base_pieces(role: str, key: str, shape: Shape, seed: int) -> Pieces:
    """Yield a tensor of a model that descends from the base model."""
    noise_pieces = _pieces(math.prod(shape), seed, role, key)
    noise_scale = np.float32(DELTA * math.hypot(*_scale(key, shape)))
    for piece, noise in zip(_base_pieces(key, shape, seed), noise_pieces, strict=True):
        noise *= noise_scale
        noise += piece
        yield noise


def _widened_pieces(key: str, shape: Shape, base_shape: Shape, seed: int) -> Pieces:
    """Yield the target's conv_in: four channels near base's, then four of its own."""
    near = np.concatenate(list(_near_base_pieces("target", key, base_shape, seed)))
    wide = np.concatenate(list(_pieces(math.prod(shape), seed, "image channels", key)))
    wide = wide.reshape(shape) * np.float32(_scale(key, shape)[1])
    wide[:, : base_shape[1]] = near.reshape(base_shape)
    yield wide.reshape(-1)


def _unet_pieces(
    role: str, key: str, shape: Shape, base_shapes: dict[str, Shape], seed: int
) -> Pieces:
    """Yield one tensor of the UNet in `role`."""
    base_shape = base_shapes.get(key)
    if role == "base" or base_shape is None:  # None: the guidance embedding
        return _base_pieces(key, shape, seed)
    if base_shape != shape:
        return _widened_pieces(key, shape, base_shape, seed)
    return _near_base_pieces(role, key, shape, seed)


def _lora_pieces(key: str, shape: Shape, seed: int) -> Pieces:
    """Yield one tensor of the LoRA; its deltas have a relative size of `DELTA`."""
    if key.endswith(".alpha"):
        yield np.full(1, LORA_ALPHA, dtype=np.float32)
        return
    spread = 1 / math.sqrt(math.prod(shape[1:]))
    if key.endswith(".lora_up.weight"):
        # A product of two such matrices sums over the rank: alpha / rank is what is left to undo.
        spread *= DELTA * LORA_RANK / LORA_ALPHA
    for piece in _pieces(math.prod(shape), seed, "lora", key):
        piece *= np.float32(spread)
        yield piece


def _unet(config: dict[str, Any], role: str) -> Any:
    """Build the UNet in `role` without memory for its weights."""
    changes = {"distilled": {"time_cond_proj_dim": 256}, "target": {"in_channels": 8}}
    with torch.device("meta"):
        return diffusers.UNet2DConditionModel(**{**config, **changes.get(role, {})})


def _unet_shapes(model: Any) -> dict[str, Shape]:
    return {key: tuple(value.shape) for key, value in model.state_dict().items()}


def _lora_shapes(shapes: dict[str, Shape]) -> dict[str, Shape]:
    """Return the shapes of an LCM-LoRA for a UNet, under kohya's names of diffusers' blocks."""
    suffixes = tuple(f".{name}.weight" for name in LORA_MODULES)
    lora: dict[str, Shape] = {}
    for key, shape in shapes.items():
        if not key.endswith(suffixes):
            continue
        name = "lora_unet_" + key.removesuffix(".weight").replace(".", "_")
        # A convolution keeps its kernel in `down`; `up` is then a 1x1 convolution.
        lora[f"{name}.lora_down.weight"] = (LORA_RANK, *shape[1:])
        lora[f"{name}.lora_up.weight"] = (shape[0], LORA_RANK, *[1] * (len(shape) - 2))
        lora[f"{name}.alpha"] = ()
    return lora


def _check_counts(arch: Architecture, shapes: dict[str, Shape]) -> None:
    """Check that the UNet is the published one.

    Raises:
        RuntimeError: If keys, parameters or LoRA modules are not as many as there.
    """
    parameters = sum(math.prod(shape) for shape in shapes.values())
    found = (len(shapes), parameters, len(_lora_shapes(shapes)) // 3)
    wanted = (arch.keys, arch.parameters, arch.lora_modules)
    if found != wanted:
        raise RuntimeError(f"keys, parameters, LoRA modules are {found}, should be {wanted}")


class TensorFile:
    """A safetensors file that several threads fill at once, each at its own offset.

    It appears under its name when all is written: a file cut short would pass for a whole one,
    because its size is set at the start.
    """

    def __init__(self, path: Path, shapes: dict[str, Shape], dtype: str):
        self.path = path
        self.dtype_name, self.dtype = DTYPES[dtype]
        self._offsets: dict[str, int] = {}
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        # One dtype, so the reference library's order, dtype width and then name, is that of names.
        for key in sorted(shapes):
            start, end = end, end + math.prod(shapes[key]) * self.dtype.itemsize
            self._offsets[key] = start
            header[key] = {
                "dtype": self.dtype_name,
                "shape": list(shapes[key]),
                "data_offsets": [start, end],
            }
        self.data_bytes = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._head = len(text).to_bytes(8, "little") + text

    def __enter__(self) -> TensorFile:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._partial = self.path.with_name(self.path.name + ".partial")
        self._file = self._partial.open("wb", buffering=0)
        self._file.truncate(len(self._head) + self.data_bytes)
        os.pwrite(self._file.fileno(), self._head, 0)
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._file.close()
        if kind is None:
            self._partial.replace(self.path)
        else:
            self._partial.unlink()

    def write(self, key: str, pieces: Pieces) -> int:
        """Write a tensor given as float32 pieces and return its size in bytes."""
        start = offset = len(self._head) + self._offsets[key]
        for piece in pieces:
            cast = torch.from_numpy(piece).to(self.dtype)
            left = memoryview(cast.view(torch.uint8).numpy())
            while left:  # one call may write less than it is given
                written = os.pwrite(self._file.fileno(), left, offset)
                offset += written
                left = left[written:]
        return offset - start


def _write_all(files: list[tuple[TensorFile, dict[str, Shape], Callable[..., Pieces]]]) -> None:
    """Write every tensor of every file on `THREADS` threads."""
    torch.set_num_threads(1)  # the threads here are enough
    with ExitStack() as stack:
        jobs = []
        for file, shapes, make_pieces in files:
            stack.enter_context(file)
            jobs += [(file, make_pieces, key, shape) for key, shape in shapes.items()]
        total = sum(file.data_bytes for file, _, _ in files)
        bar = stack.enter_context(tqdm(total=total, unit="B", unit_scale=True))
        pool = ThreadPoolExecutor(THREADS)
        # Entered last and left first: no file may be closed while a thread writes to it.
        stack.callback(pool.shutdown, cancel_futures=True)
        for size in pool.map(lambda job: job[0].write(job[2], job[1](job[2], job[3])), jobs):
            bar.update(size)


def make_synthetic(
    out: Path,
    arch: str,
    *,
    dtype: str = "float16",
    seed: int = 0,
    only: tuple[str, ...] = ROLES,
) -> None:
    """Write a full-size set into `out`.

    Args:
        out: The folder; made if need be, files in it are replaced.
        arch: `sd15` or `sdxl`.
        dtype: Of every tensor: `float16`, `bfloat16` or `float32`.
        seed: Fixes every byte.
        only: What to write, of `base`, `distilled`, `target`, `lora`.

    Raises:
        RuntimeError: If the installed diffusers does not build the published UNet.
    """
    architecture = ARCHITECTURES[arch]
    base_shapes = _unet_shapes(_unet(architecture.config, "base"))
    _check_counts(architecture, base_shapes)
    files: list[tuple[TensorFile, dict[str, Shape], Callable[..., Pieces]]] = []
    for role in (role for role in ROLES if role in only):
        if role == "lora":
            shapes = _lora_shapes(base_shapes)
            file = TensorFile(out / "lora.safetensors", shapes, dtype)
            files.append((file, shapes, lambda key, shape: _lora_pieces(key, shape, seed)))
            continue
        model = _unet(architecture.config, role)
        shapes = _unet_shapes(model)
        folder = out / role
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(model.to_json_string(), encoding="utf-8")
        file = TensorFile(folder / "diffusion_pytorch_model.safetensors", shapes, dtype)

        def make_pieces(key: str, shape: Shape, role: str = role) -> Pieces:
            return _unet_pieces(role, key, shape, base_shapes, seed)

        files.append((file, shapes, make_pieces))
    _write_all(files)


def _roles(text: str) -> tuple[str, ...]:
    """Parse the value of `--only`."""
    roles = tuple(text.split(","))
    if unknown := [role for role in roles if role not in ROLES]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(ROLES)}")
    return roles


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", metavar="OUT_FOLDER", type=Path, help="made if need be")
    parser.add_argument("--arch", choices=ARCHITECTURES, required=True)
    parser.add_argument("--dtype", choices=DTYPES, default="float16", help="of all tensors")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--only", type=_roles, default=ROLES, metavar="LIST", help="some of " + ",".join(ROLES)
    )
    args = parser.parse_args(argv)
    make_synthetic(args.out, args.arch, dtype=args.dtype, seed=args.seed, only=args.only)
    print(args.out)


if __name__ == "__main__":
    main()
