"""What a LoRA module is called, and which tensors can have one.

Source: kohya's `lora.py` for the one form, peft as diffusers saves it for the other.
"""

from __future__ import annotations

from collections.abc import Mapping

from merge.family.model import Family
from merge.plan.model import TensorPlan

FORMS = ("kohya", "peft")


def reason_against(tensor: TensorPlan, family: Family) -> str:
    """Return why a LoRA cannot hold the delta of a tensor; empty when it can."""
    rank = len(tensor.target.shape)
    if tensor.bakes:
        return "a baked guidance embedding changes a bias, and a LoRA has only matrices"
    if not tensor.key.endswith(".weight"):
        return "a LoRA changes weights only, no biases"
    if "_embedding." in tensor.key and tensor.component != family.main.name:
        return "an embedding table is no linear layer"
    if rank not in (2, 4):
        return f"a vector has no factors (shape {list(tensor.target.shape)})"
    return ""


def module_name(tensor: TensorPlan, form: str, family: Family) -> str:
    """Return what the module of a weight is called.

    Args:
        tensor: The weight.
        form: `kohya` or `peft`.
        family: Its architecture.
    """
    path = tensor.key.removesuffix(".weight")
    if form == "peft":
        return f"{tensor.component}.{path}"
    part = family.component(tensor.component)
    assert part is not None
    assert part.loras is not None
    # Newer transformers leave a part of it out, and every reader of this form expects all of it.
    path = part.loras.paths([tensor.key])[tensor.key][-1] if part.inner else path
    return part.loras.flat[0] + path.replace(".", "_")


def factor_names(module: str, form: str) -> Mapping[str, str]:
    """Return the keys of a module's `down` and `up`, and in kohya's form its `alpha`."""
    if form == "peft":
        return {"down": f"{module}.lora_A.weight", "up": f"{module}.lora_B.weight"}
    return {
        "down": f"{module}.lora_down.weight",
        "up": f"{module}.lora_up.weight",
        "alpha": f"{module}.alpha",
    }
