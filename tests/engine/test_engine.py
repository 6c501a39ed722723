from __future__ import annotations

import hashlib
import itertools
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from merge import MergeError, load_recipe, run_recipe
from merge.engine import block_worker, buffers, execute
from merge.engine.buffers import StagedBuffers
from merge.errors import EngineError, IntegrityError, NonFiniteError
from merge.plan.memory import CPU_BLOCK_ELEMENTS
from tests.mini import (
    bits,
    numpy_float32,
    numpy_round,
    random_tensors,
    read_output,
    write_models,
    write_recipe,
    write_unet,
)

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
WORDS = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32"}


def merge(folder: Path, *overrides: str, **options: object) -> dict[str, torch.Tensor]:
    out = folder / f"out-{len(list(folder.glob('out-*')))}"
    run_recipe(load_recipe(folder / "mini.yaml", overrides), out, verify=False, **options)
    return read_output(out)


def reference(
    target: torch.Tensor, distilled: torch.Tensor, base: torch.Tensor, weight: float
) -> np.ndarray:
    """The stated formula in numpy: three float32 operations, each rounded once."""
    delta = numpy_float32(distilled) - numpy_float32(base)
    delta = delta * np.float32(weight)
    return numpy_float32(target) + delta


def special_values(dtype: torch.dtype, count: int, seed: int) -> torch.Tensor:
    """Normals mixed with subnormals, signed zeros, halfway cases and large values."""
    generator = torch.Generator().manual_seed(seed)
    info = torch.finfo(dtype)
    values = torch.randn(count, generator=generator, dtype=torch.float64)
    values *= 10.0 ** torch.randint(-6, 3, (count,), generator=generator)
    values[::17] = 0.0
    values[1::17] = -0.0
    values[2::17] = info.smallest_normal / 4
    values[3::17] = -info.smallest_normal / 2
    values[4::17] = 1 + 2.0**-11
    values[5::17] = 1 + 2.0**-8
    values[6::17] = 30000.0
    return values.to(dtype)


@pytest.mark.parametrize(
    ("target", "distilled", "base"), list(itertools.product(DTYPES, repeat=3)), ids=str
)
def test_every_dtype_pairing_equals_numpy_bit_for_bit(
    tmp_path: Path, target: torch.dtype, distilled: torch.dtype, base: torch.dtype
) -> None:
    # More than one block and a ragged end, so that block borders are covered.
    count = CPU_BLOCK_ELEMENTS + 77
    dtypes = {"target": target, "distilled": distilled, "base": base}
    models = {}
    for seed, (role, dtype) in enumerate(dtypes.items()):
        tensors = random_tensors(seed, dtype=dtype, channels=8 if role == "target" else 4)
        tensors["mid_block.values.weight"] = special_values(dtype, count, seed)
        models[role] = tensors
        write_unet(tmp_path / role, tensors)
    write_recipe(tmp_path, weight=0.7)
    for out in DTYPES:
        merged = merge(tmp_path, f"out_dtype={WORDS[out]}")
        assert merged.keys() == models["target"].keys()
        for key, tensor in merged.items():
            if key == "conv_in.weight":
                expected = numpy_float32(models["target"][key])
            else:
                expected = reference(*(models[role][key] for role in dtypes), 0.7)
            assert tensor.dtype == out
            np.testing.assert_array_equal(bits(tensor), numpy_round(expected, out), key)


def test_float32_equals_the_published_adapt_function(tmp_path: Path) -> None:
    models = write_models(tmp_path, dtype=torch.float32)
    write_recipe(tmp_path, weight=0.5, out_dtype="float32")
    adapted = {}
    for key, parameter in models["target"].items():
        # The published loop, here on plain dictionaries: it skips the widened first layer.
        if key == "conv_in.weight":
            adapted[key] = parameter
            continue
        delta = models["distilled"][key] - models["base"][key]
        adapted[key] = parameter + 0.5 * delta
    for key, tensor in merge(tmp_path).items():
        np.testing.assert_array_equal(bits(tensor), bits(adapted[key]), key)


@settings(max_examples=40, deadline=None)
@given(
    weight=st.floats(-4, 4, width=64).filter(lambda w: abs(w) > 1e-3),
    seed=st.integers(0, 10**6),
)
def test_any_weight_is_rounded_once_to_float32(
    tmp_path_factory: pytest.TempPathFactory, weight: float, seed: int
) -> None:
    folder = tmp_path_factory.mktemp("weight")
    models = {}
    for index, role in enumerate(("target", "distilled", "base")):
        channels = 8 if role == "target" else 4
        models[role] = random_tensors(seed + index, dtype=torch.float32, channels=channels)
        write_unet(folder / role, models[role])
    write_recipe(folder, weight=weight, out_dtype="float32")
    merged = merge(folder)
    for key in ("conv_out.weight", "conv_in.bias"):
        expected = reference(*(models[role][key] for role in models), weight)
        np.testing.assert_array_equal(bits(merged[key]), bits(torch.from_numpy(expected)))


def test_same_bytes_for_any_number_of_threads_and_hash_seed(tmp_path: Path) -> None:
    models = {}
    for seed, role in enumerate(("target", "distilled", "base")):
        tensors = random_tensors(seed, channels=8 if role == "target" else 4)
        # Several units for one tensor, so that threads really share one.
        tensors["mid_block.big.weight"] = (
            torch.randn(2300, 2000, generator=torch.Generator().manual_seed(seed)).half() * 0.1
        )
        models[role] = tensors
        write_unet(tmp_path / role, tensors)
    recipe = write_recipe(tmp_path)
    digests = set()
    for index, (threads, seed) in enumerate([(1, "0"), (2, "1"), (8, "2"), (2, "3")]):
        out = tmp_path / f"run-{index}"
        command = [sys.executable, "-m", "merge", "run", str(recipe), "--out", str(out)]
        command += ["--threads", str(threads), "--no-verify", "-q"]
        subprocess.run(
            command,
            env={**os.environ, "PYTHONHASHSEED": seed},
            check=True,
            capture_output=True,
        )
        names = ["unet/diffusion_pytorch_model.safetensors", "merge_manifest.json"]
        names += ["recipe.lock.yaml"]
        digests.add(tuple(hashlib.sha256((out / n).read_bytes()).hexdigest() for n in names))
    assert len(digests) == 1


def test_a_delta_of_zero_keeps_every_bit_of_the_target(tmp_path: Path) -> None:
    models = write_models(tmp_path)
    key = "conv_out.weight"
    models["target"][key].view(-1)[::3] = -0.0
    models["distilled"][key] = models["base"][key].clone()
    for role, tensors in models.items():
        write_unet(tmp_path / role, tensors)
    write_recipe(tmp_path)
    np.testing.assert_array_equal(bits(merge(tmp_path)[key]), bits(models["target"][key]))


def test_a_single_changed_element_gives_the_plain_formula(tmp_path: Path) -> None:
    models = write_models(tmp_path)
    key = "conv_out.weight"
    models["target"][key].view(-1)[::3] = -0.0
    models["distilled"][key] = models["base"][key].clone()
    models["distilled"][key].view(-1)[-1] += 1
    for role, tensors in models.items():
        write_unet(tmp_path / role, tensors)
    write_recipe(tmp_path)
    expected = reference(*(models[role][key] for role in ("target", "distilled", "base")), 1.0)
    np.testing.assert_array_equal(bits(merge(tmp_path)[key]), numpy_round(expected, torch.float16))


def test_untouched_and_integer_tensors_are_copied_as_bytes(tmp_path: Path) -> None:
    models = write_models(tmp_path)
    for tensors in models.values():
        tensors["position_ids"] = torch.arange(77, dtype=torch.int64)
        tensors["flags"] = torch.tensor([True, False, True])
        tensors["empty.weight"] = torch.empty(0, 4, dtype=torch.float16)
        tensors["scalar"] = torch.tensor(-0.0, dtype=torch.float16)
    for role, tensors in models.items():
        write_unet(tmp_path / role, tensors)
    write_recipe(tmp_path, exclude=["conv_out.*", "scalar"])
    merged = merge(tmp_path)
    for key in ("conv_in.weight", "conv_out.weight", "scalar"):
        np.testing.assert_array_equal(bits(merged[key]), bits(models["target"][key]))
    for key in ("position_ids", "flags", "empty.weight"):
        assert merged[key].dtype == models["target"][key].dtype
        assert torch.equal(merged[key], models["target"][key])


def test_keep_leaves_each_tensor_its_dtype(tmp_path: Path) -> None:
    models = write_models(tmp_path)
    models["target"]["conv_out.weight"] = models["target"]["conv_out.weight"].float()
    write_unet(tmp_path / "target", models["target"])
    write_recipe(tmp_path, out_dtype="keep")
    merged = merge(tmp_path)
    assert {k: v.dtype for k, v in merged.items()} == {
        k: v.dtype for k, v in models["target"].items()
    }


def test_first_adds_to_the_first_four_channels_only(tmp_path: Path) -> None:
    models = write_models(tmp_path)
    write_recipe(tmp_path, weight=0.5, channel_rule="first")
    key = "conv_in.weight"
    merged = merge(tmp_path)[key]
    target = models["target"][key]
    expected = reference(
        target[:, :4].contiguous(), models["distilled"][key], models["base"][key], 0.5
    )
    np.testing.assert_array_equal(bits(merged[:, :4]), numpy_round(expected, torch.float16))
    np.testing.assert_array_equal(bits(merged[:, 4:]), bits(target[:, 4:]))


def test_block_weights_replace_the_weight(tmp_path: Path) -> None:
    models = write_models(tmp_path)
    write_recipe(tmp_path, weight=1.0, block_weights={"mid_block.*": 0.25, "conv_out.*": 0.0})
    merged = merge(tmp_path)
    key = "mid_block.resnets.0.norm1.weight"
    expected = reference(*(models[role][key] for role in ("target", "distilled", "base")), 0.25)
    np.testing.assert_array_equal(bits(merged[key]), numpy_round(expected, torch.float16))
    np.testing.assert_array_equal(
        bits(merged["conv_out.weight"]), bits(models["target"]["conv_out.weight"])
    )


def test_two_distilled_models_are_added_in_order(tmp_path: Path) -> None:
    models = write_models(tmp_path, dtype=torch.float32)
    second = random_tensors(9, dtype=torch.float32, like=models["base"])
    write_unet(tmp_path / "second", second)
    distilled = [{"path": "./distilled", "weight": 0.3}, {"path": "./second", "weight": 2.0}]
    write_recipe(
        tmp_path,
        weight=0.5,
        out_dtype="float32",
        models={"base": "./base", "target": "./target", "distilled": distilled},
    )
    key = "conv_out.weight"
    step = reference(
        models["target"][key], models["distilled"][key], models["base"][key], 0.5 * 0.3
    )
    expected = reference(torch.from_numpy(step), second[key], models["base"][key], 0.5 * 2.0)
    np.testing.assert_array_equal(bits(merge(tmp_path)[key]), expected.view(np.uint32))


# Failures -------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["target", "distilled", "base"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_inputs_are_named_with_their_count(
    tmp_path: Path, role: str, value: float
) -> None:
    models = write_models(tmp_path)
    models[role]["conv_out.weight"].view(-1)[[3, 100]] = value
    write_unet(tmp_path / role, models[role])
    write_recipe(tmp_path)
    with pytest.raises(NonFiniteError, match=rf"conv_out.weight: 2 of 288 .* in {role} \("):
        merge(tmp_path)
    assert not list(tmp_path.glob("out-*"))


def test_a_non_finite_tensor_that_is_only_copied_is_an_error_too(tmp_path: Path) -> None:
    models = write_models(tmp_path)
    models["target"]["conv_in.weight"].view(-1)[7] = float("nan")
    write_unet(tmp_path / "target", models["target"])
    write_recipe(tmp_path)
    with pytest.raises(NonFiniteError, match=r"conv_in.weight: 1 of 576 values are NaN"):
        merge(tmp_path)


def overflowing(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    models = write_models(folder, dtype=torch.float32)
    flat = models["target"]["conv_out.weight"].view(-1)
    # 65519.99 rounds to the largest float16, 65520 to infinity.
    flat[:4] = torch.tensor([65519.99, 65520.0, -70000.0, 65504.0])
    models["distilled"]["conv_out.weight"].view(-1)[:4] = 0
    models["base"]["conv_out.weight"].view(-1)[:4] = 0
    for role, tensors in models.items():
        write_unet(folder / role, tensors)
    return models


def test_overflow_names_the_tensor_and_the_count(tmp_path: Path) -> None:
    overflowing(tmp_path)
    write_recipe(tmp_path)
    with pytest.raises(
        NonFiniteError, match=r"conv_out.weight: 2 of 288 values are too large for float16"
    ) as caught:
        merge(tmp_path)
    assert "bfloat16" in caught.value.hint


def test_overflow_can_be_clamped(tmp_path: Path) -> None:
    overflowing(tmp_path)
    write_recipe(tmp_path, on_overflow="clamp")
    merged = merge(tmp_path)["conv_out.weight"].view(-1)[:4]
    assert merged.tolist() == [65504.0, 65504.0, -65504.0, 65504.0]


def test_overflow_can_keep_the_value_of_the_target(tmp_path: Path) -> None:
    models = write_models(tmp_path)
    models["distilled"]["conv_out.weight"].view(-1)[5] = 65000.0
    models["base"]["conv_out.weight"].view(-1)[5] = -65000.0
    for role, tensors in models.items():
        write_unet(tmp_path / role, tensors)
    write_recipe(tmp_path, on_overflow="keep_target")
    merged = merge(tmp_path)["conv_out.weight"].view(-1)
    target = models["target"]["conv_out.weight"].view(-1)
    assert merged[5] == target[5]
    assert merged[6] != target[6]


def test_large_values_whose_squares_overflow_are_fine(tmp_path: Path) -> None:
    models = write_models(tmp_path, dtype=torch.float32)
    models["target"]["conv_out.weight"].view(-1)[0] = 1e30
    write_unet(tmp_path / "target", models["target"])
    write_recipe(tmp_path, out_dtype="bfloat16")
    assert merge(tmp_path)["conv_out.weight"].view(-1)[0] == torch.tensor(1e30).bfloat16()


def test_base_equal_to_distilled_changes_nothing_and_fails(tmp_path: Path) -> None:
    models = write_models(tmp_path)
    write_unet(tmp_path / "distilled", models["base"])
    write_recipe(tmp_path)
    with pytest.raises(EngineError, match="changes nothing"):
        merge(tmp_path)
    merged = merge(tmp_path, "allow_noop=true")
    for key, tensor in merged.items():
        np.testing.assert_array_equal(bits(tensor), bits(models["target"][key]), key)


def test_weight_zero_with_allow_noop_copies_the_target(tmp_path: Path) -> None:
    models = write_models(tmp_path)
    write_recipe(tmp_path, weight=0.0)
    with pytest.raises(MergeError, match="nothing would be added"):
        merge(tmp_path)
    merged = merge(tmp_path, "allow_noop=true")
    for key, tensor in merged.items():
        np.testing.assert_array_equal(bits(tensor), bits(models["target"][key]), key)


def test_an_input_that_changes_during_the_run_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = write_models(tmp_path)
    write_recipe(tmp_path)
    original = execute._run_workers

    def run_then_change(workers: object, queue: object) -> None:
        original(workers, queue)
        write_unet(tmp_path / "base", {k: v + 1 for k, v in models["base"].items()})

    monkeypatch.setattr(execute, "_run_workers", run_then_change)
    with pytest.raises(IntegrityError, match="changed while it was in use"):
        merge(tmp_path)
    assert not list(tmp_path.glob("out-*"))


# LoRA -----------------------------------------------------------------------------------------

LORA_KEYS = (
    "down_blocks.0.attentions.0.proj_in.weight",
    "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight",
    "down_blocks.0.resnets.0.conv1.weight",
)


def write_lora(
    path: Path, target: dict[str, torch.Tensor], *, rank: int = 3, alpha: float | None = 8.0,
    dtype: torch.dtype = torch.float16, seed: int = 0, keys: tuple[str, ...] = LORA_KEYS,
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    tensors, factors = {}, {}
    for key in keys:
        shape = target[key].shape
        down = (torch.randn(rank, *shape[1:], generator=generator) * 0.1).to(dtype)
        up_shape = (shape[0], rank, *(1 for _ in shape[2:]))
        up = (torch.randn(up_shape, generator=generator) * 0.1).to(dtype)
        stem = "lora_unet_" + key.removesuffix(".weight").replace(".", "_")
        tensors[f"{stem}.lora_down.weight"] = down
        tensors[f"{stem}.lora_up.weight"] = up
        if alpha is not None:
            tensors[f"{stem}.alpha"] = torch.tensor(alpha, dtype=dtype)
        factors[key] = (down, up)
    save_file(tensors, path)
    return factors


def lora_reference(
    target: np.ndarray, terms: list[tuple[tuple[torch.Tensor, torch.Tensor], float]]
) -> np.ndarray:
    """Float64 products, scaled and summed in order, rounded once, added in float32."""
    total = np.zeros((target.shape[0], target[0].size), np.float64)
    for (down, up), scale in terms:
        rank = down.shape[0]
        product = numpy_float32(up).astype(np.float64).reshape(-1, rank) @ (
            numpy_float32(down).astype(np.float64).reshape(rank, -1)
        )
        total += product * scale
    return target + total.astype(np.float32).reshape(target.shape)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lora_equals_a_float64_reference_rounded_once(tmp_path: Path, dtype: torch.dtype) -> None:
    models = write_models(tmp_path)
    factors = write_lora(tmp_path / "lora.safetensors", models["target"], dtype=dtype)
    write_recipe(
        tmp_path,
        weight=0.8,
        out_dtype="float32",
        models={"distilled": "./lora.safetensors", "target": "./target"},
    )
    merged = merge(tmp_path)
    for key, tensor in merged.items():
        target = numpy_float32(models["target"][key])
        if key in factors:
            target = lora_reference(target, [(factors[key], 0.8 * 8.0 / 3)])
        np.testing.assert_array_equal(bits(tensor), target.view(np.uint32), key)


def test_several_loras_are_summed_in_float64_and_added_after_full_deltas(tmp_path: Path) -> None:
    models = write_models(tmp_path, dtype=torch.float32)
    one = write_lora(tmp_path / "one.safetensors", models["target"], seed=1)
    two = write_lora(tmp_path / "two.safetensors", models["target"], seed=2, alpha=None, rank=5)
    distilled = [
        {"path": "./one.safetensors", "weight": 0.5},
        {"path": "./distilled", "weight": 0.25},
        {"path": "./two.safetensors", "weight": 2.0},
    ]
    write_recipe(
        tmp_path,
        out_dtype="float32",
        models={"base": "./base", "target": "./target", "distilled": distilled},
    )
    merged = merge(tmp_path)
    for key in LORA_KEYS:
        full = reference(*(models[role][key] for role in ("target", "distilled", "base")), 0.25)
        expected = lora_reference(full, [(one[key], 0.5 * 8 / 3), (two[key], 2.0)])
        np.testing.assert_array_equal(bits(merged[key]), expected.view(np.uint32), key)


def test_lora_bytes_do_not_depend_on_threads(tmp_path: Path) -> None:
    models = write_models(tmp_path)
    big = "mid_block.attentions.0.proj_out.weight"
    generator = torch.Generator().manual_seed(5)
    models["target"][big] = (torch.randn(3000, 1500, generator=generator) * 0.1).half()
    write_unet(tmp_path / "target", models["target"])
    write_lora(tmp_path / "lora.safetensors", models["target"], rank=64, keys=(*LORA_KEYS, big))
    write_recipe(
        tmp_path,
        out_dtype="float32",
        models={"distilled": "./lora.safetensors", "target": "./target"},
    )
    results = [merge(tmp_path, threads=threads)[big] for threads in (1, 2, 8)]
    for result in results[1:]:
        np.testing.assert_array_equal(bits(result), bits(results[0]))


def test_a_four_channel_conv_in_lora_follows_the_channel_rule(tmp_path: Path) -> None:
    models = write_models(tmp_path)
    key = "conv_in.weight"
    factors = write_lora(tmp_path / "lora.safetensors", models["base"], keys=(*LORA_KEYS, key))
    write_recipe(
        tmp_path,
        out_dtype="float32",
        models={"distilled": "./lora.safetensors", "target": "./target"},
    )
    target = models["target"][key]
    np.testing.assert_array_equal(bits(merge(tmp_path)[key]), numpy_float32(target).view(np.uint32))
    merged = merge(tmp_path, "channel_rule=first")[key]
    narrow = numpy_float32(target[:, :4].contiguous())
    expected = lora_reference(narrow, [(factors[key], 8 / 3)])
    np.testing.assert_array_equal(bits(merged[:, :4]), expected.view(np.uint32))
    np.testing.assert_array_equal(
        bits(merged[:, 4:]), numpy_float32(target[:, 4:].contiguous()).view(np.uint32)
    )
    with pytest.raises(MergeError, match=r"conv_in.weight: 8 input channels.*channel_rule"):
        merge(tmp_path, "channel_rule=error")


# Device buffers --------------------------------------------------------------------------------


class HostBuffers(StagedBuffers):
    """CUDA transfers on the CPU: device buffers of its own and a host that is reused."""

    transfers = 0

    def __init__(self, *arguments: Any) -> None:
        with pytest.MonkeyPatch.context() as patch:
            # Neither is to be had without CUDA.
            patch.setattr(torch.cuda, "Event", lambda: SimpleNamespace(synchronize=lambda: None))
            patch.setattr(buffers, "_host_memory", lambda size, is_pinned: torch.empty(size).byte())
            super().__init__(*arguments)
        for memory in self._raw:
            memory.fill_(0x55)

        def record() -> None:
            HostBuffers.transfers += 1

        self._sent = [SimpleNamespace(synchronize=lambda: None, record=record)] * 4

    def _wait(self) -> None:
        pass


def test_transfers_through_device_buffers_give_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = write_models(tmp_path)
    models["target"]["position_ids"] = torch.arange(77)
    for role, tensors in models.items():
        tensors["mid_block.values.weight"] = special_values(torch.float16, 600_000, len(role))
        write_unet(tmp_path / role, tensors)
    write_lora(tmp_path / "lora.safetensors", models["target"])
    distilled = [{"path": "./distilled"}, {"path": "./lora.safetensors", "weight": 0.5}]
    for out in ("float16", "float32", "keep"):
        write_recipe(
            tmp_path,
            out_dtype=out,
            exclude=["conv_out.*", "position_ids"],
            channel_rule="first",
            models={"base": "./base", "target": "./target", "distilled": distilled},
        )
        plain = merge(tmp_path)
        HostBuffers.transfers = 0
        with monkeypatch.context() as patch:
            patch.setattr(block_worker, "make_buffers", HostBuffers)
            patch.setattr(block_worker, "load_library", lambda: None)
            through = merge(tmp_path)
        assert HostBuffers.transfers > 10
        for key, tensor in plain.items():
            assert torch.equal(through[key].view(torch.uint8), tensor.view(torch.uint8)), key


# CUDA -----------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("out", ["float16", "bfloat16", "float32"])
def test_cuda_gives_the_bytes_of_the_cpu(tmp_path: Path, out: str) -> None:
    dtypes = {"target": torch.float16, "distilled": torch.bfloat16, "base": torch.float32}
    for seed, (role, dtype) in enumerate(dtypes.items()):
        tensors = random_tensors(seed, dtype=dtype, channels=8 if role == "target" else 4)
        tensors["mid_block.values.weight"] = special_values(dtype, 5_000_011, seed)
        write_unet(tmp_path / role, tensors)
    write_recipe(tmp_path, weight=0.7, channel_rule="first")
    cpu = merge(tmp_path, f"out_dtype={out}", device="cpu")
    cuda = merge(tmp_path, f"out_dtype={out}", device="cuda")
    for key, tensor in cpu.items():
        np.testing.assert_array_equal(bits(cuda[key]), bits(tensor), key)


@pytest.mark.gpu
def test_cuda_lora_gives_the_bytes_of_the_cpu(tmp_path: Path) -> None:
    models = write_models(tmp_path)
    big = "mid_block.attentions.0.proj_out.weight"
    models["target"][big] = (torch.randn(3000, 1500) * 0.1).half()
    write_unet(tmp_path / "target", models["target"])
    write_lora(tmp_path / "lora.safetensors", models["target"], rank=64, keys=(*LORA_KEYS, big))
    write_recipe(
        tmp_path,
        out_dtype="float32",
        models={"distilled": "./lora.safetensors", "target": "./target"},
    )
    cpu = merge(tmp_path, device="cpu")
    cuda = merge(tmp_path, device="cuda")
    for key, tensor in cpu.items():
        np.testing.assert_array_equal(bits(cuda[key]), bits(tensor), key)
