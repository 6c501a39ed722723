"""Time the conversion of an SDXL-size model against `cp` of the same bytes on the same disk.

    python scripts/bench/convert.py                        # float16, 6.9 GB, three pairs
    python scripts/bench/convert.py --scratch /data/x --pairs 5

A folder with random weights in the published shapes becomes a single file, and that file a folder
again. Three sides for each direction, in turn, in swapped order from pair to pair, with the input
in the page cache and nothing left to write from before:

* convert: `instruct-merge convert` as a user starts it, with start-up, SHA-256 and fsync;
* durable: `cp`, then `sync` of what it wrote, which is what a converted file has been through;
* cp: `cp` alone, whose bytes may still be in memory when it ends.

Every tensor's SHA-256 is compared after the round trip. Needs three times the model's size.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
# Python puts this script's folder first, where `merge` would be another script.
sys.path[0] = str(ROOT)
# This folder's own modules.
sys.path.insert(1, str(Path(__file__).resolve().parent))

import machine  # noqa: E402

from merge.reader.checkpoint import FileReader, read_checkpoint  # noqa: E402

PEAK_LIMIT_MB = 450
TIME_LIMIT = 1.5
CHUNK_BYTES = 1024 * 1024
PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")
DIRECTIONS = ("to file", "to folder")
SIDES = ("convert", "durable", "cp")


def main() -> None:
    options = parse_options()
    if options.make is not None:
        make_pipeline(options.make, options.dtype)
        return
    scratch = Path(tempfile.mkdtemp(prefix="convert-", dir=options.scratch))
    try:
        rows = measure_all(scratch, options)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    print_table(rows)
    write_results(options, rows)
    check_limits(rows)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--dtype", choices=("float16", "bfloat16", "float32"), default="float16")
    parser.add_argument("--scratch", type=Path, help="folder on the disk to measure")
    parser.add_argument("--out", type=Path, help="JSON with every number")
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


# The model -------------------------------------------------------------------------------------


def make_pipeline(folder: Path, dtype: str) -> None:
    """Write a pipeline folder of SDXL's size: random weights, true names and shapes."""
    import diffusers
    import torch
    import transformers

    from scripts import make_synthetic, make_tiny

    sizes = {
        "text_encoder": ("CLIPTextModel", 768, 3072, 12, 12, 768),
        "text_encoder_2": ("CLIPTextModelWithProjection", 1280, 5120, 32, 20, 1280),
    }
    make_tiny.make_sdxl(folder / "tiny")
    (folder / "tiny" / "target").rename(folder / "in")
    shutil.rmtree(folder / "tiny")
    for part in PARTS:
        shutil.rmtree(folder / "in" / part)
    make_synthetic.make_synthetic(folder, "sdxl", dtype=dtype, only=("target",))
    (folder / "target").rename(folder / "in" / "unet")
    files = []
    with torch.device("meta"):
        vae = diffusers.AutoencoderKL(
            **{**make_tiny.VAE, "block_out_channels": (128, 256, 512, 512), "norm_num_groups": 32}
        )
        models = {"vae": vae}
        for part, (name, width, wide, layers, heads, projection) in sizes.items():
            config = transformers.CLIPTextConfig(
                hidden_size=width,
                intermediate_size=wide,
                num_hidden_layers=layers,
                num_attention_heads=heads,
                projection_dim=projection,
            )
            models[part] = getattr(transformers, name)(config)
    for part, model in models.items():
        is_text = part != "vae"
        shapes = {
            key
            if not is_text or key.startswith(("text_model.", "text_projection."))
            else f"text_model.{key}": tuple(value.shape)
            for key, value in model.state_dict().items()
        }
        name = "model" if is_text else "diffusion_pytorch_model"
        (folder / "in" / part).mkdir()
        config = model.config.to_json_string() if is_text else model.to_json_string()
        (folder / "in" / part / "config.json").write_text(config, encoding="utf-8")
        file = make_synthetic.TensorFile(
            folder / "in" / part / f"{name}.safetensors", shapes, dtype
        )

        def pieces(key: str, shape: Any, part: str = part) -> Iterator[Any]:
            return make_synthetic._base_pieces(f"{part}.{key}", shape, 0)

        files.append((file, shapes, pieces))
    make_synthetic._write_all(files)


def digests(folder: Path, part: str) -> dict[str, str]:
    """Return the SHA-256 of every tensor of a component."""
    paths = sorted((folder / part).glob("*.safetensors"))
    checkpoint = read_checkpoint(paths)
    found = {}
    for key, (index, spec) in checkpoint.tensors.items():
        digest = hashlib.sha256(f"{spec.dtype} {spec.shape}".encode())
        with FileReader(checkpoint.files[index].path) as reader:
            for start in range(0, spec.size_bytes, CHUNK_BYTES):
                count = min(CHUNK_BYTES, spec.size_bytes - start)
                digest.update(reader.read(spec.start + start, count))
        found[key] = digest.hexdigest()
    return found


# The sides -------------------------------------------------------------------------------------


def measure_all(scratch: Path, options: argparse.Namespace) -> dict[str, Any]:
    # In a process of its own, so that this one stays small: a child starts with its parent's peak.
    making = [sys.executable, __file__, "--make", str(scratch), "--dtype", options.dtype]
    subprocess.run(making, check=True)
    folder, single, back = scratch / "in", scratch / "one.safetensors", scratch / "back"
    rows: dict[str, Any] = {d: {side: [] for side in SIDES} for d in DIRECTIONS}
    rows["bytes"] = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    for pair in range(options.pairs):
        for direction in DIRECTIONS:
            source, out = (folder, single) if direction == "to file" else (single, back)
            # What convert wrote is kept to the end of the pair, so it comes last or first.
            for side in SIDES[:: 1 if pair % 2 else -1]:
                print(f"pair {pair + 1}/{options.pairs}: {direction}, {side}", file=sys.stderr)
                made = out if side == "convert" else scratch / "copy"
                rows[direction][side].append(run_side(side, source, made, folder))
                if side != "convert":
                    remove(made)
        if pair == 0:
            rows["tensors"] = {}
            for part in PARTS:
                before = digests(folder, part)
                if digests(back, part) != before:
                    raise SystemExit(f"{part}: the round trip changed a tensor")
                rows["tensors"][part] = len(before)
        remove(single)
        remove(back)
    return rows


def run_side(side: str, source: Path, out: Path, config: Path) -> dict[str, float]:
    """Run one side and return its seconds and, for ours, its peak memory."""
    os.sync()
    warm(source)
    command = ["cp", "-r", str(source), str(out)]
    if side == "convert":
        command = [sys.executable, "-m", "merge", "convert", "-q", str(source), str(out)]
        if source.is_file():
            command += ["--config", str(config)]
    started = time.perf_counter()
    child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"{' '.join(command)} failed")
    if side == "durable":
        files = [str(path) for path in (out, *out.rglob("*")) if path.is_file()]
        subprocess.run(["sync", *files], check=True)
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "peak_mb": usage.ru_maxrss * 1024 / 1e6}


def warm(source: Path) -> None:
    """Read files once, so that they are in the page cache as far as it is large enough."""
    buffer = bytearray(CHUNK_BYTES)
    for path in [source] if source.is_file() else source.rglob("*.safetensors"):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


# Tables ----------------------------------------------------------------------------------------


def ratios(rows: dict[str, Any], direction: str, side: str) -> list[float]:
    """Return our time over the other side's, pair by pair."""
    pairs = zip(rows[direction]["convert"], rows[direction][side], strict=True)
    return [ours["seconds"] / theirs["seconds"] for ours, theirs in pairs]


def peak_mb(rows: dict[str, Any]) -> float:
    return max(run["peak_mb"] for d in DIRECTIONS for run in rows[d]["convert"])


def print_table(rows: dict[str, Any]) -> None:
    print(f"{rows['bytes']:,} bytes; the same SHA-256 after the round trip:")
    print("  " + ", ".join(f"{part} {count} tensors" for part, count in rows["tensors"].items()))
    print(f"\n{'direction':<11}{'side':<9}{'s':>8}{'min':>8}{'max':>8}{'MB/s':>8}{'ratio':>8}")
    for direction in DIRECTIONS:
        for side in SIDES:
            times = [run["seconds"] for run in rows[direction][side]]
            middle = statistics.median(times)
            ratio = statistics.median(ratios(rows, direction, side))
            print(
                f"{direction:<11}{side:<9}{middle:>8.2f}{min(times):>8.2f}{max(times):>8.2f}"
                f"{rows['bytes'] / middle / 1e6:>8.0f}{ratio:>8.2f}"
            )
    print(f"\npeak memory {peak_mb(rows):.0f} MB, limit {PEAK_LIMIT_MB}")
    print(f"ratio: our time over that side's, median of the pairs; limit {TIME_LIMIT} against cp")


def check_limits(rows: dict[str, Any]) -> None:
    if peak_mb(rows) > PEAK_LIMIT_MB:
        raise SystemExit(f"peak memory is over {PEAK_LIMIT_MB} MB")
    for direction in DIRECTIONS:
        if statistics.median(ratios(rows, direction, "cp")) > TIME_LIMIT:
            raise SystemExit(f"{direction}: slower than {TIME_LIMIT} times cp")


def write_results(options: argparse.Namespace, rows: dict[str, Any]) -> None:
    tree = {
        "machine": machine.machine_facts(),
        "settings": {"arch": "sdxl", "dtype": options.dtype, "pairs": options.pairs},
        "bytes": rows["bytes"],
        "identical_tensors": rows["tensors"],
        "peak_mb": peak_mb(rows),
        "ratios": {
            f"{direction} / {side}": ratios(rows, direction, side)
            for direction in DIRECTIONS
            for side in SIDES[1:]
        },
        "runs": {
            f"{direction}, {side}": rows[direction][side]
            for direction in DIRECTIONS
            for side in SIDES
        },
    }
    machine.write_results("convert", tree, options.out)


if __name__ == "__main__":
    main()
