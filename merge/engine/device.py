"""Which device merges."""

from __future__ import annotations

import re

import torch

from merge.errors import DeviceError

_DEVICE = re.compile(r"auto|cpu|cuda(:\d+)?")


def choose_device(name: str) -> torch.device:
    """Return the device that a name stands for.

    Args:
        name: `auto`, `cpu`, `cuda` or `cuda:N`. `auto` takes CUDA when there is any.

    Raises:
        DeviceError: there is no such device here.
    """
    if not _DEVICE.fullmatch(name):
        raise DeviceError(f"{name!r} is no device", hint="use auto, cpu, cuda or cuda:N")
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise DeviceError(
            "there is no CUDA device here, or this torch is built without CUDA",
            hint="use --device cpu: a merge gives the same bytes on every device",
        )
    device = torch.device("cuda" if name == "auto" else name)
    index = torch.cuda.current_device() if device.index is None else device.index
    if index >= torch.cuda.device_count():
        raise DeviceError(
            f"there is no {device}: this machine has {torch.cuda.device_count()} CUDA device(s)"
        )
    return torch.device("cuda", index)


def device_words(device: torch.device) -> str:
    """Return the device's name for run records, e.g. `cuda:0 (NVIDIA H200)`."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return str(device)
