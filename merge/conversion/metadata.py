"""The strings in the headers of converted files."""

from __future__ import annotations

from collections.abc import Mapping

from merge.errors import CheckpointError
from merge.family.model import Recognised
from merge.family.modelspec import modelspec, prediction_word
from merge.family.registry import main_names
from merge.plan.model import DIGEST_KEY

# What a main component's header says that is as true of the single file.
_KEPT = (DIGEST_KEY, "modelspec.resolution", "modelspec.merged_from")
CONVERTIBLE_HINT = "Stable Diffusion 1.x and XL models can be converted"


def single_file_metadata(
    found: Recognised,
    title: str,
    *,
    prediction_type: str = "epsilon",
    inherited: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Return the header strings of a single file.

    Args:
        found: Its main component.
        title: A name for people.
        prediction_type: Of the scheduler, in diffusers' words.
        inherited: Header of the component that it is made from; digest, resolution and parents are
            kept.

    Raises:
        CheckpointError: the family has no single-file layout that is known here.

    Source: `predict_key` is ComfyUI's.
    """
    if (single := found.family.single_file) is None:
        raise CheckpointError(
            f"the single-file layout of {found.family.title} models is not supported",
            hint=CONVERTIBLE_HINT,
        )
    kept = {key: value for key, value in (inherited or {}).items() if key in _KEPT}
    return {
        "format": "pt",
        **kept,
        **modelspec(
            found.family,
            is_edit=found.is_edit,
            implementation=single.implementation,
            title=title,
            prediction_type=prediction_type,
        ),
        "modelspec.predict_key": prediction_word(prediction_type),
    }


def component_metadata(component: str, single_file: Mapping[str, str]) -> dict[str, str]:
    """Return the header strings of a component that is taken out of a single file."""
    kept = {key: value for key, value in single_file.items() if key == DIGEST_KEY}
    return {"format": "pt", **(kept if component in main_names() else {})}
