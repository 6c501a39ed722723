"""Files of gigabytes: offsets beyond 32 bits, and memory that does not depend on their size."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from merge.header.encode import encode_header
from merge.reader.checkpoint import read_header

WEIGHTS = "diffusion_pytorch_model.safetensors"
GB = 10**9
TENSORS = 4
ROLES = {"base": 1.0, "distilled": 1.5, "target": 4.0}
# Where values other than zero are, from the start of a tensor: its ends, and around 2 and 4 GiB.
PLACES = (0, 2**31 - 2, 2**31, 2**32 - 2, 2**32, -2)

pytestmark = pytest.mark.slow


def write_model(folder: Path, value: float, total_bytes: int) -> Path:
    """Write a UNet of four tensors, zero but in a few places, as a file with holes."""
    folder.mkdir(parents=True)
    # The last is larger than 4 GiB when all are ten gigabytes.
    shares = [0.1, 0.1, 0.3, 0.5]
    tensors = {
        f"mid_block.large{index}.weight": ("F16", (int(total_bytes * share / 2 / 1000), 1000))
        for index, share in enumerate(shares)
    }
    channels = 8 if "target" in folder.parts else 4
    tensors["conv_in.weight"] = ("F16", (8, channels, 3, 3))
    header, parsed = encode_header(tensors, {"format": "pt"})
    path = folder / WEIGHTS
    path.write_bytes(header)
    os.truncate(path, parsed.file_bytes)
    with path.open("r+b") as file:
        for spec in parsed.tensors:
            for place in places(spec.size_bytes):
                file.seek(spec.start + place)
                file.write(np.float16(value).tobytes())
    (folder / "config.json").write_text(json.dumps({"in_channels": channels}))
    return path


def places(size: int) -> list[int]:
    return [place % size for place in PLACES if place < size]


def run(folder: Path, total_bytes: int) -> tuple[int, Path]:
    """Merge models of a size; return the peak memory of the run's processes, and the weights."""
    folder.mkdir()
    for role, value in ROLES.items():
        write_model(folder / role, value, total_bytes)
    models = {role: f"./{role}" for role in ROLES}
    (folder / "large.yaml").write_text(json.dumps({"name": "large", "models": models}))
    words = ["run", str(folder / "large.yaml"), "--no-verify", "--threads", "2", "--device", "cpu"]
    command = [sys.executable, "-m", "merge", *words, "--out", str(folder / "out")]
    peaks: dict[int, int] = {}
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as child:
        while child.poll() is None:
            for process in (child.pid, *children_of(child.pid)):
                peaks[process] = max(peaks.get(process, 0), peak_of(process))
            time.sleep(0.01)
        assert child.stderr is not None
        assert child.returncode == 0, child.stderr.read()
    return sum(peaks.values()), folder / "out" / "unet" / WEIGHTS


def children_of(process: int) -> list[int]:
    try:
        text = Path(f"/proc/{process}/task/{process}/children").read_text()
    except OSError:
        return []
    return [int(word) for word in text.split()]


def peak_of(process: int) -> int:
    """Return the largest memory that a process held so far, in bytes."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_memory_is_the_same_for_one_and_for_ten_gigabytes(tmp_path: Path) -> None:
    if shutil.disk_usage(tmp_path).free < 13 * GB:
        pytest.skip("needs 13 GB of disk")
    small, _ = run(tmp_path / "small", GB)
    shutil.rmtree(tmp_path / "small")
    large, path = run(tmp_path / "large", 10 * GB)
    print(f"\npeak memory: {small / 1e6:.1f} MB for 1 GB, {large / 1e6:.1f} MB for 10 GB")
    assert abs(large - small) < 10 * 2**20
    header = read_header(path).header
    assert header.file_bytes == path.stat().st_size > 2**33
    assert max(spec.size_bytes for spec in header.tensors) > 2**32
    expected = np.float16(ROLES["target"] + (ROLES["distilled"] - ROLES["base"]))
    with path.open("rb") as file:
        for spec in header.tensors:
            if spec.name == "conv_in.weight":
                continue
            around = {
                offset
                for place in places(spec.size_bytes)
                for offset in (place - 2, place, place + 2)
                if 0 <= offset < spec.size_bytes
            }
            for offset in around:
                file.seek(spec.start + offset)
                value = np.frombuffer(file.read(2), np.float16)[0]
                assert value == (expected if offset in places(spec.size_bytes) else 0)


def test_a_component_of_more_than_two_gigabytes_is_copied_whole(tmp_path: Path) -> None:
    if shutil.disk_usage(tmp_path).free < 4 * GB:
        pytest.skip("needs 4 GB of disk")
    target = tmp_path / "target"
    for role in ("base", "distilled"):
        write_model(tmp_path / role, ROLES[role], 10**6)
    write_model(target / "unet", ROLES["target"], 10**6)
    vae = write_model(target / "vae", 2.0, 5 * GB // 2)
    index = {
        "_class_name": "StableDiffusionInstructPix2PixPipeline",
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (target / "model_index.json").write_text(json.dumps(index))
    models = {role: f"./{role}" for role in ROLES}
    (tmp_path / "large.yaml").write_text(json.dumps({"name": "large", "models": models}))
    words = ["run", str(tmp_path / "large.yaml"), "--no-verify", "--out", str(tmp_path / "out")]
    subprocess.run([sys.executable, "-m", "merge", *words], check=True)
    copy = tmp_path / "out" / "vae" / WEIGHTS
    assert copy.stat().st_size == vae.stat().st_size > 2**31
    subprocess.run(["cmp", str(copy), str(vae)], check=True)
