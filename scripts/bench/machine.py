"""Which machine a result is from, and how results are kept."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
RESULTS = ROOT / "scripts" / "bench" / "results"


def cpu_name() -> str:
    """Return the processor's name, as the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    named = (line.split(": ")[1] for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def machine_facts(device: str = "cpu", packages: tuple[str, ...] = ("torch",)) -> dict[str, Any]:
    """Return what a reader has to know of the machine."""
    facts: dict[str, Any] = {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9),
        **{package: importlib.metadata.version(package) for package in packages},
    }
    if device != "cpu":
        import torch

        facts["gpu"] = torch.cuda.get_device_name(device)
    return facts


def available_bytes() -> int:
    """Return the memory that can be had without swapping."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    lines = meminfo.read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


def write_results(name: str, tree: Mapping[str, Any], path: Path | None = None) -> None:
    """Write a benchmark's numbers, floats with four significant digits, as `results/NAME.json`."""
    path = path or RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"date": today(), **_rounded(tree)}, indent=2) + "\n")


def today() -> str:
    """Return the date in UTC, as `2026-01-31`."""
    return datetime.datetime.now(datetime.UTC).date().isoformat()


def _rounded(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _rounded(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


@contextmanager
def scratch_folder(
    needed_bytes: float, *, cached_bytes: float = 0, within: float = 1.0
) -> Iterator[Path]:
    """Give a folder on tmpfs if so much fits there and into memory, else on the disk.

    Args:
        needed_bytes: What will be written.
        cached_bytes: What has to stay in the page cache beside it.
        within: How much of the available memory both may take.
    """
    shm = Path("/dev/shm")
    fits = shm.is_dir() and shutil.disk_usage(shm).free > needed_bytes
    fits = fits and available_bytes() * within > needed_bytes + cached_bytes
    (ROOT / "outputs").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(
        prefix="merge-bench-", dir=shm if fits else ROOT / "outputs"
    ) as name:
        yield Path(name)
