"""What goes into an edit and what comes out of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from merge.editor.settings import EditSettings

Floats = np.ndarray[Any, np.dtype[np.float32]]


@dataclass(frozen=True, slots=True)
class EditRequest:
    """One picture to edit.

    Attributes:
        image: A picture of any size and mode, or the path of one. A picture that is used in
            several requests is prepared once, so it must not change between them.
        instruction: What to change, as a command.
        seed: Of the noise; None takes that of the settings.
    """

    image: Image.Image | str | Path
    instruction: str
    seed: int | None = None


@dataclass(frozen=True, slots=True)
class StageTimes:
    """Wall time of the stages of an edit in seconds; of a batch, this picture's share.

    Attributes:
        text_s: Encoding the instruction.
        encode_s: Reading, resizing and encoding the picture.
        denoise_s: The steps of the UNet and the scheduler.
        decode_s: Making the picture of the latents.
    """

    text_s: float
    encode_s: float
    denoise_s: float
    decode_s: float

    @property
    def total_s(self) -> float:
        """Return the sum."""
        return self.text_s + self.encode_s + self.denoise_s + self.decode_s


@dataclass(frozen=True, slots=True)
class EditResult:
    """An edited picture.

    Attributes:
        image: Values in 0 to 1 of shape `(height, width, 3)`, float32; NaN where the model gave
            no finite value.
        source: What the model saw: the picture resized.
        unet_rows: Rows that the UNet evaluated for this picture, over all steps.
        seconds: Wall time of the edit without loading; of a batch, this picture's share.
        latents: What was decoded, float32 of shape `(4, height / f, width / f)`, f the factor of
            the VAE.
        stages: Where the time went.
        settings: With the seed and the resolution that were used.
    """

    image: Floats
    source: Image.Image
    unet_rows: int
    seconds: float
    latents: Floats
    stages: StageTimes
    settings: EditSettings

    @property
    def non_finite_count(self) -> int:
        """Return the number of values of the picture that are NaN or infinite."""
        return int(np.count_nonzero(~np.isfinite(self.image)))

    def to_pil(self) -> Image.Image:
        """Return the picture in 8 bits."""
        return in_8_bits(self.image)


def in_8_bits(values: Floats) -> Image.Image:
    """Return values from 0 to 1 as a picture; NaN becomes black, and what lies beyond is cut."""
    values = np.nan_to_num(values, nan=0.0).clip(0, 1)
    return Image.fromarray((values * 255).round().astype(np.uint8))
