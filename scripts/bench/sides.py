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
# Of the copy: with 128 KiB to 4 MiB it took a tenth longer.
CHUNK_BYTES = 64 * 1024
# The output of the side before. A virtual machine gives freed memory back to its host within two
# seconds, and getting it again takes as long as a merge: what is timed frees it at the last moment.
PREVIOUS = "previous.safetensors"


def input_files(models: Path, *, is_lora: bool) -> list[Path]:
    """Return the files that every side reads, the target's first."""
    if is_lora:
        return [models / "target" / WEIGHTS, models / "lora.safetensors"]
    return [models / name / WEIGHTS for name in MODELS]


def run_naive(options: argparse.Namespace) -> dict[str, Any]:
    from safetensors.torch import load_file, save_file

    started = time.perf_counter()
    files = input_files(options.models, is_lora=False)
    target, distilled, base = (load_file(path) for path in files)
    merged = {}
    for key, tensor in target.items():
        if key == "conv_in.weight":
            merged[key] = tensor
            continue
        delta = (distilled[key].float() - base[key].float()) * 1.0
        merged[key] = (tensor.float() + delta).half()
    save_file(merged, options.scratch / "out.safetensors", {"format": "pt"})
    return {"stage_s": time.perf_counter() - started}


def merge_stage(folder: Path, threads: int, device: str) -> dict[str, float]:
    """Plan `recipe.yaml` of a folder and merge its UNet there, without hashes."""
    from merge import build_plan, load_recipe, resolve_sources
    from merge.engine.device import choose_device
    from merge.engine.execute import execute_plan
    from merge.writer.tensors import TensorFileWriter

    begun = time.perf_counter()
    recipe = load_recipe(folder / "recipe.yaml")
    plan = build_plan(recipe, resolve_sources(recipe))
    where = choose_device(device)
    if device != "cpu":
        _start_cuda(where)
    (folder / PREVIOUS).unlink(missing_ok=True)
    started, cpu = time.perf_counter(), time.process_time()
    (unet,) = plan.components
    with TensorFileWriter(folder / "out.safetensors", unet.out_header.file_bytes) as writer:
        execute_plan(
            plan,
            unet,
            recipe,
            writer,
            device=where,
            threads=threads,
            on_frontier=lambda position, states: None,
        )
        writer.finish(unet.header_bytes("0" * 64))
    ended = time.perf_counter()
    return {
        "plan_s": started - begun,
        "stage_s": ended - started,
        "stage_cpu_s": time.process_time() - cpu,
    }


def _start_cuda(device: Any) -> None:
    """Make the context, which takes a second and belongs to no merge."""
    import torch

    torch.zeros(1, device=device)
    torch.cuda.reset_peak_memory_stats(device)


def run_stage(options: argparse.Namespace) -> dict[str, Any]:
    row = merge_stage(options.scratch, options.threads, options.device)
    if options.device == "cpu":
        return row
    import torch

    return row | {"device_mb": torch.cuda.max_memory_reserved(options.device) / 1e6}


def run_transfers(options: argparse.Namespace) -> dict[str, Any]:
    """Merge with the arithmetic taken out: reads, copies to the device and back, writes."""
    from merge.engine.terms import TermAdder

    def read_only(
        adder: TermAdder, tensor: Any, factors: Any, values: Any, start: int, **_: object
    ) -> bool:
        for term in tensor.deltas:
            adder._delta(tensor, term, values, start)
        return True

    TermAdder.add = read_only  # type: ignore[method-assign]
    return run_stage(options)


def run_floor(options: argparse.Namespace) -> dict[str, Any]:
    """Read every input and write the output's size, by threads with reused buffers."""
    files = input_files(options.models, is_lora=options.lora)
    sources = [os.open(path, os.O_RDONLY) for path in files]
    sizes = [os.fstat(source).st_size for source in sources]
    size = sizes[0]
    (options.scratch / PREVIOUS).unlink(missing_ok=True)
    started = time.perf_counter()
    output = os.open(options.scratch / "out.safetensors", os.O_RDWR | os.O_CREAT, 0o600)
    os.ftruncate(output, size // options.narrowing)
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
            count //= options.narrowing
            os.pwrite(output, buffer[:count], offset // options.narrowing)

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
    "transfers": run_transfers,
    "floor": run_floor,
    "matmul": run_matmul,
    "fuse": run_fuse,
    "compare": run_compare,
}
