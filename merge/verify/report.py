"""The report of a verification: `report.json`, `report.html` and `images/`."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merge._version import __version__
from merge.editor.png import save_png
from merge.editor.settings import EditSettings
from merge.json_files import json_bytes
from merge.records.folder import IMAGES_NAME, PAGE_NAME, REPORT_NAME
from merge.verify.checks import CHECKS
from merge.verify.model import BlockNorm, Check, ComparedTarget, CompareOptions, EditRow
from merge.verify.verdict import describe, failures, not_judged, verdict, warnings
from merge.writer.file import replacement
from merge.writer.tensors import write_error

REPORT_VERSION = 1
# Only what is named like this is taken for an older report's and removed.
_IMAGE_NAME = re.compile(r"\d{2,}-\d+-(source|merged|expected|target|target_few)\.png", re.ASCII)


@dataclass(frozen=True, slots=True)
class Report:
    """Everything that a verification found.

    Attributes:
        name: Of the recipe, or of the folder where it has none.
        recipe: Of the folder's lock; empty without one.
        recipe_text: The lock as it is written; empty without one.
        recipe_digest: 64 hexadecimal digits, or empty.
        settings: Of the merged model's edits.
        device: Kind of device and dtype.
        checks: In the order of `CHECKS`.
        rows: One per edit and seed.
        blocks: How far each block moved; empty where no target was at hand.
        target: What the pictures are compared with, if anything.
        compare: How that made its pictures.
        clip: Name of the CLIP model, if there was one.
        notes: What was left out, and why.
    """

    name: str
    recipe: Mapping[str, Any]
    recipe_text: str
    recipe_digest: str
    settings: EditSettings
    device: str
    checks: tuple[Check, ...]
    rows: tuple[EditRow, ...]
    blocks: tuple[BlockNorm, ...] = ()
    target: ComparedTarget | None = None
    compare: CompareOptions | None = None
    clip: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def failed(self) -> tuple[Check, ...]:
        """Return the checks that did not pass and fail the model."""
        return failures(self.checks)

    @property
    def warned(self) -> tuple[Check, ...]:
        """Return the checks that did not pass and only warn."""
        return warnings(self.checks)


def write_report(folder: Path, report: Report, page: str) -> None:
    """Write the report's files; pictures of an older report are removed.

    `report.json` comes last, so that what it names is there.

    Args:
        folder: Where to.
        report: What was found.
        page: The HTML.

    Raises:
        OutputError: the folder cannot be written.
    """
    images = folder / IMAGES_NAME
    try:
        images.mkdir(exist_ok=True)
        current: set[str] = set()
        for index, row in enumerate(report.rows):
            names = image_names(index, row)
            current.update(names.values())
            for kind, image in row.images.items():
                path = folder / names[kind]
                if kind in row.pictures:
                    save_png(image, path, row.pictures[kind].settings, row.edit.instruction)
                    continue
                with replacement(path) as partial:
                    image.save(partial, format="PNG")
        for path in images.iterdir():
            if _IMAGE_NAME.fullmatch(path.name) and f"{IMAGES_NAME}/{path.name}" not in current:
                path.unlink()
        files = {PAGE_NAME: page.encode(), REPORT_NAME: json_bytes(report_to_json(report))}
        for name, data in files.items():
            with replacement(folder / name) as partial:
                partial.write_bytes(data)
    except OSError as error:
        raise write_error(Path(error.filename or folder), error) from error


def image_names(index: int, row: EditRow) -> dict[str, str]:
    """Return kind of picture to its file, relative to the folder."""
    return {kind: f"{IMAGES_NAME}/{index:02d}-{row.seed}-{kind}.png" for kind in row.images}


def report_to_json(report: Report) -> dict[str, Any]:
    """Return the contents of `report.json`."""
    target, compare = report.target, report.compare
    compared = None
    if target is not None and compare is not None:
        compared = {
            "model": target.label,
            "commit": target.commit,
            "steps": compare.steps,
            "guidance_scale": compare.guidance_scale,
            "image_guidance_scale": compare.image_guidance_scale,
        }
    return {
        "schema_version": REPORT_VERSION,
        "tool": {"name": "instruct-merge", "version": __version__},
        "passed": not report.failed,
        "warnings": describe(report.warned),
        "verdict": verdict(report.checks),
        "not_judged": not_judged(report.checks),
        "summary": _summary(report),
        "checks": [_check_tree(check) for check in report.checks],
        "edits": [_row_tree(index, row) for index, row in enumerate(report.rows)],
        "compared_with": compared,
        "clip": report.clip,
        "block_norms": [dataclasses.asdict(block) for block in report.blocks],
        "notes": list(report.notes),
    }


def _summary(report: Report) -> dict[str, Any]:
    merged = [row.pictures["merged"] for row in report.rows]
    settings = dataclasses.asdict(report.settings)
    del settings["seed"]
    return {
        "name": report.name,
        "recipe_digest": report.recipe_digest or None,
        "weight": report.recipe.get("weight"),
        **settings,
        "device": report.device,
        "unet_rows": mean([picture.unet_rows for picture in merged]),
        "time_s": round(mean([picture.seconds for picture in merged]), 3),
        "checks_failed": len(report.failed),
        "checks_warned": len(report.warned),
        "checks_total": len(report.checks),
    }


def mean(values: Sequence[float]) -> float:
    """Return the mean; an integer where all values are the same integer."""
    return values[0] if len(set(values)) == 1 else sum(values) / len(values)


def _check_tree(check: Check) -> dict[str, Any]:
    kind = CHECKS[check.name]
    return {
        **dataclasses.asdict(check),
        "detail": list(check.detail),
        "rule": kind.rule,
        "severity": kind.severity,
    }


def _row_tree(index: int, row: EditRow) -> dict[str, Any]:
    names = image_names(index, row)
    merged = row.pictures["merged"]
    return {
        "image": row.edit.image_name,
        "instruction": row.edit.instruction,
        "seed": row.seed,
        "before_caption": row.edit.before_caption,
        "after_caption": row.edit.after_caption,
        "settings": dataclasses.asdict(merged.settings),
        "unet_rows": merged.unet_rows,
        "time_s": round(merged.seconds, 3),
        "files": list(names.values()),
        "pictures": {
            kind: {
                "file": names[kind],
                "scheduler": picture.scheduler,
                "settings": dataclasses.asdict(picture.settings),
                "unet_rows": picture.unet_rows,
                "time_s": round(picture.seconds, 3),
                "metrics": {
                    name: None if value is None else round(value, 6)
                    for name, value in row.metrics.get(kind, {}).items()
                },
            }
            for kind, picture in row.pictures.items()
        },
    }
