"""Facts about this machine for bug reports, without importing torch here."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess

from merge._version import __version__
from merge.background.child import child_command

_PACKAGES = (
    "torch",
    "diffusers",
    "transformers",
    "safetensors",
    "huggingface_hub",
    "omegaconf",
    "numpy",
    "pillow",
)
_PROBE = """
import torch
from merge.engine.fused import load_library
print("torch alone" if load_library() is None else "one pass, compiled")
if torch.cuda.is_available():
    count = torch.cuda.device_count()
    print(", ".join(f"cuda:{i} {torch.cuda.get_device_name(i)}" for i in range(count)))
elif torch.backends.mps.is_available():
    print("mps")
else:
    print("cpu only")
"""


def platform_words() -> str:
    """Return system, release and machine; `platform.platform()` starts a program to find out."""
    return f"{platform.system()} {platform.release()} {platform.machine()}"


def describe_environment() -> dict[str, str]:
    """Return name to value: versions, devices, cache and offline settings; no tokens."""
    from huggingface_hub import constants

    facts = {
        "instruct-merge": __version__,
        "python": platform.python_version(),
        "platform": platform_words(),
        "cores": str(os.cpu_count()),
    }
    for package in _PACKAGES:
        try:
            facts[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            facts[package] = "not installed"
    facts["merges on the CPU"], facts["devices"] = _probe_torch()
    facts["hub cache"] = constants.HF_HUB_CACHE
    facts["hub endpoint"] = constants.ENDPOINT
    facts["hub offline"] = str(bool(constants.HF_HUB_OFFLINE)).lower()
    return facts


def _probe_torch() -> tuple[str, str]:
    """Return how sums are made, and the devices."""
    # A driver that hangs must not hang a bug report.
    try:
        child = subprocess.run(child_command(_PROBE), capture_output=True, text=True, timeout=60)
    except subprocess.TimeoutExpired:
        return "unknown", "torch did not answer within 60 s"
    if child.returncode:
        lines = child.stderr.strip().splitlines()
        return "unknown", f"torch does not load: {lines[-1] if lines else child.returncode}"
    sums, _, devices = child.stdout.strip().partition("\n")
    return sums, devices
