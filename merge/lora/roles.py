"""Which part of a module a key holds, told by how it ends."""

from __future__ import annotations

from collections.abc import Iterable

ALPHA, MAGNITUDE = "alpha", "magnitude"

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
    ".lora_A.default.weight": "down",
    ".lora_B.default.weight": "up",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    ".lora_linear_layer.down.weight": "down",
    ".lora_linear_layer.up.weight": "up",
    **{f".{role}": role for role in _LYCORIS_ROLES},
    ".alpha": ALPHA,
    ".dora_scale": MAGNITUDE,
    ".lora_magnitude_vector": MAGNITUDE,
    ".lora_magnitude_vector.weight": MAGNITUDE,
    ".lora_magnitude_vector.default": MAGNITUDE,
    ".lora_magnitude_vector.default.weight": MAGNITUDE,
}
# The name of a processor's projection ends in `_lora`, and is part of the module's name.
_PROCESSOR_ROLES = {"_lora.down.weight": "down", "_lora.up.weight": "up"}
# Endings of other kinds of adapters, and why they are refused.
_REFUSED: tuple[tuple[str, str], ...] = (
    (".diff", "a full difference (LyCORIS) is not supported; give the whole model instead"),
    (".diff_b", "a difference of a bias (LyCORIS) is not supported"),
    (".w_norm", "a norm's difference (LyCORIS) is not supported"),
    (".b_norm", "a norm's difference (LyCORIS) is not supported"),
    (".on_input", "IA3 is not supported"),
    *((f".{part}.weight", "GLoRA is not supported") for part in ("a1", "a2", "b1", "b2", "bm")),
    (".oft_blocks", "OFT is not supported: it turns the weight that it is applied to"),
    (".oft_diag", "OFT is not supported: it turns the weight that it is applied to"),
    (".rescale", "OFT is not supported: it turns the weight that it is applied to"),
    (".oft_R.weight", "OFT is not supported: it turns the weight that it is applied to"),
    *(
        (f".{part}.bias", "a LoRA with a bias is not supported")
        for part in ("lora_A", "lora_B", "lora_down", "lora_up", "lora_B.default")
    ),
    (".set_weight", "a replaced weight (ComfyUI) is not supported"),
    (".lora_embedding_A", "a LoRA of an embedding is not supported"),
    (".lora_embedding_B", "a LoRA of an embedding is not supported"),
)
UNKNOWN = "not a LoRA key that is known"
_ENDINGS = tuple(
    suffix
    for suffix in (*_ROLES, *_PROCESSOR_ROLES, *(suffix for suffix, _ in _REFUSED))
    if suffix not in (".alpha", ".rescale")
)


def is_lora(names: Iterable[str]) -> bool:
    """Return True when the keys are those of an adapter of any kind, supported or not."""
    return any(name.endswith(_ENDINGS) for name in names)


def has_magnitudes(names: Iterable[str]) -> bool:
    """Return True when some of the keys are DoRA's row norms."""
    endings = tuple(suffix for suffix, role in _ROLES.items() if role == MAGNITUDE)
    return any(name.endswith(endings) for name in names)


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
    raise ValueError(next((why for suffix, why in _REFUSED if name.endswith(suffix)), UNKNOWN))
