"""Devices that refuse memory: from the start, in the middle, or only the pinned kind of it."""

from __future__ import annotations

import logging
import multiprocessing
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import merge.engine
import merge.engine.buffers as buffers
import merge.run.merging as merging
from merge import load_recipe, run_recipe
from merge.engine import device_errors
from merge.engine.execute import execute_plan
from merge.engine.lane import Lane
from merge.errors import DeviceError, DeviceMemoryError
from tests.mini import contents, random_tensors, write_models, write_recipe, write_unet

CUDA = torch.device("cuda", 0)
REFUSALS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8.00 MiB"),
    RuntimeError("CUDA error: out of memory"),
]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    for seed, role in enumerate(("base", "distilled", "target")):
        tensors = random_tensors(seed, channels=8 if role == "target" else 4)
        for index in range(16):
            values = torch.full((64, 40 + index), 0.1 * (seed + 1) + 0.01 * index)
            tensors[f"mid_block.more{index}.weight"] = values.half()
        write_unet(tmp_path / role, tensors)
    write_recipe(tmp_path)
    return tmp_path


@pytest.fixture
def warnings() -> Iterator[list[str]]:
    """Collect what the package says at the level of warnings."""
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("merge").addHandler(handler)
    yield said
    logging.getLogger("merge").removeHandler(handler)


def run(place: Path, out: str, device: str) -> dict[str, bytes]:
    recipe = load_recipe(place / "mini.yaml")
    folder = run_recipe(recipe, place / out, device=device, threads=2, verify=False).folder
    return contents(folder)


class FakeGpu:
    """A CUDA device that computes on the CPU until its memory is full."""

    def __init__(self, patch: pytest.MonkeyPatch, refusal: BaseException, after: int) -> None:
        self.devices: list[str] = []
        self.left = after
        run_unit = Lane.run

        def run_until_full(lane: Lane, *arguments: Any) -> None:
            if self.devices[-1] == "cuda:0":
                if self.left == 0:
                    raise refusal
                self.left -= 1
            run_unit(lane, *arguments)

        def choose(name: str) -> torch.device:
            return torch.device("cpu") if name == "cpu" else CUDA

        def execute(*arguments: Any, device: torch.device, **options: Any) -> Any:
            self.devices.append(str(device))
            with device_errors(device):
                try:
                    return execute_plan(*arguments, device=torch.device("cpu"), **options)
                except DeviceError as error:
                    # Named for the CPU that stands in; say it again for the device that is meant.
                    raise error.__cause__ or error from None

        patch.setattr(merge.engine, "choose_device", choose)
        patch.setattr(merge.engine, "device_words", str)
        patch.setattr(merge.engine, "execute_plan", execute)
        patch.setattr(Lane, "run", run_until_full)


@pytest.mark.parametrize("refusal", REFUSALS, ids=["by torch", "by CUDA"])
@pytest.mark.parametrize("after", [0, 1, 7, 23])
def test_a_full_gpu_is_left_and_the_cpu_goes_on_to_the_same_bytes(
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    warnings: list[str],
    refusal: BaseException,
    after: int,
) -> None:
    expected = run(place, "cpu", "cpu")
    gpu = FakeGpu(monkeypatch, refusal, after)
    assert run(place, "gpu", "auto") == expected
    assert gpu.devices == ["cuda:0", "cpu"]
    assert ["going on on the CPU" in text for text in warnings] == [True]
    assert "cuda:0, then cpu" in (place / "gpu" / "run.json").read_text()


def test_a_run_that_goes_on_on_the_cpu_can_be_resumed(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merging, "_CHECKPOINT_BYTES", 1)
    expected = run(place, "cpu", "cpu")
    FakeGpu(monkeypatch, REFUSALS[0], 7)
    assert run(place, "gpu", "auto") == expected


def test_a_full_gpu_that_was_asked_for_fails_with_what_to_change(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    FakeGpu(monkeypatch, REFUSALS[0], 7)
    with pytest.raises(DeviceMemoryError, match="cuda:0 is out of memory: CUDA out of") as caught:
        run(place, "gpu", "cuda:0")
    assert caught.value.exit_code == 7
    for word in ("--threads 1", "--device auto", "--device cpu"):
        assert word in caught.value.hint
    assert not list(place.glob("gpu*"))


def test_a_gpu_that_fails_otherwise_is_not_trusted_any_further(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = FakeGpu(monkeypatch, RuntimeError("CUDA error: an illegal memory access"), 7)
    with pytest.raises(DeviceError, match="cuda:0 failed: CUDA error: an illegal memory") as caught:
        run(place, "gpu", "auto")
    assert not isinstance(caught.value, DeviceMemoryError)
    assert gpu.devices == ["cuda:0"]
    assert not list(place.glob("gpu*"))


def test_refused_pinned_memory_is_replaced_by_plain_memory(
    monkeypatch: pytest.MonkeyPatch, warnings: list[str]
) -> None:
    empty, asked = torch.empty, []

    def refusing(*arguments: Any, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        if pin_memory:
            asked.append(arguments)
            raise RuntimeError("CUDA error: OS call failed or operation not supported\nmore")
        return empty(*arguments, **options)

    monkeypatch.setattr(torch, "empty", refusing)
    buffers._say_unpinned.cache_clear()
    for size in (8, 16):
        memory = buffers._host_memory(size, is_pinned=True)
        assert (len(memory), memory.dtype, memory.is_pinned()) == (size, torch.uint8, False)
    assert len(asked) == 2
    (said,) = warnings
    assert said.startswith("no pinned memory for transfers, which makes them slower: CUDA error")
    assert "more" not in said


@pytest.mark.gpu
def test_a_small_gpu_is_left_for_the_cpu(place: Path) -> None:
    expected = run(place, "cpu", "cpu")
    torch.cuda.set_per_process_memory_fraction(1e-6)
    try:
        assert run(place, "gpu", "auto") == expected
        with pytest.raises(DeviceMemoryError):
            run(place, "other", "cuda")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.gpu
def test_plain_memory_gives_the_bytes_of_pinned_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_models(tmp_path)
    write_recipe(tmp_path)
    expected = run(tmp_path, "pinned", "cuda")
    monkeypatch.setattr(
        buffers, "_host_memory", lambda size, is_pinned: torch.empty(size, dtype=torch.uint8)
    )
    assert run(tmp_path, "plain", "cuda") == expected


def _run_with_little_memory(place: Path, results: Any) -> None:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    # Small things fit; the buffers of 64 workers, or their threads, do not.
    resource.setrlimit(resource.RLIMIT_AS, (used + 16 * 2**20,) * 2)
    results.put(
        _outcome(
            lambda: run_recipe(
                load_recipe(place / "mini.yaml"),
                place / "out",
                threads=64,
                device="cpu",
                verify=False,
            )
        )
    )


def _outcome(call: Callable[[], Any]) -> tuple[str, str]:
    try:
        call()
    except DeviceMemoryError as error:
        return error.message, error.hint
    return "done", ""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is limited on Linux")
def test_a_machine_without_enough_memory_says_so(place: Path) -> None:
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    child = context.Process(target=_run_with_little_memory, args=(place, results))
    child.start()
    message, hint = results.get(timeout=120)
    child.join()
    assert "the machine gives no more memory or threads: " in message
    assert "--threads 1" in hint
    assert not list(place.glob("out*"))
