"""Reports of verifications that never ran, for looking at their page."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from merge.editor.settings import EditSettings
from merge.verify.checks import make_check
from merge.verify.drawings import draw_picture
from merge.verify.edits import DEFAULT_EDITS
from merge.verify.model import BlockNorm, ComparedTarget, CompareOptions, EditRow, Picture
from merge.verify.report import Report

SETTINGS = EditSettings(resolution=64)
BLOCKS = ("conv_in", "time_embedding", "down_blocks.0", "mid_block", "up_blocks.0", "conv_out")


def make_report(*, size: int = 64, compared: bool = False, **changes: Any) -> Report:
    """Return the report of a merge that passed.

    Args:
        size: Of the pictures.
        compared: With pictures of the target and block norms.
        changes: Fields of the report.
    """
    rows = []
    checks = [make_check(name, 0) for name in ("files_as_recorded", "weights_finite")]
    for index, edit in enumerate(DEFAULT_EDITS):
        source = draw_picture(edit.drawing, size)
        pictures = {"merged": Picture(ImageOps.invert(source), SETTINGS, "lcm", 8, 1.25)}
        if compared:
            own = dataclasses.replace(SETTINGS, steps=50)
            pictures["target"] = Picture(ImageOps.mirror(source), own, "own", 150, 20.5)
            pictures["target_few"] = Picture(ImageOps.flip(source), SETTINGS, "lcm", 8, 1.25)
        metrics = {kind: {"l1": 0.25, "psnr": None, "clip_direction": -0.5} for kind in pictures}
        rows.append(EditRow(edit, index, source, pictures, metrics))
        checks += [
            make_check("not_black", 0.9 - index / 10, edit=index),
            make_check("not_the_source", 0.3, edit=index),
        ]
    fields: dict[str, Any] = {
        "name": "tiny",
        "recipe": {"weight": 0.5, "models": recipe_models()},
        "recipe_text": "lock_version: 1\n",
        "recipe_digest": "ab" * 32,
        "settings": SETTINGS,
        "device": "cpu float32",
        "checks": tuple(checks),
        "rows": tuple(rows),
    }
    if compared:
        fields["target"] = ComparedTarget("org/target", "c" * 40, Path("/nowhere"), (), {})
        fields["compare"] = CompareOptions("org/target")
        fields["blocks"] = tuple(
            BlockNorm(name, index / 50, 10**index) for index, name in enumerate(BLOCKS)
        )
    return Report(**{**fields, **changes})


def recipe_models() -> dict[str, Any]:
    """Return the models of a lock."""
    return {
        "base": {"path": "base"},
        "distilled": [{"repo": "org/distilled"}],
        "target": {"repo": "org/target"},
    }


def plain_picture(width: int, height: int) -> Image.Image:
    """Return noise, which no format compresses."""
    return Image.effect_noise((width, height), 120).convert("RGB")
