"""Which part of a module a key holds, told by how it ends."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

ALPHA, MAGNITUDE = "alpha", "magnitude"
# Whole differences of a weight, and of the bias beside it.
DIFF, DIFF_BIAS = "diff", "diff_b"

_LYCORIS_ROLES = (
    *(f"hada_{role}" for role in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")),
    *(f"lokr_{role}" for role in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")),
)
# Ending to role; the roles of the products are those of `delta_rows`, after the form's own prefix.
_ROLES = {
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".lora_mid.weight": "mid",
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    ".lora_linear_layer.down.weight": "down",
    ".lora_linear_layer.up.weight": "up",
    **{f".{role}": role for role in _LYCORIS_ROLES},
    ".diff": DIFF,
    ".diff_b": DIFF_BIAS,
    ".w_norm": DIFF,
    ".b_norm": DIFF_BIAS,
    ".alpha": ALPHA,
    ".dora_scale": MAGNITUDE,
    ".lora_magnitude_vector": MAGNITUDE,
    ".lora_magnitude_vector.weight": MAGNITUDE,
}
# peft puts an adapter's own name, mostly `default`, between the factor's and `weight`.
_NAMED = re.compile(
    r"(?P<stem>.+)\.(?P<role>lora_A|lora_B|lora_down|lora_up|lora_magnitude_vector)(?:_\d+)?"
    r"\.(?P<adapter>[^.]+)(?:\.weight)?"
)
_NAMED_ROLES = {
    "lora_A": "down",
    "lora_down": "down",
    "lora_B": "up",
    "lora_up": "up",
    "lora_magnitude_vector": MAGNITUDE,
}
# The name of a processor's projection ends in `_lora`, and is part of the module's name.
_PROCESSOR_ROLES = {"_lora.down.weight": "down", "_lora.up.weight": "up"}
_TURNS = "it turns the weight that it is applied to"
# Endings of other kinds of adapters, and why they are refused.
_REFUSED: tuple[tuple[str, str], ...] = (
    (".on_input", "IA3 is not supported"),
    (".ia3_l", "IA3 is not supported"),
    *((f".{part}.weight", "GLoRA is not supported") for part in ("a1", "a2", "b1", "b2", "bm")),
    (".boft_R", f"BOFT is not supported: {_TURNS}"),
    (".boft_s", f"BOFT is not supported: {_TURNS}"),
    (".oft_blocks", f"OFT is not supported: {_TURNS}"),
    (".oft_diag", f"OFT is not supported: {_TURNS}"),
    (".rescale", f"OFT is not supported: {_TURNS}"),
    (".oft_R.weight", f"OFT is not supported: {_TURNS}"),
    (".oft_r", f"OFT is not supported: {_TURNS}"),
    (".vera_lambda_b", "VeRA is not supported: its factors are drawn from a seed"),
    (".vera_lambda_d", "VeRA is not supported: its factors are drawn from a seed"),
    ("vera_A", "VeRA is not supported: its factors are drawn from a seed"),
    ("vera_B", "VeRA is not supported: its factors are drawn from a seed"),
    *(
        (f".{part}.bias", "a LoRA with a bias is not supported")
        for part in ("lora_A", "lora_B", "lora_down", "lora_up", "lora_B.default")
    ),
    (".set_weight", "a replaced weight (ComfyUI) is not supported"),
    (".reshape_weight", "a reshaped weight (ComfyUI) is not supported"),
    (".lora_embedding_A", "a LoRA of an embedding is not supported"),
    (".lora_embedding_B", "a LoRA of an embedding is not supported"),
)
# OFT's blocks one by one, as a ParameterList stores them.
_BLOCK = re.compile(r"(?<=\.oft_blocks)\.\d+$")
# Beginnings of what trainers store beside a LoRA.
_BESIDE: tuple[tuple[str, str], ...] = (
    ("bundle_emb.", "an embedding stored beside the LoRA (OneTrainer), which cannot be merged"),
)
UNKNOWN = "not a LoRA key that is known"
_ENDINGS = tuple(
    suffix
    for suffix in (*_ROLES, *_PROCESSOR_ROLES, *(suffix for suffix, _ in _REFUSED))
    if suffix not in (".alpha", ".rescale")
)


def is_lora(names: Iterable[str]) -> bool:
    """Return True when the keys are those of an adapter of any kind, supported or not."""
    return any(
        name.endswith(_ENDINGS) or _NAMED.fullmatch(name) or _BLOCK.search(name) for name in names
    )


def has_magnitudes(names: Iterable[str]) -> bool:
    """Return True when some of the keys are DoRA's norms."""
    endings = tuple(suffix for suffix, role in _ROLES.items() if role == MAGNITUDE)
    return any(name.endswith(endings) or ".lora_magnitude_vector." in name for name in names)


def down_factors(shapes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the name of each module that is known and the shape of its `down`."""
    for name, shape in shapes.items():
        try:
            stem, role = split_role(name)
        except ValueError:
            continue
        if role == "down":
            yield stem, shape


def split_role(name: str) -> tuple[str, str]:
    """Split a key into the module's name and the role.

    Raises:
        ValueError: it is no key of a supported adapter; the message is the reason.
    """
    for suffix, role in _ROLES.items():
        if name.endswith(suffix):
            return name.removesuffix(suffix), role
    for suffix, role in _PROCESSOR_ROLES.items():
        if name.endswith(suffix):
            return name.removesuffix(suffix) + "_lora", role
    whole = _BLOCK.sub("", name)
    for suffix, why in _REFUSED:
        if whole.endswith(suffix):
            raise ValueError(why)
    if match := _NAMED.fullmatch(name):
        return match["stem"], _NAMED_ROLES[match["role"]]
    raise ValueError(next((why for prefix, why in _BESIDE if name.startswith(prefix)), UNKNOWN))
