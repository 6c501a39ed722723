"""run.json: how a run went. Not part of the reproducible set."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from merge._version import __version__
from merge.plan.model import MergePlan
from merge.records.environment import platform_words
from merge.sources.card import stated_locally
from merge.sources.model import Sources

_PACKAGES = ("torch", "diffusers", "transformers", "safetensors", "huggingface_hub", "numpy")


def run_record(
    plan: MergePlan, seconds: Mapping[str, float], device: str, workers: int
) -> dict[str, Any]:
    """Return device, versions, times, speed and peak memory as plain values.

    Args:
        plan: What was done.
        seconds: Stage to wall time; `merge` must be there.
        device: Where it merged, in words.
        workers: How many threads did.
    """
    merge_s = seconds["merge"]
    around = plan.copy_bytes + plan.single_file_bytes
    moved = plan.read_bytes + plan.write_bytes - 2 * around
    return {
        "schema_version": 1,
        "tool_version": __version__,
        "device": device,
        "threads": workers,
        "seconds": {stage: round(value, 3) for stage, value in seconds.items()},
        "merge_bytes_per_s": round(moved / merge_s) if merge_s else None,
        "peak_rss_bytes": _peak_rss_bytes(),
        "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "python": platform.python_version(),
        "platform": platform_words(),
    }


def local_inputs(sources: Sources, folder: Path) -> dict[str, str]:
    """Return role to the path of each local model as seen from the output folder.

    A lock names local models without their paths; this is where `reproduce` looks first. A path
    that goes through somebody's home folder is left out: outputs get published.
    """
    found = {}
    for model in sources.models:
        if model.repo is None:
            path = model.root if model.is_folder else model.main_files[0].path
            relative = Path(os.path.relpath(path.absolute(), folder.absolute())).as_posix()
            is_private = {"home", "Users", "root", Path.home().name} & set(relative.split("/"))
            # A name of other bytes than UTF-8 cannot be written down as JSON.
            is_text = relative.encode(errors="ignore").decode() == relative
            if is_text and not is_private:
                found[model.role] = relative
    return found


def local_licences(sources: Sources) -> dict[str, str]:
    """Return role to the licence that a local model's own card, or its metadata, states."""
    stated = {model.role: stated_locally(model) for model in sources.models if model.repo is None}
    return {role: licence for role, licence in stated.items() if licence}


def _peak_rss_bytes() -> int:
    """Return the largest memory that this process held so far."""
    status = Path("/proc/self/status")
    if status.exists():
        # getrusage would count what the parent held when it forked.
        lines = status.read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
