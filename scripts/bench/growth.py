"""How a merge's cost grows: with the models' size, with the number of tensors, of LoRAs.

    python scripts/bench/growth.py                    # writes results/growth.json
    python scripts/bench/plot.py                      # draws it

Each point is a process of its own: it plans from headers, then merges without hashes, with inputs
in the page cache and the output on tmpfs. Beyond what a cache holds, inputs are sparse files that
no cache has: every byte is a page that the kernel makes anew, with no disk below it. The smallest
of three runs counts, since all that can disturb makes it slower.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
# Python puts this script's folder first, where `merge` would be another script.
sys.path[0] = str(ROOT)
# This folder's own modules.
sys.path.insert(1, str(Path(__file__).resolve().parent))

import machine  # noqa: E402
import numpy as np  # noqa: E402
from sides import PREVIOUS, WEIGHTS, merge_stage  # noqa: E402

from merge.header.encode import encode_header  # noqa: E402

SIZES_GB = (0.1, 0.3, 1.0, 2.0, 3.0)
SPARSE_SIZES_GB = (0.1, 1.0, 2.5, 5.0, 7.5, 10.0)
TENSORS = (10, 100, 1000, 5000, 20_000)
LORAS = (1, 2, 4, 8)
COLUMNS = 1024
RANK = 32


def main() -> None:
    options = parse_options()
    if options.child is not None:
        print(json.dumps(run_point(options.child, options.threads)))
        return
    points: dict[str, list[dict[str, Any]]] = {"size": [], "sparse": [], "tensors": [], "loras": []}
    for size in SIZES_GB:
        points["size"].append(measure(options, {"gigabytes": size, "tensors": 200}))
    for size in SPARSE_SIZES_GB:
        point = {"gigabytes": size, "tensors": 200, "sparse": True}
        points["sparse"].append(measure(options, point))
    for count in TENSORS:
        points["tensors"].append(measure(options, {"gigabytes": 0.2, "tensors": count}))
    for count in LORAS:
        points["loras"].append(measure(options, {"gigabytes": 0.5, "tensors": 200, "loras": count}))
    facts = {**machine.machine_facts(), "threads": options.threads}
    machine.write_results("growth", {"machine": facts, "points": points})


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=min(os.cpu_count() or 1, 8))
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def measure(options: argparse.Namespace, point: dict[str, Any]) -> dict[str, Any]:
    """Make the models of a point, merge them some times, and remove them."""
    size = point["gigabytes"] * 1e9
    with (
        tempfile.TemporaryDirectory(dir=ROOT / "outputs") as name,
        machine.scratch_folder(size, within=0.5) as scratch,
    ):
        folder = Path(name)
        write_models(folder, **point)
        recipe(folder, scratch, point.get("loras", 0))
        words = [sys.executable, __file__, "--threads", str(options.threads)]
        rows = []
        for _ in range(options.runs):
            if point.get("sparse"):
                drop_from_cache(folder)
            rows.append(json.loads(subprocess.check_output([*words, "--child", str(scratch)])))
    best = {name: min(row[name] for row in rows) for name in rows[0]}
    print(point, {name: round(value, 3) for name, value in best.items()}, file=sys.stderr)
    return point | best


def recipe(folder: Path, scratch: Path, loras: int) -> None:
    models: dict[str, Any] = {"target": str(folder / "target")}
    if loras:
        models["distilled"] = [{"path": str(folder / f"lora{i}.safetensors")} for i in range(loras)]
    else:
        models |= {"base": str(folder / "base"), "distilled": str(folder / "distilled")}
    (scratch / "recipe.yaml").write_text(json.dumps({"name": "growth", "models": models}))


def drop_from_cache(folder: Path) -> None:
    """Let the kernel forget the models' pages."""
    for path in folder.rglob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def write_models(
    folder: Path, gigabytes: float, tensors: int, loras: int = 0, sparse: bool = False
) -> None:
    """Write models of `(rows, 1024)` float16 weights, and a first layer."""
    rows = max(1, int(gigabytes * 1e9 / 2 / COLUMNS / tensors))
    shapes = {f"mid_block.part{index}.weight": (rows, COLUMNS) for index in range(tensors)}
    rng = None if sparse else np.random.default_rng(0)
    first = {"conv_in.weight": (8, 4, 3, 3)}
    write_file(folder / "target" / WEIGHTS, {**shapes, "conv_in.weight": (8, 8, 3, 3)}, rng)
    config = {"_class_name": "UNet2DConditionModel", "in_channels": 8}
    (folder / "target" / "config.json").write_text(json.dumps(config))
    if not loras:
        write_file(folder / "distilled" / WEIGHTS, {**shapes, **first}, rng)
        write_file(folder / "base" / WEIGHTS, {**shapes, **first}, rng)
    for index in range(loras):
        factors: dict[str, tuple[int, ...]] = {}
        for key, (out, inner) in shapes.items():
            stem = f"unet.{key.removesuffix('.weight')}"
            factors[f"{stem}.lora_A.weight"] = (RANK, inner)
            factors[f"{stem}.lora_B.weight"] = (out, RANK)
        write_file(folder / f"lora{index}.safetensors", factors, rng)


def write_file(
    path: Path, shapes: Mapping[str, tuple[int, ...]], rng: np.random.Generator | None
) -> None:
    """Write a file of random values, or of zeros that take no room on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    header, parsed = encode_header({key: ("F16", shape) for key, shape in shapes.items()}, {})
    if rng is None:
        path.write_bytes(header)
        os.truncate(path, parsed.file_bytes)
        return
    block = (rng.standard_normal(4 * 2**20) * 0.02).astype(np.float16).tobytes()
    with path.open("wb") as file:
        file.write(header)
        left = parsed.file_bytes - len(header)
        while left:
            left -= file.write(block[: min(left, len(block))])


def run_point(scratch: Path, threads: int) -> dict[str, float]:
    """Plan and merge once; return seconds and memory."""
    row = merge_stage(scratch, threads, "cpu")
    # The next run frees it when it starts; until then no host takes the memory back.
    (scratch / "out.safetensors").replace(scratch / PREVIOUS)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    return {
        "plan_s": row["plan_s"],
        "merge_s": row["stage_s"],
        "merge_cpu_s": row["stage_cpu_s"],
        "peak_mb": peak,
    }


if __name__ == "__main__":
    main()
