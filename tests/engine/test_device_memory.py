"""Devices that refuse memory: from the start, in the middle, or only the pinned kind of it."""

from __future__ import annotations

import logging
import multiprocessing
import resource
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode

import merge.engine.buffers as buffers
import merge.run.merging as merging
from merge import build_plan, load_recipe, resolve_sources, run_recipe
from merge.engine.block_worker import BlockWorker
from merge.engine.device import device_errors
from merge.engine.execute import execute_plan
from merge.engine.units import TensorState, cut_units
from merge.errors import DeviceError, DeviceMemoryError
from merge.reader.checkpoint import FileReader
from merge.writer.tensors import TensorFileWriter
from tests.mini import (
    contents,
    random_tensors,
    read_output,
    write_models,
    write_recipe,
    write_unet,
)

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
        run_unit = BlockWorker.run

        def run_until_full(worker: BlockWorker, *arguments: Any) -> None:
            if self.devices[-1] == "cuda:0":
                if self.left == 0:
                    raise refusal
                self.left -= 1
            run_unit(worker, *arguments)

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

        patch.setattr("merge.engine.device.choose_device", choose)
        patch.setattr("merge.engine.device.device_words", str)
        patch.setattr("merge.engine.execute.execute_plan", execute)
        patch.setattr(BlockWorker, "run", run_until_full)


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


class LiveBytes(TorchDispatchMode):
    """Adds up the storages that operations make, as long as they live."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: Any = (), options: Any = None
    ) -> Any:
        found = function(*arguments, **(options or {}))
        for value in found if isinstance(found, (list, tuple)) else [found]:
            if isinstance(value, torch.Tensor):
                self._add(value.untyped_storage())
        return found

    def _add(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return
        self._seen.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)

        def gone() -> None:
            self.now -= size
            self._seen.discard(key)

        weakref.finalize(storage, gone)


@pytest.mark.parametrize("kind", ["float32", "overflowing", "float16", "float32 LoRA"])
def test_a_worker_holds_a_few_blocks_whatever_the_tensors_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """As on a GPU, where torch's own operations add and every temporary is device memory."""
    monkeypatch.setattr("merge.engine.block_worker.load_library", lambda: None)
    block, rows, columns = 64 * 1024, 1024, 2048
    dtype = torch.float16 if kind == "float16" else torch.float32
    key = "mid_block.large.weight"
    for seed, role in enumerate(("target", "base", "distilled")):
        tensors = random_tensors(seed, dtype=dtype, channels=8 if role == "target" else 4)
        large = torch.full((rows, columns), 1e5 if kind == "overflowing" else 0.1 * seed)
        tensors[key] = large.to(dtype) + seed
        write_unet(tmp_path / role, tensors)
    changes: dict[str, Any] = {"on_overflow": "clamp"}
    if kind == "float32 LoRA":
        stem = "lora_unet_mid_block_large"
        lora = {f"{stem}.lora_down.weight": torch.randn(8, columns)}
        lora |= {f"{stem}.lora_up.weight": torch.randn(rows, 8)}
        save_file(lora, tmp_path / "lora.safetensors")
        changes["models"] = {"distilled": "./lora.safetensors", "target": "./target"}
        monkeypatch.setattr("merge.engine.block_worker.PRODUCT_ELEMENTS", 2 * block)
    recipe = load_recipe(write_recipe(tmp_path, **changes))
    plan = build_plan(recipe, resolve_sources(recipe))
    (unet,) = plan.components
    (index,) = (i for i, row in enumerate(unet.tensors) if row.key == key)
    with ExitStack() as stack:
        readers = [stack.enter_context(FileReader(f.path, f.stamp)) for f in plan.files]
        writer = TensorFileWriter(tmp_path / "o.safetensors", unet.out_header.file_bytes)
        stack.enter_context(writer)
        cpu = torch.device("cpu")
        live = stack.enter_context(LiveBytes())
        worker = BlockWorker(plan, unet, readers, writer, cpu, block, "clamp")
        for unit in cut_units(unet.tensors):
            if unit.tensor == index:
                worker.run(unit, TensorState(1))
    assert unet.tensors[index].is_merged
    whole = rows * columns * 4
    assert whole == 32 * block * 4
    # Staging, three of scratch, and what a block needs for a moment, a LoRA's in float64.
    most = 26 if kind == "float32 LoRA" else 14
    assert live.peak < most * block * 4 < whole


def test_an_overflow_looks_at_its_own_block_of_the_inputs_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every block looked through whole inputs, so the time grew with their square."""
    key = "mid_block.large.weight"
    size = 4096
    for seed, role in enumerate(("target", "base", "distilled")):
        tensors = random_tensors(seed, dtype=torch.float32, channels=8 if role == "target" else 4)
        tensors[key] = torch.full((size,), 3e38 if role == "distilled" else 1.0)
        write_unet(tmp_path / role, tensors)
    read = 0
    real = buffers.Buffers.read_both

    def counted(self: Any, ref: Any, start: int, count: int, slot: int) -> Any:
        nonlocal read
        read += count
        return real(self, ref, start, count, slot)

    monkeypatch.setattr(buffers.Buffers, "read_both", counted)
    monkeypatch.setattr("merge.engine.block_worker.load_library", lambda: None)
    monkeypatch.setattr("merge.engine.execute.CPU_BLOCK_ELEMENTS", 64)
    changes = {"weight": 2.0, "out_dtype": "float32", "on_overflow": "clamp"}
    recipe = load_recipe(write_recipe(tmp_path, **changes))
    run_recipe(recipe, tmp_path / "out", device="cpu", threads=1, verify=False)
    assert read_output(tmp_path / "out")[key][0] == torch.finfo(torch.float32).max
    # The sum reads three inputs, and the look at them as much again.
    assert read < 12 * size
