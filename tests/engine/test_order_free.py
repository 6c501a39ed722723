"""LoRA sums that round the same in whatever order a machine adds them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import merge.engine.block_worker as worker
import merge.engine.terms as terms
from merge import load_recipe, run_recipe
from merge.engine.fused import load_library
from merge.engine.order_free import Factored, make_order_free
from merge.errors import NonFiniteError
from tests.mini import contents, write_models, write_recipe

CONV = "down_blocks.0.resnets.0.conv1"
RANK = 66
Multiply = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def order_matters(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return float32 factors, `(rows, 66)` and `(66, columns)`, of sums next to a float32 tie.

    1, half a step of float32, then many values that each are too small to count beside those, but
    together decide which way the tie is rounded when they come first.
    """
    row = torch.arange(rows)
    up = torch.empty(rows, RANK)
    up[:, 0] = 1 + row % 2 * 2.0**-23
    up[:, 1] = 2.0**-24
    up[:, 2:] = (1 - 2.0 * (row // 2 % 2))[:, None] * 2.0**-27
    down = (2.0 ** (torch.arange(columns) % 4)).repeat(RANK, 1)
    down[2:] *= 2.0**-27
    return up, down


def forward(up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    total = torch.zeros(len(up), down.shape[1], dtype=torch.float64)
    for k in range(len(down)):
        total = total + up[:, k : k + 1] * down[k]
    return total


def backward(up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    return forward(up.flip(1), down.flip(0))


def in_halves(up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """Sum even and odd places of the rank apart, as a processor with two accumulators does."""
    return forward(up[:, ::2], down[::2]) + forward(up[:, 1::2], down[1::2])


ORDERS = [backward, in_halves, torch.mm]


@pytest.mark.parametrize("multiply", ORDERS)
@pytest.mark.parametrize("factor", [1.0, -0.5, 4.0])
def test_sums_next_to_a_tie_are_made_again_in_order(multiply: Multiply, factor: float) -> None:
    up, down = (values.double() for values in order_matters(191, 701))
    expected = (forward(up, down) * factor).float()
    found = multiply(up, down)
    if multiply is not torch.mm:
        assert ((found * factor).float() != expected).any()
    assert make_order_free(found, [Factored(up, down, 1.0)], factor) == found.numel()
    assert torch.equal((found * factor).float(), expected)


@settings(max_examples=200, deadline=None)
@given(data=st.data(), order=st.sampled_from(ORDERS))
def test_any_order_settles_to_the_same_float32(data: st.DataObject, order: Multiply) -> None:
    rank = data.draw(st.integers(1, 40))
    rng = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    spread = data.draw(st.integers(0, 60))

    def random(*shape: int) -> torch.Tensor:
        # Few bits and many sizes: sums that are ties, and sums that lose what is small.
        bits = data.draw(st.sampled_from([1, 4, 24]))
        values = torch.randint(-(2**bits), 2**bits + 1, shape, generator=rng).double()
        return values * 2.0 ** -torch.randint(0, spread + 1, shape, generator=rng).double()

    scales = data.draw(st.lists(st.sampled_from([1.0, 0.5, -1.5, 0.3]), min_size=1, max_size=3))
    factor = data.draw(st.sampled_from([1.0, 0.7, -0.125]))
    products = [Factored(random(9, rank), random(rank, 14), scale) for scale in scales]
    made = [torch.stack([m(p.up, p.down) * p.scale for p in products]) for m in (forward, order)]
    expected, found = (torch.stack(list(each)).cumsum(0)[-1] for each in made)
    make_order_free(found, products, factor)
    assert torch.equal((found * factor).float(), (expected * factor).float())


def test_other_sums_are_left_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    up, down = (torch.randn(512, 64, generator=generator).double() for _ in range(2))
    total = up @ down.T
    before = total.clone()
    assert make_order_free(total, [Factored(up, down.T, 1.0)], 0.3) < 100
    assert torch.equal((total * 0.3).float(), (before * 0.3).float())


# Whole merges ------------------------------------------------------------------------------------


def write_adapters(folder: Path) -> None:
    write_models(folder)
    up, down = order_matters(8, 72)
    factors = {"lora_A.weight": down.view(RANK, 8, 3, 3), "lora_B.weight": up.view(8, RANK, 1, 1)}
    for name, dtype in {"one": torch.float32, "two": torch.float16}.items():
        named = {f"unet.{CONV}.{role}": value.to(dtype) for role, value in factors.items()}
        save_file(named, folder / f"{name}.safetensors")


RECIPES: dict[str, dict[str, Any]] = {
    "one": {"models": {"target": "./target", "distilled": "./one.safetensors"}},
    "subtracted": {
        "models": {"target": "./target", "distilled": "./one.safetensors"},
        "weight": -1.0,
    },
    "two": {
        "models": {
            "target": "./target",
            "distilled": [{"path": "./two.safetensors"}, {"path": "./one.safetensors"}],
        }
    },
    "ties": {
        "models": {
            "base": "./base",
            "target": "./target",
            "distilled": [{"path": "./one.safetensors"}, {"path": "./distilled"}],
        },
        "method": "ties",
    },
}


def reversed_mm(up: torch.Tensor, down: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    return out.copy_(backward(up, down))


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())
def test_a_merge_does_not_depend_on_the_order_of_its_products(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: dict[str, Any]
) -> None:
    write_adapters(tmp_path)
    write_recipe(tmp_path, out_dtype="float32", channel_rule="first", **recipe)

    def output(name: str) -> dict[str, bytes]:
        loaded = load_recipe(tmp_path / "mini.yaml")
        return contents(run_recipe(loaded, tmp_path / name, verify=False).folder)

    expected = output("first")
    monkeypatch.setattr(worker, "load_library", lambda: None)
    assert output("torch") == expected
    monkeypatch.setattr(torch, "mm", reversed_mm)
    assert output("backward") == expected
    # Else this test would show nothing.
    monkeypatch.setattr(terms, "make_order_free", lambda *_: 0)
    assert output("unsettled") != expected


@pytest.mark.skipif(load_library() is None, reason="fused.c is not compiled here")
def test_values_that_are_not_finite_are_told_as_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_adapters(tmp_path)
    up, down = (torch.full(shape, 3e38) for shape in ((8, 2), (2, 12)))
    to_k = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    named = {f"{to_k}.lora_A.weight": down, f"{to_k}.lora_B.weight": up}
    save_file(named, tmp_path / "one.safetensors")
    write_recipe(tmp_path, **RECIPES["one"])
    messages = []
    for name in ("first", "torch"):
        with pytest.raises(NonFiniteError, match="96 of 96 values are too large") as caught:
            run_recipe(load_recipe(tmp_path / "mini.yaml"), tmp_path / name, verify=False)
        messages.append(str(caught.value))
        monkeypatch.setattr(worker, "load_library", lambda: None)
    assert messages[0] == messages[1]
