"""Prove a checkpoint: its files are the recorded ones, and it edits a picture."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from PIL import Image, ImageDraw

from merge.digest import digest_file
from merge.editor import Editor, EditResult, EditSettings, load_editor, load_image, save_png
from merge.editor import edit as edit_picture
from merge.errors import RecipeError, SourceNotFoundError, VerificationError
from merge.manifest import json_bytes, read_locked_recipe, read_manifest

_LOG = logging.getLogger(__name__)
REPORT_NAME = "report.json"
REPORT_VERSION = 1
DEFAULT_INSTRUCTION = "Make it evening"
# The standard deviation of 8-bit values below which a picture shows nothing.
_MIN_DEVIATION = 1.0


@dataclass(frozen=True, slots=True)
class Check:
    """One measured value and its limit.

    Attributes:
        name: What was measured.
        value: The measurement.
        limit: What it was compared with.
        passed: The verdict.
    """

    name: str
    value: float
    limit: float
    passed: bool


@dataclass(frozen=True, slots=True)
class Edit:
    """One edit to run; `image` None stands for the picture that comes with the tool."""

    image: Path | None
    instruction: str
    seed: int | None = None


def verify_folder(
    folder: str | Path,
    *,
    edits: Sequence[Edit] = (),
    device: str = "auto",
    on_edit: Callable[[int, int], None] | None = None,
) -> Path:
    """Run edits with the settings of the folder's recipe, check them, write the report.

    Writes `report.json` and `images/` into the folder, whether the checks pass or not.

    Args:
        folder: An export with a whole pipeline.
        edits: What to edit; empty: a picture that comes with the tool.
        device: As for `load_editor`.
        on_edit: Called with the number of finished edits and of all.

    Returns:
        The path of the report.

    Raises:
        VerificationError: a check failed; the message names it with value and limit.
        SourceNotFoundError: the folder is no pipeline.
    """
    folder = Path(folder)
    recipe = read_locked_recipe(folder) or {}
    verify = recipe.get("verify", {})
    settings, seeds = _settings(verify)
    editor = load_editor(folder, device=device)
    if settings.resolution is None:
        settings = dataclasses.replace(settings, resolution=editor.default_resolution)
    todo = [
        (edit, seed)
        for edit in (edits or [Edit(None, DEFAULT_INSTRUCTION)])
        for seed in ([edit.seed] if edit.seed is not None else seeds)
    ]
    images = folder / "images"
    images.mkdir(exist_ok=True)
    checks: list[Check] = []
    rows: list[dict[str, Any]] = []
    for index, (edit, seed) in enumerate(todo):
        chosen = dataclasses.replace(settings, seed=seed)
        row, result = _run_edit(editor, edit, chosen, images, index)
        rows.append(row)
        checks += _check_picture(f"edit {index}", result)
        if on_edit is not None:
            on_edit(index + 1, len(todo))
    passed = all(check.passed for check in checks)
    report = {
        "schema_version": REPORT_VERSION,
        "passed": passed,
        "checks": [dataclasses.asdict(check) for check in checks],
        "edits": rows,
    }
    path = folder / REPORT_NAME
    path.write_bytes(json_bytes(report))
    if not passed:
        failed = [check for check in checks if not check.passed]
        lines = "; ".join(f"{c.name} is {c.value:g}, limit {c.limit:g}" for c in failed)
        raise VerificationError(
            f"the merged model in {folder} fails {len(failed)} check(s): {lines}",
            hint=f"see {path} and {images}; a smaller weight may help",
        )
    return path


def verify_files(folder: str | Path, on_bytes: Callable[[int, int], None] | None = None) -> int:
    """Recompute the SHA-256 of every file in the folder's manifest.

    Returns:
        The number of files.

    Raises:
        SourceNotFoundError: the folder has no manifest.
        VerificationError: a file is missing or differs; all are named.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    if manifest is None:
        raise SourceNotFoundError(
            f"{folder} has no merge_manifest.json", hint="only outputs of `run` have one"
        )
    files: dict[str, dict[str, Any]] = manifest["files"]
    total = sum(int(record["size"]) for record in files.values())
    done = 0
    wrong = []
    for name, record in sorted(files.items()):
        path = folder / name
        if not path.is_file():
            wrong.append(f"{name} is missing")
        elif path.stat().st_size != record["size"]:
            wrong.append(f"{name} has {path.stat().st_size} bytes, not {record['size']}")
        elif (actual := digest_file(path)) != record["sha256"]:
            wrong.append(f"{name} has SHA-256 {actual}, not {record['sha256']}")
        done += int(record["size"])
        if on_bytes is not None:
            on_bytes(done, total)
    if wrong:
        raise VerificationError(
            f"{len(wrong)} file(s) of {folder} differ from its manifest: {'; '.join(wrong)}",
            hint="download the folder again, or run the recipe again",
        )
    return len(files)


def read_edits(path: str | Path) -> list[Edit]:
    """Read a list of edits, each `{image, instruction, seed?}`; images relative to the file.

    Raises:
        RecipeError: the file is no such list.
    """
    path = Path(path)
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
        return [
            Edit(path.parent / item["image"], str(item["instruction"]), item.get("seed"))
            for item in tree
        ]
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        raise RecipeError(f"{path} is no list of edits: {error}", []) from error


def default_picture(size: int) -> Image.Image:
    """Draw the picture that stands in when a recipe names no edits: hills and a house by day."""
    scale = 4
    side = size * scale
    image = Image.new("RGB", (side, side))
    draw = ImageDraw.Draw(image)
    for y in range(side):
        t = y / side
        draw.line((0, y, side, y), (int(90 + 120 * t), int(160 + 70 * t), int(235 + 15 * t)))
    unit = side / 16
    draw.ellipse(_box(11.5, 1.5, 14, 4, unit), fill=(255, 236, 150))
    draw.ellipse(_box(-6, 8, 11, 22, unit), fill=(104, 160, 92))
    draw.ellipse(_box(4, 9.5, 24, 26, unit), fill=(82, 140, 76))
    draw.rectangle(_box(4.5, 8, 9, 12, unit), fill=(214, 196, 168))
    draw.polygon(
        [(4 * unit, 8 * unit), (6.75 * unit, 5.5 * unit), (9.5 * unit, 8 * unit)],
        fill=(158, 72, 58),
    )
    draw.rectangle(_box(6.2, 9.8, 7.3, 12, unit), fill=(96, 66, 46))
    draw.rectangle(_box(7.8, 9.2, 8.6, 10.2, unit), fill=(150, 190, 214))
    draw.rectangle(_box(12.6, 9, 13.1, 12, unit), fill=(92, 68, 46))
    draw.ellipse(_box(11.3, 6, 14.4, 9.8, unit), fill=(58, 112, 60))
    return image.resize((size, size), Image.Resampling.LANCZOS)


def _box(x0: float, y0: float, x1: float, y1: float, unit: float) -> tuple[float, ...]:
    return (x0 * unit, y0 * unit, x1 * unit, y1 * unit)


def _settings(verify: dict[str, Any]) -> tuple[EditSettings, list[int]]:
    defaults = EditSettings()
    timesteps = verify.get("timesteps")
    settings = EditSettings(
        steps=verify.get("steps", defaults.steps),
        guidance_scale=verify.get("guidance_scale", defaults.guidance_scale),
        image_guidance_scale=verify.get("image_guidance_scale", defaults.image_guidance_scale),
        resolution=verify.get("resolution"),
        original_inference_steps=verify.get(
            "original_inference_steps", defaults.original_inference_steps
        ),
        timesteps=tuple(timesteps) if timesteps else None,
    )
    return settings, verify.get("seeds", [0])


def _run_edit(
    editor: Editor, edit: Edit, settings: EditSettings, images: Path, index: int
) -> tuple[dict[str, Any], EditResult]:
    for line in editor.warnings_for(settings) if index == 0 else ():
        _LOG.warning("%s", line)
    assert settings.resolution is not None
    picture = default_picture(settings.resolution) if edit.image is None else load_image(edit.image)
    result = edit_picture(editor, picture, edit.instruction, settings)
    names = [f"images/{index:02d}-{settings.seed}-{kind}.png" for kind in ("source", "merged")]
    result.source.save(images.parent / names[0])
    save_png(result.to_pil(), images.parent / names[1], settings, edit.instruction)
    row = {
        "image": edit.image.name if edit.image is not None else "default",
        "instruction": edit.instruction,
        "seed": settings.seed,
        "settings": dataclasses.asdict(settings),
        "unet_rows": result.unet_rows,
        "time_s": round(result.seconds, 3),
        "files": names,
    }
    return row, result


def _check_picture(name: str, result: EditResult) -> list[Check]:
    count = result.non_finite_count
    checks = [Check(f"{name}: non-finite values", count, 0, count == 0)]
    if not count:
        deviation = float(result.image.std() * 255)
        checks.append(
            Check(
                f"{name}: contrast", round(deviation, 3), _MIN_DEVIATION, deviation > _MIN_DEVIATION
            )
        )
    return checks
