"""The words of ModelSpec 1.0.1, which headers of weight files use to say what they hold.

Source: https://github.com/Stability-AI/ModelSpec; architectures of edit models as ComfyUI writes
them.
"""

from __future__ import annotations

from merge.family.model import Family

VERSION = "1.0.1"
# Where ModelSpec's word is another than diffusers'.
_PREDICTIONS = {"v_prediction": "v"}


def modelspec(
    family: Family, *, is_edit: bool, implementation: str, title: str, prediction_type: str
) -> dict[str, str]:
    """Return the strings that every weight file of ours has.

    Args:
        family: Its architecture.
        is_edit: Whether its main component takes a picture too.
        implementation: Whose key names it has: `diffusers`, or a single file's.
        title: A name for people.
        prediction_type: In diffusers' words.
    """
    return {
        "modelspec.sai_model_spec": VERSION,
        "modelspec.architecture": family.modelspec[is_edit],
        "modelspec.implementation": implementation,
        "modelspec.title": title,
        "modelspec.prediction_type": prediction_word(prediction_type),
    }


def prediction_word(prediction_type: str) -> str:
    """Return ModelSpec's word for what diffusers calls a prediction."""
    return _PREDICTIONS.get(prediction_type, prediction_type)
