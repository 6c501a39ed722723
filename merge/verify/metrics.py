"""How two pictures differ, by measures that need no model.

These are shown and never judged: the distance to a target's picture is smallest for a blurred one.
"""

from __future__ import annotations

import importlib.util
import math
from typing import Any

import numpy as np
from PIL import Image

Values = np.ndarray[Any, np.dtype[Any]]
SSIM_HINT = "install the extra `metrics` for SSIM: pip install 'instruct-merge[metrics]'"


def to_values(image: Image.Image) -> Values:
    """Return a picture as float64 values in 0 to 1 of shape `(height, width, 3)`."""
    return np.asarray(image.convert("RGB"), dtype=np.float64) / 255


def measure_pair(first: Image.Image, second: Image.Image) -> dict[str, float | None]:
    """Measure how two pictures of one size differ.

    Returns:
        `l1` (mean absolute difference, values in 0 to 1), `psnr` (peak signal-to-noise ratio in dB
        for a peak of 1; None when they are the same) and, with scikit-image, `ssim`.
    """
    a, b = to_values(first), to_values(second)
    l1, error = float(np.abs(a - b).mean()), float(np.square(a - b).mean())
    measures = {"l1": l1, "psnr": None if error == 0 else -10 * math.log10(error)}
    return {**measures, "ssim": ssim(a, b)} if has_ssim() else measures


def rms(a: Values, b: Values) -> float:
    """Return the root mean square difference."""
    return math.sqrt(float(np.square(a - b).mean()))


def has_ssim() -> bool:
    """Return True when scikit-image is installed."""
    return importlib.util.find_spec("skimage") is not None


def ssim(a: Values, b: Values) -> float:
    """Return the mean structural similarity over the three channels, 1 for the same picture.

    Source: Wang et al. 2004, with the 7-pixel uniform window of scikit-image; a picture smaller
    than that takes the largest odd window that fits.
    """
    from skimage.metrics import structural_similarity

    smallest = min(a.shape[:2])
    window = min(7, smallest if smallest % 2 else smallest - 1)
    measure: Any = structural_similarity
    return float(measure(a, b, channel_axis=2, data_range=1.0, win_size=window))
