"""Read pictures of any kind, and bring them to a size that the models take."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from merge.errors import ImageError

MAX_PIXELS = 100_000_000  # of a picture that is read, and of one that is edited
_MAX_RATIO = 32  # of the long to the short side
_ALPHA_MODES = ("RGBA", "RGBa", "LA", "La", "PA")


def load_image(path: str | Path) -> Image.Image:
    """Read a picture as RGB, turned as its EXIF data say.

    Alpha is laid on white, 16 bits are scaled to 8, and of an animation the first frame is taken.

    Raises:
        ImageError: it is not there, no picture, damaged, or has more than 100 million pixels.
    """
    try:
        with warnings.catch_warnings():
            # Pillow warns from 89 million pixels on; the limit here is ours.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                _check_pixels(image.size)
                return to_rgb(image)
    except ImageError as error:
        raise ImageError(f"{path}: {error.message}", hint=error.hint) from None
    except FileNotFoundError:
        raise ImageError(f"there is no picture {path}") from None
    except Exception as error:
        # Pillow's readers raise nearly anything on a damaged file, SyntaxError and zlib's included.
        reason = "" if isinstance(error, UnidentifiedImageError) else f": {error}"
        raise ImageError(
            f"{path} is no picture that can be read{reason}",
            hint="PNG, JPEG, WebP, BMP and TIFF are read; does another program open it?",
        ) from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Return a picture of any mode as 8-bit RGB.

    The EXIF orientation is applied, alpha is laid on white, and 16-bit greys are scaled: Pillow's
    own conversion would cut everything above 255 off.

    Raises:
        ImageError: its pixels are floating-point numbers, or integers beyond 16 bits.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise ImageError(
            "the picture has floating-point pixels, whose range is not known",
            hint="save it with 8 or 16 bits per channel",
        )
    if image.mode.startswith("I"):
        return _scale_16_bits(image).convert("RGB")
    if image.mode in _ALPHA_MODES or "transparency" in image.info:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, "white")
        return Image.alpha_composite(white, layer).convert("RGB")
    return image.convert("RGB")


def resize_image(image: Image.Image, resolution: int, multiple: int = 8) -> Image.Image:
    """Bring the short side to `resolution` pixels and each side to a multiple of 8.

    Args:
        image: A picture of any size and mode; the result is RGB.
        resolution: Short side in pixels.
        multiple: What each side is rounded to.

    Raises:
        ImageError: it is more than 32 times as long as wide, or would get over 100 million pixels.
    """
    image = to_rgb(image)
    size = fit_size(image.size, resolution, multiple)
    if image.size == size:
        return image
    return image.resize(size, Image.Resampling.LANCZOS)


def fit_size(size: tuple[int, int], resolution: int, multiple: int = 8) -> tuple[int, int]:
    """Return the width and height that `resize_image` gives a picture.

    Args:
        size: Width and height of the picture.
        resolution: Short side in pixels.
        multiple: What each side is rounded to.

    Raises:
        ImageError: it is more than 32 times as long as wide, or would get over 100 million pixels.
    """
    scale = resolution / min(size)
    width, height = (max(1, round(side * scale / multiple)) * multiple for side in size)
    if max(width, height) > _MAX_RATIO * min(width, height):
        raise ImageError(
            f"a picture of {size[0]} x {size[1]} is too narrow to edit",
            hint="cut out the part to edit",
        )
    _check_pixels((width, height))
    return width, height


def _check_pixels(size: tuple[int, int]) -> None:
    width, height = size
    if width * height > MAX_PIXELS:
        raise ImageError(
            f"a picture of {width} x {height} is too large: {MAX_PIXELS:,} pixels are the most",
            hint="make it smaller first, or choose a smaller resolution",
        )


def _scale_16_bits(image: Image.Image) -> Image.Image:
    """Return a grey picture of 16 bits, which Pillow may hold in 32, as one of 8."""
    values = np.asarray(image)
    if values.size and (values.min() < 0 or values.max() > 65535):
        raise ImageError(
            f"the picture has pixels from {values.min()} to {values.max()}, beyond 16 bits",
            hint="save it with 8 or 16 bits per channel",
        )
    # 65535 = 255 * 257, so white stays white.
    return Image.fromarray((values.astype(np.float32) / 257).round().astype(np.uint8))
