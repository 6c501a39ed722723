"""Write an edited picture together with the settings that made it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from PIL import Image, PngImagePlugin

from merge.editor.settings import EditSettings
from merge.errors import OutputError
from merge.writer.file import replacement


def save_png(
    image: Image.Image, path: str | Path, settings: EditSettings, instruction: str
) -> None:
    """Write a PNG with the settings that made it in its text chunks `instruction` and `settings`.

    The file appears whole or not at all, and replaces one of its name.

    Args:
        image: The picture.
        path: Where to; the folder must be there.
        settings: What it was made with, best as `EditResult.settings` gives them.
        instruction: What was asked for.

    Raises:
        OutputError: the file cannot be written.
    """
    path = Path(path)
    info = PngImagePlugin.PngInfo()
    # International text: a plain one holds Latin-1 only.
    info.add_itxt("instruction", instruction)
    info.add_text("settings", json.dumps(dataclasses.asdict(settings), sort_keys=True))
    try:
        with replacement(path) as partial:
            image.save(partial, format="PNG", pnginfo=info)
    except OSError as error:
        raise OutputError(
            f"{path} cannot be written: {error.strerror or error}",
            hint="choose another place with -o",
        ) from error
