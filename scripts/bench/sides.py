"""The sides of the merge benchmark that are no command of their own, each run in a fresh process.

Source of `naive`: the `adapt()` loop of https://github.com/quickjkee/instruct-pix2pix-distill,
with float32 arithmetic, so that its result can be compared bit by bit.
"""

from __future__ import annotations

import argparse
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

WEIGHTS = "diffusion_pytorch_model.safetensors"
MODELS = ("target", "distilled", "base")
CHUNK_BYTES = 1024 * 1024


def inputs(options: argparse.Namespace) -> list[Path]:
    """Return the files that every side reads."""
    if options.lora:
        return [options.models / "target" / WEIGHTS, options.models / "lora.safetensors"]
    return [options.models / name / WEIGHTS for name in MODELS]


def run_naive(options: argparse.Namespace) -> dict[str, Any]:
    from safetensors.torch import load_file, save_file

    started = time.perf_counter()
    target, distilled, base = (load_file(path) for path in inputs(options))
    merged = {}
    for key, tensor in target.items():
        if key == "conv_in.weight":
            merged[key] = tensor
            continue
        delta = (distilled[key].float() - base[key].float()) * 1.0
        merged[key] = (tensor.float() + delta).half()
    save_file(merged, options.scratch / "out.safetensors", {"format": "pt"})
    return {"stage_s": time.perf_counter() - started}


def run_stage(options: argparse.Namespace) -> dict[str, Any]:
    from merge import build_plan, load_recipe, resolve_sources
    from merge.engine import choose_device, execute_plan
    from merge.writer import TensorFileWriter

    recipe = load_recipe(options.scratch / "recipe.yaml")
    plan = build_plan(recipe, resolve_sources(recipe))
    device = choose_device(options.device)
    started = time.perf_counter()
    path = options.scratch / "out.safetensors"
    (unet,) = plan.components
    with TensorFileWriter(path, unet.out_header.file_bytes) as writer:
        execute_plan(
            plan,
            unet,
            recipe,
            writer,
            device=device,
            threads=options.threads,
            on_frontier=lambda position, states: None,
        )
        writer.finish(unet.header_bytes("0" * 64))
    return {"stage_s": time.perf_counter() - started}


def run_floor(options: argparse.Namespace) -> dict[str, Any]:
    """Read every input and write the output's size, by threads with reused buffers."""
    sources = [os.open(path, os.O_RDONLY) for path in inputs(options)]
    sizes = [os.fstat(source).st_size for source in sources]
    size = sizes[0]
    started = time.perf_counter()
    output = os.open(options.scratch / "out.safetensors", os.O_RDWR | os.O_CREAT, 0o600)
    os.ftruncate(output, size)
    offsets = iter(range(0, size, CHUNK_BYTES))
    lock = threading.Lock()

    def work() -> None:
        buffer = memoryview(bytearray(CHUNK_BYTES))
        while True:
            with lock:
                offset = next(offsets, None)
            if offset is None:
                return
            for source in reversed(sources):
                count = os.preadv(source, [buffer], offset)
            os.pwrite(output, buffer[:count], offset)

    threads = [threading.Thread(target=work) for _ in range(options.threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    os.fsync(output)
    return {"stage_s": time.perf_counter() - started}


def run_matmul(options: argparse.Namespace) -> dict[str, Any]:
    import torch
    from safetensors.torch import load_file

    tensors = load_file(options.models / "lora.safetensors")
    stems = sorted(name.removesuffix(".alpha") for name in tensors if name.endswith(".alpha"))
    largest = max(
        tensors[f"{s}.lora_up.weight"].shape[0] * tensors[f"{s}.lora_down.weight"][0].numel()
        for s in stems
    )
    torch.set_num_threads(1)
    todo = iter(stems)
    lock = threading.Lock()
    started = time.perf_counter()

    def work() -> None:
        product = torch.empty(largest, dtype=torch.float64)
        while True:
            with lock:
                stem = next(todo, None)
            if stem is None:
                return
            up = tensors[f"{stem}.lora_up.weight"].flatten(1).double()
            down = tensors[f"{stem}.lora_down.weight"].flatten(1).double()
            # In blocks of rows, so that the product stays in the cache as in a merge.
            rows = max(1, 512 * 1024 // down.shape[1])
            for begin in range(0, len(up), rows):
                part = up[begin : begin + rows]
                out = product[: len(part) * down.shape[1]].view(len(part), -1)
                torch.mm(part, down, out=out)

    threads = [threading.Thread(target=work) for _ in range(options.threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {"stage_s": time.perf_counter() - started}


def run_fuse(options: argparse.Namespace) -> dict[str, Any]:
    """Load a UNet, let diffusers fuse the LoRA into it, and save it."""
    import torch
    from diffusers import UNet2DConditionModel
    from safetensors.torch import load_file

    started = time.perf_counter()
    folder = options.models / "target"
    unet = UNet2DConditionModel.from_pretrained(folder, torch_dtype=torch.float16)
    names = _peft_names(load_file(options.models / "lora.safetensors"), unet)
    unet.load_lora_adapter(names, prefix=None)
    unet.fuse_lora()
    unet.unload_lora()
    unet.save_pretrained(options.scratch / "fuse")
    return {"stage_s": time.perf_counter() - started}


def _peft_names(tensors: dict[str, Any], unet: Any) -> dict[str, Any]:
    """Spell a kohya file's names as diffusers does; its own converter wants a whole pipeline."""
    modules = {f"lora_unet_{name.replace('.', '_')}": name for name, _ in unet.named_modules()}
    found = {}
    for name, tensor in tensors.items():
        stem, _, part = name.partition(".")
        if part == "alpha":
            continue
        side = "lora_A" if "down" in part else "lora_B"
        scale = float(tensors[f"{stem}.alpha"]) / tensors[f"{stem}.lora_down.weight"].shape[0]
        value = tensor * scale if side == "lora_B" else tensor
        found[f"{modules[stem]}.{side}.weight"] = value
    return found


def run_compare(options: argparse.Namespace) -> dict[str, Any]:
    """Compare the naive result and ours tensor by tensor, bit by bit."""
    import torch
    from safetensors import safe_open

    reference = options.scratch / "reference.safetensors"
    with (
        safe_open(reference, "pt") as one,
        safe_open(options.scratch / "out.safetensors", "pt") as two,
    ):
        names = sorted(one.keys())
        assert names == sorted(two.keys())
        for name in names:
            a, b = one.get_tensor(name), two.get_tensor(name)
            if not torch.equal(a.view(torch.int16), b.view(torch.int16)):
                raise SystemExit(f"{name} differs from the naive result")
    reference.unlink()
    print(f"{len(names)} tensors are bit-equal to the naive result", file=sys.stderr)
    return {}


CHILDREN = {
    "naive": run_naive,
    "stage": run_stage,
    "floor": run_floor,
    "matmul": run_matmul,
    "fuse": run_fuse,
    "compare": run_compare,
}
