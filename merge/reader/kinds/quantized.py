"""Weights that mean nothing without a scale beside them, and those that cannot be read at all.

A scaled float8 file holds `value = float8 * scale` with one scale for a weight or one for each of
its rows. Tools spell the scale differently; whatever it is called, it multiplies.

Source: `scale_weight`, `scaled_fp8`, `weight_scale` and `.comfy_quant` of ComfyUI's `ops.py` and
`quant_ops.py`; `weight_scale` of compressed-tensors and `weight_scale_inv` of transformers'
FineGrainedFP8, where `inv` is of the quantisation and not of what a reader does; `SCB`, `absmax`
and `quant_map` of bitsandbytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from merge.errors import CheckpointError
from merge.header.dtypes import DTYPE_WORDS, element_count
from merge.header.model import TensorSpec

FLOAT8 = ("F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ")
_SCALE_DTYPES = ("F32", "F16", "BF16")
_SCALED_DTYPES = (*FLOAT8, "F16", "BF16", "F32")
_MARKER = "scaled_fp8"

# Endings of a scale, and of the weight that it belongs to.
_SCALES = (
    (".scale_weight", ".weight"),
    ("weight_scale", "weight"),
    ("weight_scale_inv", "weight"),
)
# For the inputs of a layer in a network that computes in float8; a weight is the same without.
_ACTIVATIONS = (".scale_input", ".input_scale", ".input_scale_ub", ".output_scale", ".comfy_quant")
# Ending of a key to the format that writes it.
_UNREADABLE: tuple[tuple[str, str], ...] = (
    (".SCB", "int8 of bitsandbytes"),
    (".weight_format", "int8 of bitsandbytes"),
    (".absmax", "4-bit of bitsandbytes"),
    (".quant_map", "4-bit of bitsandbytes"),
    (".qweight", "GPTQ, AWQ or SVDQuant"),
    (".qzeros", "GPTQ or AWQ"),
    (".g_idx", "GPTQ"),
    (".wscales", "SVDQuant of nunchaku"),
    (".W_q", "HQQ"),
    ("._data", "quanto"),
    ("._scale", "quanto"),
    (".weight_scale_2", "NVFP4"),
    (".weight_zero_point", "integers with a zero point"),
    (".weight_packed", "compressed-tensors in packed integers"),
)


@dataclass(frozen=True, slots=True)
class Quantized:
    """What a file says about scales.

    Attributes:
        scales: Key of a weight to the key of its scale: one number, or one for each row.
        left_out: Other keys of quantisation to the reason why nothing needs them.
    """

    scales: Mapping[str, str]
    left_out: Mapping[str, str]


def find_scales(tensors: Mapping[str, TensorSpec]) -> Quantized:
    """Pair scaled weights with their scales.

    Args:
        tensors: All keys of a model, as one file holds them.

    Raises:
        CheckpointError: weights are integers, or a scale is missing, has no weight or has a form
            that is not read; the message names the key.
    """
    for name in tensors:
        _refuse_unreadable(name)
    scales: dict[str, str] = {}
    left_out: dict[str, str] = {}
    has_marker = False
    for name, spec in tensors.items():
        if name.rpartition(".")[2] == _MARKER:
            has_marker = True
            left_out[name] = "a marker of scaled float8, not a weight"
        elif name.endswith(_ACTIVATIONS):
            left_out[name] = "for computing in float8; the weights do not need it"
        elif (weight := _weight_of(name)) is not None:
            _check_scale(name, spec, weight, tensors)
            if weight in scales:
                raise _unreadable(f"{weight} has two scales: {scales[weight]}, {name}")
            scales[weight] = name
    if scales or has_marker:
        _check_complete(tensors, scales)
    for name, spec in tensors.items():
        is_matrix = name.endswith("weight") and len(spec.shape) > 1
        if is_matrix and spec.dtype.startswith(("I", "U", "BOOL", "F4", "F6")):
            word = DTYPE_WORDS.get(spec.dtype, spec.dtype)
            raise _unreadable(
                f"{name}: its weights are {word}, a quantised form that cannot be read"
            )
    return Quantized(scales, left_out)


def _unreadable(message: str) -> CheckpointError:
    return CheckpointError(
        message, hint="take the model in float16, bfloat16, float32 or float8 with plain scales"
    )


def _refuse_unreadable(name: str) -> None:
    kind = next((kind for ending, kind in _UNREADABLE if name.endswith(ending)), "")
    if not kind and ".quant_state." in name:
        kind = "4-bit of bitsandbytes"
    if kind:
        raise _unreadable(f"{name}: the weights are quantised ({kind}), a form that cannot be read")


def _weight_of(name: str) -> str | None:
    for ending, weight in _SCALES:
        if name.endswith(ending):
            return name.removesuffix(ending) + weight
    return None


def _check_scale(
    name: str, spec: TensorSpec, weight: str, tensors: Mapping[str, TensorSpec]
) -> None:
    found = tensors.get(weight)
    if found is None:
        raise _unreadable(f"{name} is a scale, and the file has no {weight}")
    if found.dtype not in _SCALED_DTYPES:
        word = DTYPE_WORDS.get(found.dtype, found.dtype)
        raise _unreadable(f"{weight} is {word} with a scale, a quantised form that cannot be read")
    count = element_count(spec.shape)
    rows = found.shape[0] if found.shape else 1
    is_row_wise = count == rows and spec.shape[:1] == (rows,)
    if spec.dtype not in _SCALE_DTYPES or not (count == 1 or is_row_wise):
        word = DTYPE_WORDS.get(spec.dtype, spec.dtype)
        raise _unreadable(
            f"{name}: scales of shape {list(spec.shape)} in {word} for {weight} of shape "
            f"{list(found.shape)} are not read; one number, or one for each row, is",
        )


def _check_complete(tensors: Mapping[str, TensorSpec], scales: Mapping[str, str]) -> None:
    """Refuse a file some of whose float8 weights have a scale and others not."""
    for name, spec in tensors.items():
        if spec.dtype in FLOAT8 and name not in scales and name.endswith("weight"):
            raise CheckpointError(
                f"{name} is float8 and has no scale, in a file of scaled float8 weights",
                hint="download the file again, or take the model in another dtype",
            )
