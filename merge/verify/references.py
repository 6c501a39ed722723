"""The target's pictures, kept from one verification to the next.

They are the same for every merge of one target and take most of the time: 50 steps of three rows
where a merged model takes 4 steps of two.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import logging
import os
import warnings
from collections.abc import Mapping
from pathlib import Path

from PIL import Image, PngImagePlugin

from merge._version import __version__
from merge.editor.settings import EditSettings
from merge.verify.model import Picture
from merge.writer.file import replacement

_LOG = logging.getLogger(__name__)
# The layout of a key and an entry: one more makes every older entry unknown.
_VERSION = 1
_CHUNK = "reference"
_TOOLS = ("torch", "diffusers", "transformers", "pillow")


def cache_folder() -> Path:
    """Return `$XDG_CACHE_HOME/instruct-merge/references`, by default below `~/.cache`."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The specification says to take no notice of a relative path.
    root = Path(base) if base and Path(base).is_absolute() else Path.home() / ".cache"
    return root / "instruct-merge" / "references"


def reference_key(
    files: Mapping[str, str],
    image: Image.Image,
    instruction: str,
    settings: EditSettings,
    scheduler: str,
    device: str,
) -> str:
    """Return the SHA-256 of everything that decides a picture.

    Args:
        files: Name to SHA-256 of every file of the model.
        image: What the model sees.
        instruction: What to change.
        settings: With the seed and the resolution.
        scheduler: `own` or `lcm`.
        device: Kind of device and dtype, which change a picture's last bits.
    """
    facts = {
        "version": _VERSION,
        "files": dict(files),
        "image": [image.size, hashlib.sha256(image.convert("RGB").tobytes()).hexdigest()],
        "instruction": instruction,
        "settings": dataclasses.asdict(settings),
        "scheduler": scheduler,
        "device": device,
        "tools": {name: importlib.metadata.version(name) for name in _TOOLS},
        "tool": __version__,
    }
    text = json.dumps(facts, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


class ReferenceCache:
    """Pictures by key, one PNG each with what there is to say about it in a text chunk."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def get(self, key: str, settings: EditSettings, scheduler: str) -> Picture | None:
        """Return a kept picture; None when there is none or it is damaged."""
        path = self._path(key)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                with Image.open(path) as file:
                    file.load()
                    image = file.convert("RGB")
                    record = json.loads(file.text[_CHUNK])  # type: ignore[attr-defined]
            if record["key"] != key or record["pixels"] != _pixels_digest(image):
                raise ValueError("it does not hold what was written")
            rows, seconds = int(record["unet_rows"]), float(record["seconds"])
        except FileNotFoundError:
            return None
        except Exception as error:
            # A cut PNG raises nearly anything, and none of it is worth a failed verification.
            _LOG.info("the kept picture %s is damaged and made again: %s", path, error)
            return None
        return Picture(image, settings, scheduler, rows, seconds)

    def put(self, key: str, picture: Picture) -> None:
        """Keep a picture; a disk that refuses it is no error."""
        path = self._path(key)
        info = PngImagePlugin.PngInfo()
        record = {
            "key": key,
            "pixels": _pixels_digest(picture.image),
            "unet_rows": picture.unet_rows,
            "seconds": picture.seconds,
        }
        info.add_text(_CHUNK, json.dumps(record))
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacement(path) as partial:
                picture.image.save(partial, format="PNG", pnginfo=info)
        except OSError as error:
            _LOG.warning("the target's picture is not kept: %s", error)

    def _path(self, key: str) -> Path:
        return self._folder / f"{key}.png"


def _pixels_digest(image: Image.Image) -> str:
    return hashlib.sha256(image.tobytes()).hexdigest()
