"""Which rows of the UNet an edit needs, and how their predictions are put together."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Any


class Rows(enum.IntEnum):
    """Conditions that are evaluated for one picture and step, in this order.

    t = (prompt, image), i = (no prompt, image), u = (no prompt, no image).
    """

    TEXT = 1  # t
    TEXT_IMAGE = 2  # t, i
    ALL = 3  # t, i, u


def choose_rows(guidance_scale: float, image_guidance_scale: float) -> Rows:
    """Return the rows whose weight in the guided prediction is not zero.

    Source: the pipelines of diffusers evaluate all three whenever both scales are at least 1 and
    the first above it, and t alone otherwise. At an image guidance of 1 the weight of u is 0.
    """
    if guidance_scale <= 1 or image_guidance_scale < 1:
        return Rows.TEXT
    return Rows.TEXT_IMAGE if image_guidance_scale == 1 else Rows.ALL


def combine(predictions: Sequence[Any], guidance_scale: float, image_guidance_scale: float) -> Any:
    """Return `u + g (t - i) + s (i - u)`, from as many predictions as count.

    Args:
        predictions: In the order of `Rows`, as many as `choose_rows` says; arrays or tensors.
        guidance_scale: g.
        image_guidance_scale: s.

    Source: Brooks, Holynski, Efros, "InstructPix2Pix", 2023, equation 3.
    """
    if len(predictions) == Rows.TEXT:
        return predictions[0]
    text, image = predictions[:2]
    if len(predictions) == Rows.TEXT_IMAGE:
        return image + guidance_scale * (text - image)
    none = predictions[2]
    return none + guidance_scale * (text - image) + image_guidance_scale * (image - none)
