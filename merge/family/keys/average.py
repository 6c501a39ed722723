"""The moving average that a training keeps of a UNet, beside its plain weights.

A checkpoint of Stable Diffusion's own training code holds every weight of the UNet twice: as it
was when the training ended, and as `model_ema.*`, the exponential moving average. What is published
as a diffusers folder is the average, e.g. of instruct-pix2pix, and samples are drawn with it.

Source: `LitEma` in CompVis/stable-diffusion, which takes the dots out of the names, and
`convert_ldm_unet_checkpoint(extract_ema=True)` in diffusers.
"""

from __future__ import annotations

from collections.abc import Collection

from merge.family.keys.unet import LDM_UNET_PREFIX

AVERAGE_PREFIX = "model_ema."


def averaged_keys(names: Collection[str]) -> dict[str, str]:
    """Return plain key of the UNet to the key of its moving average, where there is one.

    Args:
        names: All keys of an LDM/SGM file.
    """
    averages = {name for name in names if name.startswith(AVERAGE_PREFIX)}
    found = {}
    for name in names:
        if name.startswith(LDM_UNET_PREFIX):
            average = AVERAGE_PREFIX + name.removeprefix("model.").replace(".", "")
            if average in averages:
                found[name] = average
    return found
