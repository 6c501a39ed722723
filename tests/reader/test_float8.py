"""float8 weights, plain and with scales: torch and numpy say what their values are."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from merge import convert, load_recipe, run_recipe
from merge.errors import CheckpointError, PlanError
from merge.header.dtypes import tensor_bytes
from merge.header.model import TensorSpec
from merge.reader.kinds.quantized import find_scales
from merge.writer.copies.scaled import to_float32
from tests.mini import (
    Tensors,
    bits,
    numpy_round,
    plan_of,
    read_output,
    write_models,
    write_recipe,
    write_unet,
)

KINDS = {
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}
CONV = "down_blocks.0.resnets.0.conv1.weight"
ATTENTION = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"
UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize("kind", KINDS)
def test_every_code_has_the_value_that_torch_gives_it(kind: str) -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    found = to_float32(memoryview(codes.numpy().data), kind)
    np.testing.assert_array_equal(found, codes.view(KINDS[kind]).float().numpy())


def scaled(tensor: torch.Tensor, *, by_row: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise as tools do: the largest value of the tensor, or of each row, becomes 448."""
    values = tensor.float()
    largest = values.reshape(len(values), -1).abs().amax(1) if by_row else values.abs().amax()
    scale = largest / 448
    shaped = scale.reshape(-1, *[1] * (values.dim() - 1)) if by_row else scale
    return (values / shaped).to(torch.float8_e4m3fn), scale


def value(stored: torch.Tensor, scale: torch.Tensor | None) -> np.ndarray:
    values = stored.float().numpy()
    if scale is None:
        return values
    numbers = scale.float().numpy().reshape(-1)
    shape = (-1, *[1] * (values.ndim - 1)) if numbers.size > 1 else ()
    product: np.ndarray = values * numbers.reshape(shape)
    assert product.dtype == np.float32
    return product


def write(folder: Path, models: dict[str, dict[str, torch.Tensor]]) -> None:
    for role, tensors in models.items():
        write_unet(folder / role, tensors)


def check(found: Tensors, key: str, parents: list[np.ndarray], weight: float) -> None:
    target, distilled, base = parents
    expected = target + (distilled - base) * np.float32(weight)
    np.testing.assert_array_equal(bits(found[key]), numpy_round(expected, torch.float16), key)


@pytest.mark.parametrize("kind", ["F8_E4M3", "F8_E5M2"])
@pytest.mark.parametrize("roles", [("target",), ("base", "distilled"), ("target", "distilled")])
def test_plain_float8_is_merged_exactly(tmp_path: Path, kind: str, roles: tuple[str, ...]) -> None:
    models = write_models(tmp_path)
    for role in roles:
        models[role] = {k: v.to(KINDS[kind]) for k, v in models[role].items()}
    write(tmp_path, models)
    recipe = load_recipe(write_recipe(tmp_path, weight=0.7))
    run_recipe(recipe, tmp_path / "out", device="cpu", verify=False)
    found = read_output(tmp_path / "out")
    for key in (CONV, ATTENTION, "conv_in.bias"):
        parents = [value(models[role][key], None) for role in ("target", "distilled", "base")]
        check(found, key, parents, 0.7)
    # Nothing is added here: it is cast.
    first = value(models["target"]["conv_in.weight"], None)
    np.testing.assert_array_equal(bits(found["conv_in.weight"]), numpy_round(first, torch.float16))


SPELLINGS = {
    "comfy, old": ("scale_weight", {"scaled_fp8": torch.zeros(2).to(torch.float8_e4m3fn)}),
    "comfy": ("weight_scale", {}),
    "fine-grained": ("weight_scale_inv", {}),
}


@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("threads", [1, 2])
def test_scaled_float8_is_merged_as_value_times_scale(
    tmp_path: Path, spelling: str, by_row: bool, threads: int
) -> None:
    models = write_models(tmp_path)
    name, extra = SPELLINGS[spelling]
    values: dict[tuple[str, str], np.ndarray] = {}
    for role in ("target", "distilled", "base"):
        stored = dict(extra)
        for key, tensor in models[role].items():
            values[role, key] = value(tensor, None)
            stored[key] = tensor
            if tensor.dim() > 1 and role != "base":
                stored[key], scale = scaled(tensor, by_row=by_row)
                values[role, key] = value(stored[key], scale)
                stored[key.replace("weight", name)] = scale
                stored[key.replace("weight", "input_scale")] = torch.tensor(1.0)
        models[role] = stored
    write(tmp_path, models)
    recipe = load_recipe(write_recipe(tmp_path, weight=0.7))
    run_recipe(recipe, tmp_path / "out", device="cpu", verify=False, threads=threads)
    found = read_output(tmp_path / "out")
    assert not [key for key in found if "scale" in key]
    for key in (CONV, ATTENTION):
        parents = [values[role, key] for role in ("target", "distilled", "base")]
        check(found, key, parents, 0.7)
    # Of the widened convolution, which gets no delta, the values are scaled all the same.
    expected = numpy_round(values["target", "conv_in.weight"], torch.float16)
    np.testing.assert_array_equal(bits(found["conv_in.weight"]), expected)


@pytest.mark.parametrize("by_row", [False, True])
def test_scales_reach_every_form_of_the_sum(tmp_path: Path, by_row: bool) -> None:
    """A LoRA, a method that needs whole tensors, and rows larger than a block."""
    models = write_models(tmp_path)
    key = "time_embedding.linear_1.weight"
    big = torch.randn(6, 300_000, generator=torch.Generator().manual_seed(0)) * 0.1
    for role in ("base", "distilled", "target"):
        models[role][key] = big.half() + len(role)
    stored, scale = scaled(models["target"][key], by_row=by_row)
    models["target"] |= {key: stored, key.replace("weight", "weight_scale"): scale}
    write(tmp_path, models)
    down, up = torch.randn(2, 300_000).half(), torch.randn(6, 2).half()
    stem = "lora_unet_time_embedding_linear_1"
    lora = {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}
    save_file(lora, tmp_path / "lora.safetensors")
    target = value(stored, scale)
    recipe = load_recipe(
        write_recipe(
            tmp_path,
            models={"distilled": "./lora.safetensors", "target": "./target"},
            out_dtype="float32",
        )
    )
    run_recipe(recipe, tmp_path / "lora", device="cpu", verify=False)
    delta = (up.double() @ down.double()).float().numpy()
    np.testing.assert_array_equal(read_output(tmp_path / "lora")[key].numpy(), target + delta)
    recipe = load_recipe(
        write_recipe(tmp_path, method="slerp", params={"t": 0.0}, out_dtype="float32")
    )
    run_recipe(recipe, tmp_path / "slerp", device="cpu", verify=False)
    found = read_output(tmp_path / "slerp")[key].numpy()
    np.testing.assert_allclose(found, target, rtol=1e-6)


def test_factors_of_a_lora_may_be_float8(tmp_path: Path) -> None:
    models = write_models(tmp_path)
    down, up = (torch.randn(s).to(torch.float8_e4m3fn) for s in ((2, 8, 3, 3), (8, 2, 1, 1)))
    stem = "lora_unet_down_blocks_0_resnets_0_conv1"
    tensors = {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}
    save_file(tensors, tmp_path / "lora.safetensors")
    places = {"distilled": "./lora.safetensors", "target": "./target"}
    recipe = load_recipe(write_recipe(tmp_path, models=places, out_dtype="float32"))
    run_recipe(recipe, tmp_path / "out", device="cpu", verify=False)
    delta = up.double().reshape(8, 2) @ down.double().reshape(2, -1)
    expected = models["target"][CONV].float() + delta.float().reshape(8, 8, 3, 3)
    assert torch.equal(read_output(tmp_path / "out")[CONV], expected)


# Conversion -------------------------------------------------------------------------------------


@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_a_scaled_single_file_becomes_a_folder_of_values(
    request: pytest.FixtureRequest, tmp_path: Path, family: str, by_row: bool
) -> None:
    import diffusers

    target: Path = request.getfixturevalue(f"tiny_{family}") / "target"
    convert(target, tmp_path / "plain.safetensors")
    convert(tmp_path / "plain.safetensors", tmp_path / "plain", config=target)
    stored: dict[str, torch.Tensor] = {}
    values = {}
    for key, tensor in load_file(tmp_path / "plain.safetensors").items():
        stored[key], values[key] = tensor, tensor
        if tensor.dim() > 1 and tensor.is_floating_point() and key.endswith("weight"):
            stored[key], scale = scaled(tensor, by_row=by_row)
            stored[f"{key}_scale"] = scale
            values[key] = torch.from_numpy(value(stored[key], scale))
    save_file(stored, tmp_path / "scaled.safetensors")
    save_file(values, tmp_path / "values.safetensors")
    for name in ("scaled", "values"):
        convert(tmp_path / f"{name}.safetensors", tmp_path / name, config=target)
    for path in sorted((tmp_path / "values").rglob("*.safetensors")):
        expected = load_file(path)
        found = load_file(tmp_path / "scaled" / path.relative_to(tmp_path / "values"))
        assert found.keys() == expected.keys()
        for key, tensor in expected.items():
            assert found[key].dtype == tensor.dtype, key
            assert torch.equal(found[key], tensor), key
    diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "scaled" / "unet")
    # And back, where the values are no longer scaled.
    convert(tmp_path / "scaled", tmp_path / "again.safetensors")
    again = load_file(tmp_path / "again.safetensors")
    assert all(torch.equal(again[key], tensor) for key, tensor in values.items())


def test_a_scaled_folder_becomes_a_file_of_values(tiny_sdxl: Path, tmp_path: Path) -> None:
    """Query, key and value of one layer have a scale each and become one tensor."""
    folder = tmp_path / "folder"
    shutil.copytree(tiny_sdxl / "target", folder)
    path = folder / "text_encoder_2" / "model.safetensors"
    plain, quantised = load_file(path), {}
    for key, tensor in plain.items():
        quantised[key] = tensor
        if tensor.dim() == 2:
            quantised[key], quantised[f"{key}_scale"] = scaled(tensor, by_row=True)
    save_file(quantised, path, {"format": "pt"})
    convert(folder, tmp_path / "one.safetensors")
    found = load_file(tmp_path / "one.safetensors")
    layer = "text_model.encoder.layers.0.self_attn."
    parts = [
        value(
            quantised[f"{layer}{part}_proj.weight"], quantised[f"{layer}{part}_proj.weight_scale"]
        )
        for part in "qkv"
    ]
    block = "conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight"
    np.testing.assert_array_equal(found[block].numpy(), np.concatenate(parts))
    projection = value(
        quantised["text_projection.weight"], quantised["text_projection.weight_scale"]
    )
    name = "conditioner.embedders.1.model.text_projection"
    np.testing.assert_array_equal(found[name].numpy(), projection.T)


# Refusals ---------------------------------------------------------------------------------------


def specs(**tensors: tuple[str, tuple[int, ...]]) -> dict[str, TensorSpec]:
    return {
        name.replace("__", "."): TensorSpec(name, dtype, shape, 0, tensor_bytes(dtype, shape))
        for name, (dtype, shape) in tensors.items()
    }


WEIGHT = ("F8_E4M3", (8, 4))


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"a__weight": ("I8", (8, 4)), "a__SCB": ("F32", (8,))}, r"a\.SCB: .*int8 of bitsandbytes"),
        ({"a__weight": ("U8", (16, 1)), "a__weight__absmax": ("F32", (1,))}, "4-bit of bitsand"),
        ({"a__qweight": ("I32", (8, 4))}, r"a\.qweight: .*GPTQ"),
        ({"a__weight__s": ("F32", ()), "a__weight___data": ("I8", (8, 4))}, "quanto"),
        ({"a__weight": ("I8", (8, 4))}, r"a\.weight: its weights are int8"),
        ({"a__weight": ("I8", (8, 4)), "a__weight_scale": ("F32", (8,))}, "int8 with a scale"),
        ({"a__weight_scale": ("F32", ())}, r"a\.weight_scale is a scale, .* no a\.weight"),
        ({"a__weight": WEIGHT, "a__weight_scale": ("F32", (4,))}, r"scales of shape \[4\]"),
        ({"a__weight": WEIGHT, "a__weight_scale": ("F32", (2, 2))}, r"scales of shape \[2, 2\]"),
        ({"a__weight": WEIGHT, "a__weight_scale": ("F8_E8M0", (8, 1))}, "float8_e8m0fnu"),
        (
            {"a__weight": WEIGHT, "a__weight_scale": ("F32", ()), "b__weight": WEIGHT},
            r"b\.weight is float8 and has no scale",
        ),
        ({"scaled_fp8": ("F8_E4M3", (2,)), "b__weight": WEIGHT}, r"b\.weight .* has no scale"),
        (
            {"a__weight": WEIGHT, "a__weight_scale": ("F32", ()), "a__scale_weight": ("F32", ())},
            r"a\.weight has two scales",
        ),
    ],
)
def test_what_cannot_be_read_is_refused_by_its_name(
    tensors: dict[str, tuple[str, tuple[int, ...]]], words: str
) -> None:
    with pytest.raises(CheckpointError, match=words):
        find_scales(specs(**tensors))


def test_an_int8_target_is_refused_and_not_copied(tmp_path: Path) -> None:
    models = write_models(tmp_path)
    models["target"][ATTENTION] = torch.ones(8, 12, dtype=torch.int8)
    models["target"][ATTENTION.replace("weight", "SCB")] = torch.ones(8)
    write(tmp_path, models)
    write_recipe(tmp_path)
    with pytest.raises(CheckpointError, match=r"target \(target\): .*SCB: .*bitsandbytes"):
        plan_of(tmp_path)


def test_an_integer_that_something_is_added_to_is_an_error(tmp_path: Path) -> None:
    models = write_models(tmp_path)
    models["target"]["conv_in.bias"] = torch.ones(8, dtype=torch.int32)
    write(tmp_path, models)
    write_recipe(tmp_path)
    with pytest.raises(PlanError, match=r"conv_in\.bias: int32 in the target, and distilled adds"):
        plan_of(tmp_path)


def test_merged_weights_are_not_written_in_float8(tmp_path: Path) -> None:
    models = write_models(tmp_path)
    models["target"] = {k: v.to(torch.float8_e4m3fn) for k, v in models["target"].items()}
    write(tmp_path, models)
    write_recipe(tmp_path, out_dtype="keep")
    with pytest.raises(PlanError, match="float8_e4m3fn in the target, and merged weights are not"):
        plan_of(tmp_path)


def test_a_nan_of_float8_is_found(tmp_path: Path) -> None:
    from merge.errors import NonFiniteError

    models = write_models(tmp_path)
    models["base"][CONV] = models["base"][CONV].to(torch.float8_e4m3fn)
    models["base"][CONV].view(torch.uint8)[0, 0, 0, 0] = 0x7F
    write(tmp_path, models)
    recipe = load_recipe(write_recipe(tmp_path))
    with pytest.raises(NonFiniteError, match=rf"{CONV}: 1 of 576 values are NaN .* in base"):
        run_recipe(recipe, tmp_path / "out", device="cpu", verify=False)


def test_the_plan_says_what_is_scaled(tmp_path: Path) -> None:
    models = write_models(tmp_path)
    stored, scale = scaled(models["target"][CONV], by_row=False)
    models["target"] |= {
        CONV: stored,
        CONV.replace("weight", "weight_scale"): scale,
        CONV.replace("weight", "comfy_quant"): torch.zeros(30, dtype=torch.uint8),
    }
    write(tmp_path, models)
    write_recipe(tmp_path)
    plan = plan_of(tmp_path)
    (row,) = (row for row in plan.tensors if row.key == CONV)
    assert row.target.dtype == "F8_E4M3"
    assert row.target.scale is not None
    left = {item.key: item.reason for item in plan.left_out if item.model == "target"}
    assert left == {
        CONV.replace("weight", "comfy_quant"): "for computing in float8; the weights do not need it"
    }
