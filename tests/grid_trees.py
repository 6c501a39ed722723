"""Sweeps and tunings that never ran, for looking at their pages."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from merge.verify.drawings import draw_picture

WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0)
LISTS = ([999, 659, 319, 59], [999, 499, 249, 99])
SAMPLES = (
    ("house", "make it winter"),
    ("boat", "make it sunset"),
    ("apple", "turn the apple into an orange"),
)
METRICS = (
    {
        "name": "path",
        "title": "Distance to the target's own path",
        "meaning": "mean over the steps, of latents",
        "better": "lower",
    },
    {"name": "ssim", "title": "SSIM to the reference", "meaning": "", "better": "higher"},
    {"name": "l1", "title": "Difference from the source", "meaning": "", "better": ""},
)
TOOL = {"name": "instruct-merge", "version": "0.2.0"}
REFERENCE = {
    "guidance_scale": 1.5,
    "image_guidance_scale": 1.0,
    "unet_rows": 2688,
    "seconds": 10.2,
}


def label(value: Any) -> str:
    """Return a value as a label of an axis."""
    return "/".join(map(str, value)) if isinstance(value, list) else f"{value:g}"


def axis(key: str, values: Sequence[Any]) -> dict[str, Any]:
    """Return an axis of a sweep."""
    return {"key": key, "values": list(values), "labels": [label(value) for value in values]}


def make_sweep(
    folder: Path,
    axes: Sequence[Mapping[str, Any]] = (axis("weight", WEIGHTS), axis("timesteps", LISTS)),
    *,
    size: int = 24,
    reference: bool = True,
) -> dict[str, Any]:
    """Write the pictures of a sweep and return its tree."""
    samples = _samples(folder, size, reference)
    cells = []
    keys = [one["key"] for one in axes]
    for index, values in enumerate(itertools.product(*(one["values"] for one in axes))):
        cells.append(_cell(folder, index, dict(zip(keys, values, strict=True)), size, SAMPLES))
    best = min(cells, key=lambda cell: float(cell["metrics"]["path"]))
    return {
        "schema_version": 1,
        "tool": TOOL,
        "recipe": "demo",
        "complete": True,
        "device": "cpu float32",
        "axes": copy.deepcopy(list(axes)),
        "samples": samples,
        "reference": REFERENCE if reference else None,
        "metrics": copy.deepcopy(list(METRICS)),
        "cells": cells,
        "best": {"index": best["index"], "metric": "path", "words": best["words"]},
        "notes": ["A note."],
    }


def make_tune(folder: Path, *, size: int = 24) -> dict[str, Any]:
    """Write the pictures of a tuning and return its tree."""
    shown = [0, 1, 2]
    samples = _samples(folder, size, True)
    samples += [dict(samples[0], seed=seed) for seed in range(3, 8)]
    cells, curves = [], []
    for steps in LISTS:
        points = []
        for weight in (*WEIGHTS[:3], 0.75, 0.85, 1.0):
            values = {"weight": weight, "timesteps": steps}
            cell = _cell(folder, len(cells), values, size, SAMPLES)
            cells.append(cell)
            value = cell["metrics"]["path"]
            points.append(
                {
                    "weight": weight,
                    "value": value,
                    "low": value - 0.003,
                    "high": value + 0.003,
                    "folds": [value - 0.002, value, value + 0.001, value],
                    "index": cell["index"],
                }
            )
        curves.append(
            {
                "label": f"4 steps at {label(steps)}, guidance 1",
                "is_chosen": steps == LISTS[0],
                "points": points,
                "best_weight": min(points, key=lambda point: point["value"])["weight"],
            }
        )
    return {
        "schema_version": 1,
        "tool": TOOL,
        "recipe": "demo",
        "device": "cpu float32",
        "decided": True,
        "reason": "",
        "over": ["weight"],
        "chosen": {"weight": 0.75, "guidance_scale": 1.0, "timesteps": LISTS[0], "steps": 4},
        "words": ["weight=0.75"],
        "command": ["instruct-merge", "run", "demo", "weight=0.75"],
        "before": {"weight": 0.85, "guidance_scale": 1.0, "timesteps": LISTS[0], "steps": 4},
        "decides": dict(METRICS[0]),
        "spread": {"folds": [0.75, 0.75, 0.85, 0.75], "low": 0.75, "high": 0.85},
        "curves": curves,
        "held_out": {
            "samples": 16,
            "what": "noise",
            "value": 0.021,
            "neighbours": [
                {"weight": 0.5, "difference": 0.004, "low": 0.0021, "high": 0.0058},
                {"weight": 0.85, "difference": 0.0013, "low": 0.0004, "high": 0.0022},
            ],
            "passed": True,
        },
        "screen": {"name": "endpoint", "curves": copy.deepcopy(curves)},
        "samples": samples,
        "shown": shown,
        "reference": REFERENCE,
        "metrics": copy.deepcopy(list(METRICS)),
        "cells": cells,
        "cost": {"unet_rows": 5000, "seconds": 93.1, "merges": 8},
        "notes": ["A note."],
    }


def _samples(folder: Path, size: int, reference: bool) -> list[dict[str, Any]]:
    samples = []
    for index, (drawing, instruction) in enumerate(SAMPLES):
        names = {kind: f"images/{kind}-{index:03d}.png" for kind in ("source", "reference")}
        picture = draw_picture(drawing, size)
        _save(picture, folder / names["source"])
        if reference:
            _save(tinted(picture, 0.75), folder / names["reference"])
        samples.append(
            {
                "image": f"{drawing}.png",
                "instruction": instruction,
                "seed": index,
                "source": names["source"],
                "reference": names["reference"] if reference else None,
            }
        )
    return samples


def _cell(
    folder: Path,
    index: int,
    values: Mapping[str, Any],
    size: int,
    samples: Sequence[tuple[str, str]],
) -> dict[str, Any]:
    weight = float(values.get("weight", 0.5))
    offset = 0.006 * (values.get("timesteps") == LISTS[1]) + 0.002 * values.get("guidance_scale", 0)
    path = round(0.02 + abs(weight - 0.75) ** 2 / 20 + offset, 5)
    pictures = []
    for number, (drawing, _) in enumerate(samples):
        name = f"images/{index:03d}-{number:03d}.png"
        _save(tinted(draw_picture(drawing, size), weight), folder / name)
        pictures.append(name)
    timesteps = values.get("timesteps", LISTS[0])
    return {
        "index": index,
        "values": dict(values),
        "labels": [label(value) for value in values.values()],
        "words": (words := [f"{key}={label(value)}" for key, value in values.items()]),
        "command": ["instruct-merge", "run", "demo", *words],
        "recipe_digest": f"{index:064x}",
        "sha256": f"{index + 0xABCDEF0123456789 * 16**48:064x}",
        "settings": {
            "steps": len(timesteps),
            "guidance_scale": float(values.get("guidance_scale", 1.0)),
            "image_guidance_scale": 1.0,
            "resolution": size,
            "timesteps": timesteps,
        },
        "metrics": {"path": path, "ssim": round(0.9 - 2 * path, 5), "l1": weight / 5, "extra": 1},
        "samples": {"path": [round(path * (1 + n / 10), 5) for n in range(len(samples))]},
        "pictures": pictures,
        "unet_rows": 4,
        "seconds": {"merge": 0.4, "edit": 1.2, "measure": 0.1},
        "problem": "",
    }


def tinted(picture: Image.Image, amount: float) -> Image.Image:
    """Return a picture some of the way to its snowy version."""
    cold = ImageOps.colorize(ImageOps.grayscale(picture), "#1b2c50", "#fdfdff", "#9db6d8")
    return Image.blend(picture, cold, amount)


def _save(picture: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)
