"""Merges into memory: the bytes of a run, memory that is used again, devices that are full."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch

from merge import load_recipe, run_recipe
from merge.errors import DeviceMemoryError, EngineError, NonFiniteError
from merge.run.in_memory import MemoryMerger, merge_in_memory
from merge.run.prepare import PreparedRun, prepare_run
from tests.engine.test_device_memory import REFUSALS, FakeGpu
from tests.mini import write_models, write_recipe
from tests.run.test_run import write_tiny_recipe

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


def prepare(path: Path, *overrides: str) -> PreparedRun:
    return prepare_run(load_recipe(path, overrides))


@pytest.mark.parametrize("lora", ["", "lora_kohya.safetensors"], ids=["full", "lora"])
@pytest.mark.parametrize("arch", ["tiny_sd15", "tiny_sdxl"])
def test_the_bytes_in_memory_are_those_of_a_run(
    request: pytest.FixtureRequest, tmp_path: Path, arch: str, lora: str
) -> None:
    models = request.getfixturevalue(arch)
    path = write_tiny_recipe(tmp_path, models, lora=lora, weight=0.75)
    data = merge_in_memory(prepare(path), device="cpu")
    folder = run_recipe(load_recipe(path), tmp_path / "out", device="cpu", verify=False).folder
    assert {name: bytes(part) for name, part in data.items()} == {
        WEIGHTS: (folder / WEIGHTS).read_bytes()
    }


def test_one_memory_takes_one_set_of_values_after_the_other(place: Path) -> None:
    prepared = prepare(place / "mini.yaml")
    merger = MemoryMerger("cpu", threads=2)
    told: list[int] = []
    addresses = set()
    for weight in ("0.5", "1", "0.5"):
        changed = prepared.with_recipe(load_recipe(place / "mini.yaml", [f"weight={weight}"]))
        told.clear()
        merger.merge(changed, told.append)
        ((name, data),) = merger.data.items()
        addresses.add(torch.frombuffer(data, dtype=torch.uint8).data_ptr())
        out = place / f"out-{weight}"
        run_recipe(changed.recipe, out, device="cpu", overwrite=True, verify=False)
        assert bytes(data) == (out / name).read_bytes()
        assert merger.files[name].sha256 == hashlib.sha256(data).hexdigest()
        assert merger.files[name].size_bytes == data.nbytes == sum(told)
    assert len(addresses) == 1
    # Values of another dtype take other memory, and the old one is given back.
    wide = prepared.with_recipe(load_recipe(place / "mini.yaml", ["out_dtype=float32"]))
    merger.merge(wide)
    assert merger.data[name].nbytes > 1.7 * data.nbytes


def test_a_merge_that_fails_leaves_nothing_that_looks_whole(place: Path) -> None:
    prepared = prepare(place / "mini.yaml")
    merger = MemoryMerger("cpu")
    merger.merge(prepared)
    expected = {name: bytes(data) for name, data in merger.data.items()}
    with pytest.raises(NonFiniteError, match="too large for float16"):
        merger.merge(prepared.with_recipe(load_recipe(place / "mini.yaml", ["weight=1e9"])))
    assert merger.data == merger.files == {}
    merger.merge(prepared)
    assert {name: bytes(data) for name, data in merger.data.items()} == expected


def test_a_merge_that_changes_nothing_is_an_error_unless_it_may(place: Path) -> None:
    same = f"models.distilled={place / 'base'}"
    with pytest.raises(EngineError, match="changes nothing"):
        merge_in_memory(prepare(place / "mini.yaml", same), device="cpu")
    allowed = prepare(place / "mini.yaml", same, "allow_noop=true")
    assert len(merge_in_memory(allowed, device="cpu")) == 1


@pytest.mark.parametrize("after", [0, 5])
def test_a_full_gpu_is_left_for_the_cpu_with_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    write_models(tmp_path)
    prepared = prepare(write_recipe(tmp_path))
    ((name, data),) = merge_in_memory(prepared, device="cpu").items()
    gpu = FakeGpu(monkeypatch, REFUSALS[0], after)
    merger = MemoryMerger("auto")
    merger.merge(prepared)
    assert merger.data[name] == data
    assert gpu.devices == ["cuda:0", "cpu"]
    # It stays there: the next one would only fail again.
    merger.merge(prepared)
    assert merger.data[name] == data
    assert gpu.devices == ["cuda:0", "cpu", "cpu"]


def test_a_full_gpu_that_was_asked_for_is_an_error(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = prepare(place / "mini.yaml")
    FakeGpu(monkeypatch, REFUSALS[0], 1)
    with pytest.raises(DeviceMemoryError, match="cuda:0 is out of memory"):
        merge_in_memory(prepared, device="cuda")
