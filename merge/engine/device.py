"""Which device merges, and how its failures are named."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from merge.errors import DeviceError, DeviceMemoryError, MergeError

_DEVICE = re.compile(r"auto|cpu|cuda(:\d+)?")

# Of errors that have no class of their own: of CUDA, of torch's allocator, of Python's threads.
_MEMORY_WORDS = ("out of memory", "can't allocate memory", "can't start new thread")


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


@functools.cache
def device_stream(device: torch.device, number: int) -> torch.cuda.Stream:
    """Return the stream of a worker: the same one in every merge of this process.

    cuBLAS keeps a workspace for each stream, 32 MiB on recent cards, for as long as the process
    lives. A new stream for every merge would take a gibibyte in the end.

    Args:
        device: A CUDA device.
        number: Of the worker.
    """
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def device_words(device: torch.device) -> str:
    """Return the device's name for run records, e.g. `cuda:0 (NVIDIA H200)`."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return str(device)


@contextmanager
def single_threaded() -> Iterator[None]:
    """Let torch's operators use one thread, whose sums do not depend on the machine.

    Where workers or a process that hashes keep the cores busy, torch's own threads compete with
    them: they wait for each other actively, which took 2 s of CPU time from a merge of 5 s.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def device_errors(device: torch.device) -> Iterator[None]:
    """Name the failures of a device.

    Raises:
        DeviceMemoryError: it, or the machine, has too little memory.
        DeviceError: it failed otherwise.
    """
    try:
        yield
    except MergeError:
        raise
    except (RuntimeError, MemoryError) as error:
        is_memory = isinstance(error, torch.OutOfMemoryError | MemoryError) or any(
            words in str(error) for words in _MEMORY_WORDS
        )
        if is_memory and device.type == "cuda":
            raise DeviceMemoryError(
                f"{device} is out of memory: {error}",
                hint="--threads 1 takes less of it, --device auto goes on on the CPU, and "
                "--device cpu needs none: the bytes are the same",
            ) from error
        if is_memory:
            raise DeviceMemoryError(
                f"the machine gives no more memory or threads: {str(error) or 'out of memory'}",
                hint="each worker takes some: try --threads 1",
            ) from error
        hint = "try --device cpu; the bytes are the same" if device.type == "cuda" else ""
        raise DeviceError(f"{device} failed: {error}", hint=hint) from error
