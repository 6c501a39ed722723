"""What a LoRA module is called, and which tensors can have one.

Source: kohya's `lora.py` for the one form, peft as diffusers saves it for the other.
"""

from __future__ import annotations

from collections.abc import Mapping

from merge.plan import TensorPlan

FORMS = ("kohya", "peft")
_KOHYA = {"unet": "lora_unet_", "text_encoder_2": "lora_te2_"}
_TEXT_MODEL = "text_model."


def reason_against(tensor: TensorPlan) -> str:
    """Return why a LoRA cannot hold the delta of a tensor; empty when it can."""
    rank = len(tensor.target.shape)
    if tensor.bakes:
        return "a baked guidance embedding changes a bias, and a LoRA has only matrices"
    if not tensor.key.endswith(".weight"):
        return "a LoRA changes weights only, no biases"
    if "_embedding." in tensor.key and tensor.component != "unet":
        return "an embedding table is no linear layer"
    if rank not in (2, 4):
        return f"a vector has no factors (shape {list(tensor.target.shape)})"
    return ""


def module_name(tensor: TensorPlan, form: str, *, has_two_encoders: bool) -> str:
    """Return what the module of a weight is called.

    Args:
        tensor: The weight.
        form: `kohya` or `peft`.
        has_two_encoders: True for SDXL, whose first encoder is `lora_te1_`.
    """
    path = tensor.key.removesuffix(".weight")
    if form == "peft":
        return f"{tensor.component}.{path}"
    if tensor.component != "unet" and not path.startswith((_TEXT_MODEL, "text_projection")):
        # Newer transformers leave it out of their keys, and every reader of this form expects it.
        path = _TEXT_MODEL + path
    first = "lora_te1_" if has_two_encoders else "lora_te_"
    return _KOHYA.get(tensor.component, first) + path.replace(".", "_")


def factor_names(module: str, form: str) -> Mapping[str, str]:
    """Return the keys of a module's `down` and `up`, and in kohya's form its `alpha`."""
    if form == "peft":
        return {"down": f"{module}.lora_A.weight", "up": f"{module}.lora_B.weight"}
    return {
        "down": f"{module}.lora_down.weight",
        "up": f"{module}.lora_up.weight",
        "alpha": f"{module}.alpha",
    }
