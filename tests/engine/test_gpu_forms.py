"""Every form and method gives on CUDA the bytes that it gives on the CPU.

Sums of whole tensors, thresholds and masks have an order of their own, and slerp's sines are the
host's on both devices, so no method is let off. Products of LoRAs are the libraries' matmuls in
float64: of float16 factors of these sizes `up @ down` is exact there, and what other forms and
DoRA's norms round differently is 2^-29 of a step of the float32 that they are rounded to.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from merge.methods.table import METHODS
from tests.engine.test_order_free import order_matters
from tests.lora.test_lora_merge import (
    CONV,
    CONV_IN,
    DORA,
    FORMS,
    PROJ,
    TO_K,
    Tensors,
    kohya,
    random,
)
from tests.methods.test_methods_merge import BIG, merge, write_two, write_two_recipe
from tests.mini import bits, write_models, write_unet

DEVICE = "cuda"
# Several blocks of the engine and several pieces of the methods, with ragged ends.
LARGE = (1501, 701)


def adapters() -> dict[str, Tensors]:
    """Return a file of every form that is merged elsewhere in these tests."""
    files: dict[str, Tensors] = {}
    for name, (path, _, factors, _) in FORMS.items():
        files[name] = kohya(path, {**factors, "alpha": torch.tensor(5.0)})
    for name, (path, _, factors, shape) in DORA.items():
        scale = random(73, m=shape)["m"].abs() + 0.5
        extra = {"alpha": torch.tensor(1.5), "dora_scale": scale}
        files[f"DoRA, {name}"] = kohya(path, {**factors, **extra})
    factors = random(80, down=(2, 8, 3, 3), up=(8, 2, 1, 1))
    files["DoRA of peft"] = {
        f"unet.{CONV}.lora_A.weight": factors["down"],
        f"unet.{CONV}.lora_B.weight": factors["up"],
        f"unet.{CONV}.lora_magnitude_vector": random(81, m=(1, 8, 1, 1))["m"].abs() + 0.5,
    }
    files["ranks and alphas that differ"] = {
        **kohya(TO_K, {**random(30, down=(3, 12), up=(8, 3)), "alpha": torch.tensor(6.0)}),
        **kohya(PROJ, {**random(31, down=(1, 8), up=(8, 1)), "alpha": torch.tensor(0.25)}),
        **kohya(CONV, random(32, down=(5, 8, 3, 3), up=(8, 5, 1, 1))),
    }
    files["a narrow conv_in"] = kohya(CONV_IN, random(60, down=(2, 4, 3, 3), up=(8, 2, 1, 1)))
    up, down = order_matters(8, 72)
    files["float32, next to ties"] = kohya(
        CONV, {"down": down.view(-1, 8, 3, 3), "up": up.view(8, -1, 1, 1)}
    )
    files["large"] = kohya(
        BIG.removesuffix(".weight"), random(90, down=(64, LARGE[1]), up=(LARGE[0], 64))
    )
    return files


ADAPTERS = adapters()
WITH_LORAS = [name for name, method in METHODS.items() if not method.needs_parents]


def assert_same_on_both(folder: Path) -> None:
    cpu = merge(folder, device="cpu")
    other = merge(folder, device=DEVICE)
    assert cpu.keys() == other.keys()
    for key, tensor in cpu.items():
        np.testing.assert_array_equal(bits(other[key]), bits(tensor), key)


@pytest.mark.gpu
@pytest.mark.parametrize("method", WITH_LORAS)
@pytest.mark.parametrize("tensors", ADAPTERS.values(), ids=ADAPTERS.keys())
def test_adapters(tmp_path: Path, tensors: Tensors, method: str) -> None:
    models = write_models(tmp_path)
    if any("mid_block" in name for name in tensors):
        generator = torch.Generator().manual_seed(0)
        for role, parts in models.items():
            parts[BIG] = (torch.randn(LARGE, generator=generator) * 0.1).half()
            write_unet(tmp_path / role, parts)
    save_file(tensors, tmp_path / "lora.safetensors")
    # With a full model, so that there is a sign to elect and a sum of two kinds.
    distilled = [{"path": "./lora.safetensors", "weight": 0.5}, {"path": "./distilled"}]
    write_two_recipe(
        tmp_path,
        method,
        channel_rule="first",
        models={"base": "./base", "distilled": distilled, "target": "./target"},
    )
    assert_same_on_both(tmp_path)


@pytest.mark.gpu
@pytest.mark.parametrize("out", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("method", list(METHODS))
def test_full_models(tmp_path: Path, method: str, out: str) -> None:
    write_two(tmp_path, big=LARGE)
    changes: dict[str, Any] = {"channel_rule": "first", "out_dtype": out}
    write_two_recipe(tmp_path, method, **changes)
    assert_same_on_both(tmp_path)
