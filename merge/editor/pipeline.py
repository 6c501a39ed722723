"""Edit pictures with an InstructPix2Pix checkpoint in a few LCM steps.

Runs the stock diffusers pipelines, loaded from a folder that needs no other file.
"""

from __future__ import annotations

import json
import logging
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from merge.editor.settings import EditSettings
from merge.errors import CheckpointError, DeviceError, ImageError, SourceNotFoundError

_LOG = logging.getLogger(__name__)
_PIPELINES = (
    "StableDiffusionInstructPix2PixPipeline",
    "StableDiffusionXLInstructPix2PixPipeline",
)
_DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
}
_MAX_PIXELS = 100_000_000


@dataclass(frozen=True, slots=True)
class EditResult:
    """An edited picture.

    Attributes:
        image: Values in 0 to 1 of shape `(height, width, 3)`, float32; may hold NaN.
        source: What the model saw: the picture resized.
        unet_rows: Rows that the UNet evaluated, over all steps.
        seconds: Wall time of the edit without loading.
    """

    image: np.ndarray[Any, np.dtype[np.float32]]
    source: Image.Image
    unet_rows: int
    seconds: float

    @property
    def non_finite_count(self) -> int:
        """Return the number of values that are NaN or infinite."""
        return int(np.count_nonzero(~np.isfinite(self.image)))

    def to_pil(self) -> Image.Image:
        """Return the picture in 8 bits; non-finite values become black."""
        values = np.nan_to_num(self.image, nan=0.0, posinf=1.0, neginf=0.0)
        return Image.fromarray((values * 255).round().astype(np.uint8))


class Editor:
    """A loaded checkpoint.

    Attributes:
        pipeline: The diffusers pipeline.
        folder: Where it was loaded from.
        is_xl: True for SDXL.
        default_resolution: What the model was trained at, in pixels.
    """

    def __init__(self, pipeline: Any, folder: Path, device: torch.device) -> None:
        self.pipeline = pipeline
        self.folder = folder
        self.device = device
        self.is_xl = type(pipeline).__name__ == _PIPELINES[1]
        self.default_resolution = int(pipeline.unet.config.sample_size * pipeline.vae_scale_factor)

    def warnings_for(self, settings: EditSettings) -> list[str]:
        """Return a line for each setting outside the range that was found to work."""
        lines = []
        resolution = settings.resolution or self.default_resolution
        if settings.guidance_scale > 3:
            lines.append(f"guidance_scale {settings.guidance_scale:g} is above 3: expect artifacts")
        if settings.guidance_scale > 1 and settings.image_guidance_scale < 1:
            lines.append(
                f"image_guidance_scale {settings.image_guidance_scale:g} below 1 turns all "
                "guidance off"
            )
        elif settings.image_guidance_scale != 1:
            lines.append("image_guidance_scale other than 1 was found to cause artifacts")
        if self.is_xl and self.default_resolution == 768 and resolution != 768:
            lines.append(f"SDXL edits at {resolution} px: only 768 was found to work")
        return lines


def load_editor(folder: str | Path, *, device: str = "auto", dtype: str = "auto") -> Editor:
    """Load an exported folder for editing.

    Args:
        folder: A diffusers InstructPix2Pix pipeline; nothing is downloaded.
        device: `auto`, `cpu`, `cuda`, `cuda:N` or `mps`.
        dtype: `auto` (float16 on a GPU, float32 on the CPU), `float16`, `bfloat16`, `float32`.

    Raises:
        SourceNotFoundError: there is no such pipeline.
        CheckpointError: it is not an InstructPix2Pix pipeline, or does not load.
        DeviceError: there is no such device.
    """
    folder = Path(folder)
    where = _edit_device(device)
    if dtype == "auto":
        dtype = "float32" if where.type == "cpu" else "float16"
    if dtype not in _DTYPES:
        raise DeviceError(f"{dtype!r} is no dtype to edit in", hint=f"use {', '.join(_DTYPES)}")
    class_name = _pipeline_class(folder)
    import diffusers

    diffusers.logging.disable_progress_bar()
    # The safety checker paints pictures black, which a check would take for a broken merge.
    extra: dict[str, Any] = {"safety_checker": None} if class_name == _PIPELINES[0] else {}
    if class_name == _PIPELINES[1]:
        extra = {"add_watermarker": False}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pipeline = getattr(diffusers, class_name).from_pretrained(
                folder, dtype=_DTYPES[dtype], local_files_only=True, **extra
            )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder} does not load: {error}") from error
    if pipeline.unet.config.in_channels != 8:
        raise CheckpointError(
            f"{folder}: its UNet has {pipeline.unet.config.in_channels} input channels, not 8"
        )
    if type(pipeline.scheduler).__name__ != "LCMScheduler" and not _is_ours(folder):
        _LOG.warning("%s has %s: edits use LCMScheduler", folder, type(pipeline.scheduler).__name__)
        pipeline.scheduler = diffusers.LCMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    return Editor(pipeline.to(where), folder, where)


def edit(
    editor: Editor,
    image: Image.Image | str | Path,
    instruction: str,
    settings: EditSettings | None = None,
) -> EditResult:
    """Edit one picture.

    Args:
        editor: From `load_editor`.
        image: A picture of any size and mode, or the path of one.
        instruction: What to change, as a command.
        settings: Steps, guidance, seed and size; None takes the defaults.

    Raises:
        ImageError: the picture or the instruction is empty, or a setting is out of range.
        DeviceError: the device is out of memory.
    """
    settings = settings or EditSettings()
    _check_request(instruction, settings)
    if not isinstance(image, Image.Image):
        image = load_image(image)
    source = resize_image(image, settings.resolution or editor.default_resolution)
    pipeline = editor.pipeline
    _set_schedule(pipeline, settings)
    size = {"height": source.height, "width": source.width} if editor.is_xl else {}
    steps = len(settings.timesteps) if settings.timesteps else settings.steps
    started = time.perf_counter()
    try:
        with torch.inference_mode():
            output = pipeline(
                prompt=instruction,
                image=source,
                num_inference_steps=steps,
                guidance_scale=settings.guidance_scale,
                image_guidance_scale=settings.image_guidance_scale,
                generator=torch.Generator("cpu").manual_seed(settings.seed),
                output_type="np",
                **size,
            )
    except torch.OutOfMemoryError as error:
        raise DeviceError(
            f"the GPU is out of memory: {error}", hint="use a smaller --resolution"
        ) from error
    seconds = time.perf_counter() - started
    guided = settings.guidance_scale > 1 and settings.image_guidance_scale >= 1
    rows = steps * (3 if guided else 1)
    return EditResult(output.images[0], source, rows, seconds)


def load_image(path: str | Path) -> Image.Image:
    """Read a picture, turned as its EXIF data say, in RGB.

    Raises:
        ImageError: it is not there, no picture, or too large.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                if image.width * image.height > _MAX_PIXELS:
                    raise ImageError(
                        f"{path} has {image.width} x {image.height} pixels, more than "
                        f"{_MAX_PIXELS:,} in all",
                        hint="make it smaller first",
                    )
                return ImageOps.exif_transpose(image).convert("RGB")
    except FileNotFoundError:
        raise ImageError(f"there is no picture {path}") from None
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError, ValueError) as error:
        raise ImageError(f"{path} is no picture that can be read: {error}") from error


def resize_image(image: Image.Image, resolution: int) -> Image.Image:
    """Bring the short side to `resolution` pixels and each side to a multiple of 8."""
    scale = resolution / min(image.size)
    width, height = (max(8, round(side * scale / 8) * 8) for side in image.size)
    if max(width, height) > 32 * min(width, height):
        raise ImageError(f"a picture of {image.width} x {image.height} is too narrow to edit")
    image = image.convert("RGB")
    if image.size == (width, height):
        return image
    return image.resize((width, height), Image.Resampling.LANCZOS)


def _check_request(instruction: str, settings: EditSettings) -> None:
    if not instruction.strip():
        raise ImageError("the instruction is empty", hint='say what to change: "make it winter"')
    limit = settings.original_inference_steps
    if settings.timesteps is None and not 1 <= settings.steps <= limit:
        raise ImageError(
            f"steps {settings.steps} is not within 1 to original_inference_steps ({limit})",
            hint="an LCM edits in 4 to 8 steps",
        )
    for name in ("guidance_scale", "image_guidance_scale"):
        value = getattr(settings, name)
        if not (np.isfinite(value) and value >= 0):
            raise ImageError(f"{name} {value} is not a finite number of at least 0")


def _set_schedule(pipeline: Any, settings: EditSettings) -> None:
    """Make the stock call, which passes a step count only, use our schedule."""
    scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config)
    if type(scheduler).__name__ == "LCMScheduler":
        scheduler = type(scheduler).from_config(
            scheduler.config, original_inference_steps=settings.original_inference_steps
        )
    if settings.timesteps is not None:
        timesteps: Sequence[int] = list(settings.timesteps)
        plain = scheduler.set_timesteps

        def set_timesteps(num_inference_steps: int, device: Any = None) -> None:
            plain(device=device, timesteps=timesteps)

        scheduler.set_timesteps = set_timesteps
    pipeline.scheduler = scheduler


def _edit_device(name: str) -> torch.device:
    if name == "mps" or (name == "auto" and torch.backends.mps.is_available()):
        if not torch.backends.mps.is_available():
            raise DeviceError("there is no MPS device here", hint="use --device cpu")
        return torch.device("mps")
    from merge.engine import choose_device

    return choose_device(name)


def _pipeline_class(folder: Path) -> str:
    index = folder / "model_index.json"
    if not index.is_file():
        raise SourceNotFoundError(
            f"{folder} is no pipeline folder: it has no model_index.json",
            hint="an output of `instruct-merge run` with a whole pipeline as target is one",
        )
    try:
        name = json.loads(index.read_text(encoding="utf-8")).get("_class_name")
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{index} cannot be read: {error}") from error
    if name not in _PIPELINES:
        raise CheckpointError(
            f"{folder} is a {name}, not an InstructPix2Pix pipeline",
            hint=f"model_index.json must name {' or '.join(_PIPELINES)}",
        )
    return str(name)


def _is_ours(folder: Path) -> bool:
    return (folder / "merge_manifest.json").is_file()
