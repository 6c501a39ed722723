"""The strings in the headers of converted files."""

from __future__ import annotations

from collections.abc import Mapping

from merge.errors import CheckpointError
from merge.keymap import UNetArchitecture
from merge.modelspec import modelspec, prediction_word
from merge.plan.model import DIGEST_KEY

EDIT_CHANNELS = 8
_IMPLEMENTATIONS = {"sd15": "https://github.com/CompVis/stable-diffusion", "sdxl": "sgm"}
# What a UNet's header says that is as true of the single file.
_KEPT = (DIGEST_KEY, "modelspec.resolution", "modelspec.merged_from")


def single_file_metadata(
    unet: UNetArchitecture,
    title: str,
    *,
    prediction_type: str = "epsilon",
    inherited: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Return the header strings of a single file.

    Args:
        unet: Its UNet.
        title: A name for people.
        prediction_type: Of the scheduler, in diffusers' words.
        inherited: Header of the UNet that it is made from; digest, resolution and parents are kept.

    Raises:
        CheckpointError: the family has no single-file layout that is known here.

    Source: `predict_key` is ComfyUI's.
    """
    if unet.family not in _IMPLEMENTATIONS:
        raise CheckpointError(
            f"the single-file layout of {unet.title} models is not supported",
            hint="Stable Diffusion 1.x and XL models can be converted",
        )
    kept = {key: value for key, value in (inherited or {}).items() if key in _KEPT}
    return {
        "format": "pt",
        **kept,
        **modelspec(
            unet.family,
            is_edit=unet.in_channels == EDIT_CHANNELS,
            implementation=_IMPLEMENTATIONS[unet.family],
            title=title,
            prediction_type=prediction_type,
        ),
        "modelspec.predict_key": prediction_word(prediction_type),
    }


def component_metadata(component: str, single_file: Mapping[str, str]) -> dict[str, str]:
    """Return the header strings of a component that is taken out of a single file."""
    kept = {key: value for key, value in single_file.items() if key == DIGEST_KEY}
    return {"format": "pt", **(kept if component == "unet" else {})}
