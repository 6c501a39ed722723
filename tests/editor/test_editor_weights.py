"""Weights from memory in a network's place: what does not fit changes nothing."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save
from transformers import CLIPTextModel

from merge.editor.batches import edit
from merge.editor.load import load_editor
from merge.editor.settings import EditSettings
from merge.editor.weights import build_network, put_tensors, view_tensors
from merge.errors import CheckpointError
from merge.header.parse import parse_header, parse_length
from merge.verify.drawings import draw_picture

UNET = "unet/diffusion_pytorch_model.safetensors"
TEXT = "text_encoder/model.safetensors"


def small() -> torch.nn.Module:
    network = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1))
    for value in network.parameters():
        value.data.zero_()
    return network


def values_for(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {key: torch.ones_like(value) for key, value in network.state_dict().items()}


# Into a network that is there -------------------------------------------------------------------


def test_values_change_in_place_and_in_the_networks_own_dtype() -> None:
    network = small().half()
    places = {key: value.data_ptr() for key, value in network.state_dict().items()}
    values = {key: torch.full_like(v, 0.1).float() for key, v in network.state_dict().items()}
    put_tensors(network, values, "unet")
    for key, value in network.state_dict().items():
        assert value.data_ptr() == places[key]
        assert value.dtype == torch.float16
        assert value.equal(torch.full_like(value, 0.1))
        assert value.requires_grad is False


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda v: v.pop("0.weight"), "unet: there are no weights for 0.weight"),
        (lambda v: v.update({"2.bias": torch.ones(1)}), "unet: there is no place for 2.bias"),
        (
            lambda v: v.update({"1.bias": torch.ones(2)}),
            "unet: its config wants other shapes of 1.bias",
        ),
        (
            lambda v: v.update({"1.weight": torch.ones(3)}),
            "unet: its config wants other shapes of 1.weight",
        ),
        (
            lambda v: v.clear(),
            "unet: there are no weights for 0.bias, 0.weight, 1.bias, 1.weight",
        ),
    ],
    ids=["missing", "unknown", "shape", "squeezed", "nothing"],
)
def test_what_does_not_fit_changes_nothing(change: Any, problem: str) -> None:
    network = small()
    values = values_for(network)
    change(values)
    with pytest.raises(CheckpointError) as caught:
        put_tensors(network, values, "unet")
    assert caught.value.message == problem
    assert all(not value.any() for value in network.state_dict().values())


def test_keys_may_be_those_of_files_of_any_age() -> None:
    network = torch.nn.ModuleDict({"encoder": torch.nn.Linear(2, 2)})
    whole = torch.nn.ModuleDict({"text_model": network})
    for module in (network, whole):
        for prefix in ("", "text_model."):
            values = {f"{prefix}encoder.weight": torch.ones(2, 2)}
            values |= {f"{prefix}encoder.bias": torch.ones(2)}
            # An old buffer, which no module has any more.
            values |= {f"{prefix}embeddings.position_ids": torch.arange(3)}
            for value in module.parameters():
                value.data.zero_()
            put_tensors(module, values, "text_encoder")
            assert all(value.all() for value in module.state_dict().values())


def test_tensors_are_seen_in_a_file_without_a_copy() -> None:
    tensors = {
        "a": torch.randn(3, 2),
        "b": torch.randn(5).half(),
        "c": torch.arange(4),
        "d": torch.tensor(2.0).bfloat16(),
        "e": torch.empty(0, 3),
        "f": torch.tensor([True, False]),
    }
    data = memoryview(bytearray(save(tensors)))
    length = parse_length(bytes(data[:8]), data.nbytes)
    header = parse_header(bytes(data[8 : 8 + length]), data.nbytes)
    found = view_tensors(data, header)
    assert found.keys() == tensors.keys()
    for key, value in tensors.items():
        assert found[key].dtype == value.dtype
        assert found[key].equal(value)
    found["a"].zero_()
    assert not view_tensors(data, header)["a"].any()


# A network of a config --------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["tiny_sd15", "tiny_sdxl"])
def test_a_built_unet_is_the_one_that_diffusers_loads(
    request: pytest.FixtureRequest, arch: str
) -> None:
    folder = request.getfixturevalue(arch) / "target" / "unet"
    built = build_network(
        folder,
        ("diffusers", "UNet2DConditionModel"),
        load_file(folder / "diffusion_pytorch_model.safetensors"),
        torch.float32,
    )
    loaded = UNet2DConditionModel.from_pretrained(folder, torch_dtype=torch.float32)
    same_state(built, loaded)
    generator = torch.Generator().manual_seed(0)
    added = None
    if arch == "tiny_sdxl":
        added = {"text_embeds": torch.randn(2, 20, generator=generator)}
        added["time_ids"] = torch.full((2, 6), 64.0)
    inputs = torch.randn(2, 8, 8, 8, generator=generator)
    states = torch.randn(2, 77, 32, generator=generator)
    with torch.inference_mode():
        first, second = (
            network(inputs, 499, states, added_cond_kwargs=added, return_dict=False)[0]
            for network in (built, loaded)
        )
    assert first.equal(second)


def test_a_built_text_encoder_is_the_one_that_transformers_loads(tiny_sd15: Path) -> None:
    folder = tiny_sd15 / "target" / "text_encoder"
    tensors = load_file(folder / "model.safetensors")
    built = build_network(folder, ("transformers", "CLIPTextModel"), tensors, torch.float32)
    loaded = CLIPTextModel.from_pretrained(folder, dtype=torch.float32)
    same_state(built, loaded)
    tokens = torch.arange(77)[None]
    with torch.inference_mode():
        first, second = (network(tokens).last_hidden_state for network in (built, loaded))
    assert first.equal(second)


def same_state(one: torch.nn.Module, other: torch.nn.Module) -> None:
    first, second = one.state_dict(), other.state_dict()
    assert first.keys() == second.keys()
    assert all(
        value.equal(second[key]) and value.dtype == second[key].dtype
        for key, value in first.items()
    )
    assert one.training is other.training is False


def test_a_network_lacks_no_weight_silently(tiny_sd15: Path) -> None:
    for name, entry, key in (
        (UNET, ("diffusers", "UNet2DConditionModel"), "conv_out.bias"),
        (TEXT, ("transformers", "CLIPTextModel"), "text_model.final_layer_norm.bias"),
    ):
        folder = (tiny_sd15 / "target" / name).parent
        tensors = load_file(tiny_sd15 / "target" / name)
        del tensors[key]
        with pytest.raises(CheckpointError, match=f"{folder.name}: there are no weights for"):
            build_network(folder, entry, tensors, torch.float32)


def test_an_editor_with_weights_of_memory_edits_as_one_of_the_folder(
    tiny_sd15: Path, tmp_path: Path
) -> None:
    target = tiny_sd15 / "target"
    bare = tmp_path / "bare"
    shutil.copytree(target, bare)
    (bare / UNET).unlink()
    (bare / TEXT).unlink()
    settings = EditSettings(steps=2, resolution=64)
    picture = draw_picture("house", 64)
    expected = edit(load_editor(target, device="cpu"), picture, "make it blue", settings)
    weights = {"unet": load_file(target / UNET), "text_encoder": load_file(target / TEXT)}
    found = edit(
        load_editor(bare, device="cpu", weights=weights), picture, "make it blue", settings
    )
    assert np.array_equal(found.image, expected.image)
    with pytest.raises(CheckpointError):
        load_editor(bare, device="cpu")
