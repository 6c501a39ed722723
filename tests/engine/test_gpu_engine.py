"""CUDA at full length: 10^8 elements of every dtype pairing, the CPU's bytes, little memory."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from merge import build_plan, load_recipe, resolve_sources
from merge.engine.execute import execute_plan
from merge.writer.tensors import TensorFileWriter
from tests.mini import random_tensors, write_recipe, write_unet

DEVICE = "cuda"
ELEMENTS = 10**8
DEVICE_LIMIT_BYTES = 2**30
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
ROLES = ("target", "distilled", "base")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models of every dtype and role: `float16-target` and so on."""
    folder = tmp_path_factory.mktemp("models")
    for seed, role in enumerate(ROLES):
        for name, dtype in DTYPES.items():
            tensors = random_tensors(seed, dtype=dtype, channels=8 if role == "target" else 4)
            tensors["mid_block.values.weight"] = every_kind_of_value(dtype, seed)
            write_unet(folder / f"{name}-{role}", tensors)
    return folder


def every_kind_of_value(dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Return random bit patterns: subnormals, both zeros, halfway cases, nearly the largest."""
    rng = np.random.default_rng(seed)
    if dtype == torch.float32:
        bits = rng.integers(0, 2**32, ELEMENTS, dtype=np.uint32)
        values = torch.from_numpy(bits.view(np.int32)).view(dtype)
    else:
        bits = rng.integers(0, 2**16, ELEMENTS, dtype=np.uint16)
        values = torch.from_numpy(bits.view(np.int16)).view(dtype)
    # A difference of two still has to be finite in float32.
    return torch.where(values.abs() < 1e38, values, 0.5)


@pytest.mark.gpu
@pytest.mark.parametrize("out", DTYPES)
@pytest.mark.parametrize("dtypes", list(itertools.product(DTYPES, repeat=3)), ids="-".join)
def test_every_dtype_pairing_has_the_bytes_of_the_cpu(
    models: Path, tmp_path: Path, dtypes: tuple[str, ...], out: str
) -> None:
    if out != "float16" and len(set(dtypes)) == 3:
        pytest.skip("three dtypes at once are rounded to float16 alone, to save minutes")
    named = {role: str(models / f"{name}-{role}") for name, role in zip(dtypes, ROLES, strict=True)}
    write_recipe(tmp_path, models=named, weight=0.7, out_dtype=out, on_overflow="clamp")
    expected = merge(tmp_path, "cpu")
    found = merge(tmp_path, DEVICE)
    assert np.array_equal(found, expected)
    assert (expected != 0).any()


@pytest.mark.gpu
@pytest.mark.parametrize("threads", [1, 4])
def test_a_merge_takes_less_than_a_gibibyte_of_the_device(
    models: Path, tmp_path: Path, threads: int
) -> None:
    named = {role: str(models / f"float32-{role}") for role in ROLES}
    write_recipe(tmp_path, models=named, out_dtype="float32", on_overflow="clamp")
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    merge(tmp_path, DEVICE, threads)
    assert torch.cuda.max_memory_reserved() < DEVICE_LIMIT_BYTES


def merge(folder: Path, device: str, threads: int = 4) -> np.ndarray:
    """Merge without hashes and return the bytes of the output."""
    recipe = load_recipe(folder / "mini.yaml")
    plan = build_plan(recipe, resolve_sources(recipe))
    (unet,) = plan.components
    path = folder / f"{device}.safetensors"
    path.unlink(missing_ok=True)
    with TensorFileWriter(path, unet.out_header.file_bytes) as writer:
        execute_plan(
            plan,
            unet,
            recipe,
            writer,
            device=torch.device(device),
            threads=threads,
            on_frontier=lambda position, states: None,
        )
        writer.finish(unet.header_bytes("0" * 64))
    data = np.fromfile(path, dtype=np.uint8)
    path.unlink()
    return data
