"""Time a full-size merge against what a user would otherwise write, and against a plain copy.

    python scripts/bench/merge.py                     # SD1.5-size, full delta, three pairs
    python scripts/bench/merge.py --arch sdxl --pairs 2
    python scripts/bench/merge.py --lora
    python scripts/bench/merge.py --dtype float32 --cache cold
    python scripts/bench/merge.py --rivals            # after rivals.py --setup

Sides, each in a fresh process, in turn, with every input in the page cache:

* naive: load_file of the three UNets, the float32 formula, save_file (full delta only; skipped
  where memory is too small for it);
* matmul: the float64 products up @ down of a LoRA alone, by as many threads (LoRA only);
* stage: our merge alone, reading, adding and writing, without hashes;
* command: `instruct-merge run` as a user starts it, with start-up, SHA-256 of inputs and output,
  and fsync; one column for each of its stages;
* floor: the same bytes read and written by as many threads with nothing in between;
* fuse: diffusers' fuse_lora of the pipeline and save_pretrained of its UNet (LoRA only);
* mergekit, sd-mecha: with --rivals, their own commands in environments of their own.

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
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
# Python puts this script's folder first, where `merge` would be this script.
sys.path[0] = str(ROOT)
# This folder's own modules.
sys.path.insert(1, str(Path(__file__).resolve().parent))

import rivals  # noqa: E402
from sides import CHILDREN, CHUNK_BYTES, MODELS, WEIGHTS, inputs  # noqa: E402

PEAK_LIMIT_MB = 450


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
    parser.add_argument("--dtype", choices=("float16", "bfloat16", "float32"), default="float16")
    parser.add_argument("--cache", choices=("warm", "cold"), default="warm", help="of the inputs")
    parser.add_argument("--rivals", action="store_true", help="run the other tools, too")
    parser.add_argument("--models", type=Path, help="made there when it is empty")
    parser.add_argument("--scratch", type=Path, help="default: /dev/shm or a temporary folder")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=min(os.cpu_count() or 1, 8))
    parser.add_argument("--device", default="cpu", help="of our side: cpu or cuda")
    parser.add_argument("--lora", action="store_true", help="merge an LCM-LoRA instead")
    parser.add_argument("--out", type=Path, help="JSON with every number")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    name = options.arch + ("" if options.dtype == "float16" else f"-{options.dtype}")
    options.models = (options.models or ROOT / "outputs" / "bench" / name).resolve()
    return options


def prepare(options: argparse.Namespace) -> None:
    if not (options.models / "lora.safetensors").is_file():
        script = ROOT / "scripts" / "make_synthetic.py"
        command = [sys.executable, script, options.models, "--arch", options.arch]
        command += ["--dtype", options.dtype]
        subprocess.run([str(word) for word in command], check=True)
    if options.scratch is None:
        needed = 2.2 * (options.models / "target" / WEIGHTS).stat().st_size
        shm = Path("/dev/shm")
        fits = shm.is_dir() and shutil.disk_usage(shm).free > needed
        options.scratch = Path(tempfile.mkdtemp(prefix="merge-bench-", dir=shm if fits else None))
    options.scratch.mkdir(parents=True, exist_ok=True)


def set_cache(options: argparse.Namespace) -> None:
    """Bring the inputs into the page cache, or out of it."""
    for path in inputs(options):
        with path.open("rb", buffering=0) as file:
            if options.cache == "cold":
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                continue
            while file.read(16 * CHUNK_BYTES):
                pass


def choose_sides(options: argparse.Namespace) -> list[str]:
    others = [name for name in rivals.RIVALS if options.rivals and rivals.is_there(name)]
    if options.lora:
        return ["fuse", "matmul", "stage", "command", "floor"]
    size = sum(path.stat().st_size for path in inputs(options))
    # Its inputs, its result, and the result once more in the output file on tmpfs.
    needed, available = size / 3 * 5, _available_bytes()
    if available < needed:
        print(
            f"naive is skipped: it needs {needed / 1e9:.0f} GB of memory and "
            f"{available / 1e9:.0f} GB are available",
            file=sys.stderr,
        )
        return [*others, "stage", "command", "floor"]
    return ["naive", *others, "stage", "command", "floor"]


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
    for name in ("out.safetensors", "mecha.safetensors"):
        (options.scratch / name).unlink(missing_ok=True)
    for name in ("out", "mergekit", "fuse"):
        shutil.rmtree(options.scratch / name, ignore_errors=True)
    set_cache(options)
    row = run_child(side, options)
    row["written_bytes"] = sum(
        path.stat().st_size
        for path in options.scratch.rglob("*.safetensors")
        if path.name != "reference.safetensors"
    )
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
    elif side in rivals.RIVALS:
        command = rivals.command(side, options.models, options.scratch, options.threads)
    else:
        write_recipe(options)
        command = [sys.executable, __file__, "--child", side, "--arch", options.arch, *common]
        command += ["--models", options.models, "--scratch", options.scratch]
        command += ["--lora"] if options.lora else []
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    if side in rivals.RIVALS:
        environment.pop("PYTHONPATH")
    started = time.perf_counter()
    child = subprocess.Popen(
        [str(word) for word in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL if side in rivals.RIVALS else None,
        env=environment,
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
    if side in rivals.RIVALS:
        return row | {"stage_s": wall}
    return row if side == "command" else row | json.loads(output)


# Tables ----------------------------------------------------------------------------------------


def print_tables(rows: dict[str, list[dict[str, Any]]]) -> None:
    print(
        f"{'side':<9}{'stage s':>9}{'min':>8}{'max':>8}{'process s':>11}{'cpu s':>8}{'MB':>7}"
        f"{'GB written':>12}"
    )
    for side, runs in rows.items():
        stage = [run["stage_s"] for run in runs]
        print(
            f"{side:<9}{statistics.median(stage):>9.2f}{min(stage):>8.2f}{max(stage):>8.2f}"
            f"{median(runs, 'process_s'):>11.2f}{median(runs, 'cpu_s'):>8.2f}"
            f"{median(runs, 'peak_mb'):>7.0f}{median(runs, 'written_bytes') / 1e9:>12.2f}"
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
    for rival in rivals.RIVALS:
        if rival in rows:
            faster = [
                a["process_s"] / b["stage_s"]
                for a, b in zip(rows[rival], rows["stage"], strict=True)
            ]
            aim = {"mergekit": (6, 2), "sd-mecha": (10, 4)}[rival]
            found.append((f"{rival} / stage", faster, f"  aim: at least {aim[0]}"))
            whole = pairs(rival, "command", "process_s")
            found.append((f"{rival} / command", whole, f"  aim: at least {aim[1]}"))
    if "fuse" in rows:
        found.append(("fuse / command", pairs("fuse", "command", "process_s"), ""))
    if "matmul" in rows:
        found.append(("stage / matmul", pairs("stage", "matmul", "stage_s"), ""))
    found.append(("stage / floor", pairs("stage", "floor", "stage_s"), ""))
    peaks = [run["peak_mb"] for run in rows["command"]]
    found.append(("peak memory of the command, MB", peaks, f"  aim: under {PEAK_LIMIT_MB}"))
    return found


def write_results(options: argparse.Namespace, rows: dict[str, list[dict[str, Any]]]) -> None:
    import torch

    name = f"merge-{options.arch}{'-lora' if options.lora else ''}"
    name += "" if options.dtype == "float16" else f"-{options.dtype}"
    name += "" if options.cache == "warm" else "-cold"
    name += "-rivals" if options.rivals else ""
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
            "dtype": options.dtype,
            "cache": options.cache,
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
