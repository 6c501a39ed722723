"""Time a full-size merge against what a user would otherwise write, and against a plain copy.

    python scripts/bench/merge.py                     # SD1.5-size, full delta, three pairs
    python scripts/bench/merge.py --arch sdxl --pairs 2
    python scripts/bench/merge.py --lora

Sides, each in a fresh process, in turn, with every input in the page cache:

* naive: load_file of the three UNets, the float32 formula, save_file (full delta only; skipped
  where memory is too small for it);
* matmul: the float64 products up @ down of a LoRA alone, by as many threads (LoRA only);
* stage: our merge alone, reading, adding and writing, without hashes;
* command: `instruct-merge run` as a user starts it, with start-up, SHA-256 of inputs and output,
  and fsync; one column for each of its stages;
* floor: the same bytes read and written by as many threads with nothing in between.

Ratios are taken pair by pair, since machines drift. The output goes to /dev/shm where it fits, so
that no disk is measured. The naive result and ours are compared bit by bit.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
# Python puts this script's folder first, where `merge` would be this script.
sys.path[0] = str(ROOT)
WEIGHTS = "diffusion_pytorch_model.safetensors"
MODELS = ("target", "distilled", "base")
PEAK_LIMIT_MB = 450
CHUNK_BYTES = 1024 * 1024


def main() -> None:
    options = parse_options()
    if options.child:
        print(json.dumps(CHILDREN[options.child](options)))
        return
    prepare(options)
    sides = choose_sides(options)
    rows: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    for pair in range(options.pairs):
        for side in sides:
            print(f"pair {pair + 1}/{options.pairs}: {side}", file=sys.stderr)
            rows[side].append(measure(side, options))
            if side == "naive" and pair == 0:
                keep = options.scratch / "reference.safetensors"
                (options.scratch / "out.safetensors").replace(keep)
            if side == "stage" and pair == 0 and "naive" in sides:
                run_child("compare", options)
    print_tables(rows)
    write_results(options, rows)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", choices=("sd15", "sdxl"), default="sd15")
    parser.add_argument("--models", type=Path, help="made there when it is empty")
    parser.add_argument("--scratch", type=Path, help="default: /dev/shm or a temporary folder")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=min(os.cpu_count() or 1, 8))
    parser.add_argument("--device", default="cpu", help="of our side: cpu or cuda")
    parser.add_argument("--lora", action="store_true", help="merge an LCM-LoRA instead")
    parser.add_argument("--out", type=Path, help="JSON with every number")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.models = (options.models or ROOT / "outputs" / "bench" / options.arch).resolve()
    return options


def prepare(options: argparse.Namespace) -> None:
    if not (options.models / "lora.safetensors").is_file():
        script = ROOT / "scripts" / "make_synthetic.py"
        command = [sys.executable, script, options.models, "--arch", options.arch]
        subprocess.run([str(word) for word in command], check=True)
    if options.scratch is None:
        needed = 2.2 * (options.models / "target" / WEIGHTS).stat().st_size
        shm = Path("/dev/shm")
        fits = shm.is_dir() and shutil.disk_usage(shm).free > needed
        options.scratch = Path(tempfile.mkdtemp(prefix="merge-bench-", dir=shm if fits else None))
    options.scratch.mkdir(parents=True, exist_ok=True)
    for path in inputs(options):
        with path.open("rb", buffering=0) as file:
            while file.read(16 * CHUNK_BYTES):
                pass


def inputs(options: argparse.Namespace) -> list[Path]:
    if options.lora:
        return [options.models / "target" / WEIGHTS, options.models / "lora.safetensors"]
    return [options.models / name / WEIGHTS for name in MODELS]


def choose_sides(options: argparse.Namespace) -> list[str]:
    if options.lora:
        return ["matmul", "stage", "command", "floor"]
    size = sum(path.stat().st_size for path in inputs(options))
    # Its inputs, its result, and the result once more in the output file on tmpfs.
    needed, available = size / 3 * 5, _available_bytes()
    if available < needed:
        print(
            f"naive is skipped: it needs {needed / 1e9:.0f} GB of memory and "
            f"{available / 1e9:.0f} GB are available",
            file=sys.stderr,
        )
        return ["stage", "command", "floor"]
    return ["naive", "stage", "command", "floor"]


def _available_bytes() -> int:
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    lines = meminfo.read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


def write_recipe(options: argparse.Namespace) -> Path:
    models: dict[str, Any] = {"target": str(options.models / "target"), "base": None}
    models["distilled"] = str(options.models / "lora.safetensors")
    if not options.lora:
        models |= {name: str(options.models / name) for name in MODELS}
    path: Path = options.scratch / "recipe.yaml"
    # JSON is YAML.
    path.write_text(json.dumps({"name": "bench", "models": models}))
    return path


def measure(side: str, options: argparse.Namespace) -> dict[str, Any]:
    """Run one side in a process of its own and return its seconds and memory."""
    (options.scratch / "out.safetensors").unlink(missing_ok=True)
    shutil.rmtree(options.scratch / "out", ignore_errors=True)
    row = run_child(side, options)
    if side == "command":
        row["stages"] = json.loads((options.scratch / "out" / "run.json").read_text())["seconds"]
        row["stage_s"] = row["stages"]["merge"]
    return row


def run_child(side: str, options: argparse.Namespace) -> dict[str, Any]:
    """Run a side and return what it prints, its wall and CPU seconds and its peak memory."""
    common = ["--threads", options.threads, "--device", options.device]
    if side == "command":
        command = [sys.executable, "-m", "merge", "run", write_recipe(options)]
        command += ["--out", options.scratch / "out", "--no-verify", "-q", *common]
    else:
        write_recipe(options)
        command = [sys.executable, __file__, "--child", side, "--arch", options.arch, *common]
        command += ["--models", options.models, "--scratch", options.scratch]
        command += ["--lora"] if options.lora else []
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    started = time.perf_counter()
    child = subprocess.Popen(
        [str(word) for word in command], stdout=subprocess.PIPE, env=environment
    )
    assert child.stdout is not None
    output = child.stdout.read()
    _, status, usage = os.wait4(child.pid, 0)
    wall = time.perf_counter() - started
    if status:
        raise SystemExit(f"{side} failed")
    row: dict[str, Any] = {
        "process_s": wall,
        "cpu_s": usage.ru_utime + usage.ru_stime,
        # macOS counts bytes, Linux kibibytes.
        "peak_mb": usage.ru_maxrss / 1e6 * (1 if sys.platform == "darwin" else 1024),
    }
    return row if side == "command" else row | json.loads(output)


# The sides, each run by --child ----------------------------------------------------------------


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
    "compare": run_compare,
}


# Tables ----------------------------------------------------------------------------------------


def print_tables(rows: dict[str, list[dict[str, Any]]]) -> None:
    print(f"{'side':<9}{'stage s':>9}{'min':>8}{'max':>8}{'process s':>11}{'cpu s':>8}{'MB':>7}")
    for side, runs in rows.items():
        stage = [run["stage_s"] for run in runs]
        print(
            f"{side:<9}{statistics.median(stage):>9.2f}{min(stage):>8.2f}{max(stage):>8.2f}"
            f"{median(runs, 'process_s'):>11.2f}{median(runs, 'cpu_s'):>8.2f}"
            f"{median(runs, 'peak_mb'):>7.0f}"
        )
    stages = {
        name: statistics.median(run["stages"][name] for run in rows["command"])
        for name in rows["command"][0]["stages"]
    }
    print("\nthe command's stages, median s")
    print("".join(f"{name:>17}" for name in stages))
    print("".join(f"{value:>17.2f}" for value in stages.values()))
    print()
    for name, values, aim in ratios(rows):
        shown = ", ".join(f"{value:.2f}" for value in values)
        print(f"{name:<34}{statistics.median(values):>7.2f}   ({shown}){aim}")


def median(runs: list[dict[str, Any]], name: str) -> float:
    return statistics.median(run[name] for run in runs)


def ratios(rows: dict[str, list[dict[str, Any]]]) -> list[tuple[str, list[float], str]]:
    def pairs(one: str, two: str, name: str) -> list[float]:
        return [a[name] / b[name] for a, b in zip(rows[one], rows[two], strict=True)]

    found = []
    if "naive" in rows:
        found.append(("naive / stage", pairs("naive", "stage", "stage_s"), "  aim: at least 4"))
        whole = pairs("naive", "command", "process_s")
        found.append(("naive / command, whole processes", whole, "  aim: at least 2"))
    if "matmul" in rows:
        found.append(("stage / matmul", pairs("stage", "matmul", "stage_s"), ""))
    found.append(("stage / floor", pairs("stage", "floor", "stage_s"), ""))
    peaks = [run["peak_mb"] for run in rows["command"]]
    found.append(("peak memory of the command, MB", peaks, f"  aim: under {PEAK_LIMIT_MB}"))
    return found


def write_results(options: argparse.Namespace, rows: dict[str, list[dict[str, Any]]]) -> None:
    import torch

    name = f"merge-{options.arch}{'-lora' if options.lora else ''}"
    name += "" if options.device == "cpu" else f"-{options.device.split(':')[0]}"
    path = options.out or ROOT / "scripts" / "bench" / "results" / f"{name}.json"
    processor = platform.processor() or platform.machine()
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next(
        (line.split(": ")[1] for line in lines if line.startswith("model name")), processor
    )
    tree = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": {"cpu": model, "cores": os.cpu_count(), "torch": torch.__version__},
        "settings": {
            "arch": options.arch,
            "lora": options.lora,
            "threads": options.threads,
            "device": options.device,
            "output_on": "tmpfs" if str(options.scratch).startswith("/dev/shm") else "disk",
        },
        "ratios": {name: [round(v, 3) for v in values] for name, values, _ in ratios(rows)},
        "runs": rows,
    }
    if options.device != "cpu":
        tree["machine"]["gpu"] = torch.cuda.get_device_name()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(tree, indent=2) + "\n")
    shutil.rmtree(options.scratch, ignore_errors=True)


if __name__ == "__main__":
    main()
