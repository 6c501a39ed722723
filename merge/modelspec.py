"""The words of ModelSpec 1.0.1, which headers of weight files use to say what they hold.

Source: https://github.com/Stability-AI/ModelSpec; architectures of edit models as ComfyUI writes
them.
"""

from __future__ import annotations

VERSION = "1.0.1"
# Where ModelSpec's word is another than diffusers'.
_PREDICTIONS = {"v_prediction": "v"}
# Family, and whether it edits.
_ARCHITECTURES = {
    ("sd15", False): "stable-diffusion-v1",
    ("sd15", True): "stable-diffusion-v1-edit",
    ("sd21", False): "stable-diffusion-v2",
    ("sd21", True): "stable-diffusion-v2-edit",
    ("sdxl", False): "stable-diffusion-xl-v1-base",
    ("sdxl", True): "stable-diffusion-xl-v1-edit",
}


def modelspec(
    family: str, *, is_edit: bool, implementation: str, title: str, prediction_type: str
) -> dict[str, str]:
    """Return the strings that every weight file of ours has.

    Args:
        family: `sd15`, `sd21` or `sdxl`.
        is_edit: Whether its UNet takes a picture's latents too.
        implementation: Whose key names it has: `diffusers`, or a single file's.
        title: A name for people.
        prediction_type: In diffusers' words.
    """
    return {
        "modelspec.sai_model_spec": VERSION,
        "modelspec.architecture": _ARCHITECTURES[family, is_edit],
        "modelspec.implementation": implementation,
        "modelspec.title": title,
        "modelspec.prediction_type": prediction_word(prediction_type),
    }


def prediction_word(prediction_type: str) -> str:
    """Return ModelSpec's word for what diffusers calls a prediction."""
    return _PREDICTIONS.get(prediction_type, prediction_type)
