"""What is kept of a grid: `sweep.json`, written anew after each cell, a table, and pictures."""

from __future__ import annotations

import contextlib
import csv
import io
import math
import re
import shutil
import zipfile
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from merge._version import __version__
from merge.errors import CheckpointError, OutputExistsError, ResumeError
from merge.grid.jobs import Bytes, Floats
from merge.grid.measures import METRICS
from merge.grid.model import Cell, Measured, Sample, SweepResult
from merge.grid.statistics import PATH_SCORE, SCORE, Ranking
from merge.json_files import json_bytes, read_json
from merge.writer.file import replacement, write_atomically
from merge.writer.tensors import write_errors

SWEEP_VERSION = 1
JSON_NAME, TABLE_NAME, PAGE_NAME = "sweep.json", "sweep.csv", "sweep.html"
IMAGES_NAME, WORK_NAME = "images", "work"
_SUFFIX = ".png"
_PICTURE = re.compile(r"(\d{3,}|source|reference)-\d{3,}")


class SweepFolder:
    """The folder of a grid: what is finished is there, whenever it was left.

    Attributes:
        folder: Where.
        json_name: Of the file that says what is finished.
        others: Files that are written beside it under names of their own.
    """

    def __init__(
        self, folder: Path, json_name: str = JSON_NAME, others: Sequence[str] = ()
    ) -> None:
        self.folder = folder
        self.json_name = json_name
        self.others = tuple(others)

    def check(self, *, overwrite: bool, resume: bool) -> dict[str, Any]:
        """Return what an earlier sweep wrote there; empty where there is nothing.

        Args:
            overwrite: It is going to be replaced.
            resume: It is gone on with.

        Raises:
            OutputExistsError: something is there, and neither is asked for, or it is not ours.
        """
        if not self.folder.exists() or (self.folder.is_dir() and not any(self.folder.iterdir())):
            return {}
        try:
            tree = read_json(self.folder / self.json_name) if self.folder.is_dir() else {}
        except CheckpointError:
            tree = {}
        if tree.get("schema_version") != SWEEP_VERSION or not isinstance(tree.get("facts"), dict):
            raise OutputExistsError(
                f"{self.folder} is there and has no {self.json_name} of ours",
                hint="choose another --out",
            )
        if not (overwrite or resume):
            raise OutputExistsError(
                f"{self.folder} exists already",
                hint="--resume goes on with it, --overwrite replaces it, or choose another --out",
            )
        return tree

    def open(self, facts: Mapping[str, str], *, overwrite: bool, resume: bool) -> dict[str, Any]:
        """Make the folder, or go on with what is there.

        Args:
            facts: What decides the numbers, in words, to a digest of it.
            overwrite: Replace an earlier one.
            resume: Keep its finished cells.

        Returns:
            What an interrupted sweep wrote; empty for a new one.

        Raises:
            OutputExistsError: as for `check`.
            ResumeError: what is there was measured otherwise.
            OutputError: the folder cannot be made.
        """
        kept = self.check(overwrite=overwrite, resume=resume)
        if kept and not resume:
            self._empty()
            kept = {}
        differing = sorted(k for k in facts if kept and kept["facts"].get(k) != facts[k])
        if differing:
            raise ResumeError(
                f"{self.folder} was measured otherwise: {', '.join(differing)} changed",
                hint="--overwrite begins anew, or choose another --out",
            )
        with write_errors(self.folder):
            for name in (IMAGES_NAME, WORK_NAME):
                (self.folder / name).mkdir(parents=True, exist_ok=True)
        return kept

    def discard(self) -> None:
        """Remove a folder in which nothing was measured, so that it is in no one's way."""
        self._empty()
        with contextlib.suppress(OSError):
            self.folder.rmdir()

    def _empty(self) -> None:
        """Remove what an earlier sweep wrote, and nothing else."""
        with write_errors(self.folder):
            shutil.rmtree(self.folder / WORK_NAME, ignore_errors=True)
            images = self.folder / IMAGES_NAME
            pictures = [p for p in images.glob(f"*{_SUFFIX}") if _PICTURE.fullmatch(p.stem)]
            record = self.folder / self.json_name
            tables = [record.with_suffix(suffix) for suffix in (".json", ".csv", ".html")]
            for path in [*pictures, *tables, *(self.folder / name for name in self.others)]:
                path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                images.rmdir()

    def write(self, name: str, data: bytes) -> None:
        """Write a file so that its name stands for all of it."""
        write_atomically(self.folder / name, data)

    def write_picture(self, name: str, picture: Bytes) -> str:
        """Write a PNG; return its name in the folder."""
        path = self.folder / IMAGES_NAME / f"{name}{_SUFFIX}"
        with write_errors(path), replacement(path) as partial:
            # Three times as fast as the default, and a tenth larger.
            Image.fromarray(picture).save(partial, format="PNG", compress_level=1)
        return f"{IMAGES_NAME}/{path.name}"

    def write_latents(self, cell: int, latents: Sequence[Floats]) -> None:
        """Keep what the edits of a cell ended in, until the grid is whole."""
        path = self._latents(cell)
        with write_errors(path), replacement(path) as partial, partial.open("wb") as file:
            np.savez(file, *latents)

    def read_latents(self, cell: int) -> tuple[Floats, ...] | None:
        """Return what was kept; None where it is gone."""
        try:
            with self._latents(cell).open("rb") as opened, np.load(opened) as file:
                return tuple(file[f"arr_{index}"] for index in range(len(file.files)))
        except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile):
            return None

    def _latents(self, cell: int) -> Path:
        return self.folder / WORK_NAME / f"{cell:03d}.npz"

    def clean(self) -> None:
        """Remove what only a resumed sweep needs."""
        shutil.rmtree(self.folder / WORK_NAME, ignore_errors=True)


def cell_tree(cell: Cell, measured: Measured, source: str, score: Ranking | None) -> dict[str, Any]:
    """Return a cell as JSON has it.

    Args:
        cell: Which.
        measured: What was found.
        source: The recipe as it was named.
        score: What ranks it beside the others.
    """
    settings = cell.settings[0]
    return {
        "index": cell.index,
        "values": dict(cell.values),
        "labels": list(cell.labels),
        "words": list(cell.words),
        "command": ["instruct-merge", "run", source, *cell.overrides],
        "recipe_digest": measured.digest,
        "sha256": measured.sha256,
        "settings": {
            "steps": settings.steps,
            "guidance_scale": settings.guidance_scale,
            "image_guidance_scale": settings.image_guidance_scale,
            "resolution": settings.resolution,
            "timesteps": None if settings.timesteps is None else list(settings.timesteps),
        },
        "metrics": means_of(measured, score),
        "samples": {name: [*map(rounded, found)] for name, found in measured.values.items()},
        "pictures": list(measured.pictures),
        "unet_rows": rounded(measured.unet_rows),
        "seconds": {name: round(value, 3) for name, value in measured.seconds.items()},
        "problem": measured.problem,
    }


def score_of(measured: Iterable[Measured]) -> Ranking | None:
    """Return what ranks cells where no answers are known: one that all of them have, or None."""
    found = [each.values for each in measured if each.values]
    return next(
        (r for r in (SCORE, PATH_SCORE) if found and all(r.can_rank(values) for values in found)),
        None,
    )


def means_of(measured: Measured, score: Ranking | None) -> dict[str, float | None]:
    """Return every metric of a cell, with what ranks it beside the others."""
    means = {name: rounded(measured.mean(name)) for name in measured.values}
    if score is None or not measured.values:
        return means
    return {**means, score.name: rounded(math.exp(score.score(measured.values)))}


def metric_names(measured: Collection[Measured]) -> tuple[str, ...]:
    """Return the metrics that some cell has, in the order in which they are told."""
    score = score_of(measured)
    found = {name for each in measured for name in means_of(each, score)}
    return tuple(name for name in METRICS if name in found)


def measured_of(tree: Mapping[str, Any]) -> Measured:
    """Return what was found of a cell, as JSON has it."""
    return Measured(
        str(tree["recipe_digest"]),
        str(tree["sha256"]),
        {name: tuple(values) for name, values in tree["samples"].items()},
        tuple(tree["pictures"]),
        tree["unet_rows"],
        dict(tree["seconds"]),
        str(tree["problem"]),
    )


def metric_trees(names: Sequence[str]) -> list[dict[str, str]]:
    """Return the metrics that were measured, with what each is."""
    return [
        {
            "name": name,
            "title": METRICS[name].title,
            "meaning": METRICS[name].meaning,
            "better": METRICS[name].better,
        }
        for name in names
    ]


def sample_trees(
    samples: Sequence[Sample],
    shown: Sequence[int],
    sources: Mapping[int, str],
    references: Mapping[int, str],
    *,
    has_seeds: bool,
) -> list[dict[str, Any]]:
    """Return the samples as JSON has them.

    Args:
        samples: What was edited.
        shown: Those with pictures.
        sources: Index to the file of what the model saw.
        references: Index to the file of the target's own picture.
        has_seeds: False where the grid varies the seed.
    """
    return [
        {
            "image": sample.edit.image_name,
            "instruction": sample.edit.instruction,
            "seed": sample.seed if has_seeds else None,
            "is_shown": index in shown,
            "source": sources.get(index),
            "reference": references.get(index),
        }
        for index, sample in enumerate(samples)
    ]


def sweep_tree(
    result: SweepResult, samples: Sequence[Mapping[str, Any]], facts: Mapping[str, str]
) -> dict[str, Any]:
    """Return the contents of `sweep.json`."""
    reference, score = result.reference, score_of(result.measured.values())
    return {
        "schema_version": SWEEP_VERSION,
        "tool": {"name": "instruct-merge", "version": __version__},
        "recipe": result.recipe,
        "complete": result.is_complete,
        "device": result.device,
        "facts": dict(facts),
        "axes": [
            {
                "key": axis.key,
                "values": _axis_values(result.cells, axis.key),
                "labels": [value.label for value in axis.values],
            }
            for axis in result.axes
        ],
        "samples": list(samples),
        "reference": None
        if reference is None
        else {
            "guidance_scale": reference.guidance_scale,
            "image_guidance_scale": reference.image_guidance_scale,
            "unet_rows": reference.unet_rows,
            "seconds": round(reference.seconds, 3),
        },
        "metrics": metric_trees(result.metrics),
        "cells": [
            cell_tree(cell, result.measured[cell.index], result.source, score)
            for cell in result.cells
            if cell.index in result.measured
        ],
        "cells_in_all": len(result.cells),
        "best": None
        if result.best is None
        else {
            "index": result.best.index,
            "metric": result.best.metric,
            "words": list(result.best.words),
        },
        "notes": list(result.notes),
    }


def table_bytes(result: SweepResult) -> bytes:
    """Return `sweep.csv`: a line for each cell, values first, then metrics."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    keys = [axis.key for axis in result.axes]
    score = score_of(result.measured.values())
    writer.writerow(
        [*keys, *result.metrics, "unet_rows", "seconds", "recipe_digest", "sha256", "problem"]
    )
    for cell in result.cells:
        measured = result.measured.get(cell.index)
        if measured is None:
            continue
        known = means_of(measured, score)
        means = [known.get(name) for name in result.metrics]
        seconds = round(sum(measured.seconds.values()), 3)
        row = [*map(_safe, cell.labels), *("" if mean is None else mean for mean in means)]
        row += [measured.unet_rows, seconds, measured.digest, measured.sha256]
        writer.writerow([*row, _safe(measured.problem)])
    return text.getvalue().encode()


def write_sweep(
    place: SweepFolder,
    result: SweepResult,
    samples: Sequence[Mapping[str, Any]],
    facts: Mapping[str, str],
) -> dict[str, Any]:
    """Write what is finished; return the contents of `sweep.json`."""
    tree = sweep_tree(result, samples, facts)
    place.write(JSON_NAME, json_bytes(tree))
    return tree


def _axis_values(cells: Sequence[Cell], key: str) -> list[Any]:
    found: list[Any] = []
    for cell in cells:
        if cell.values[key] not in found:
            found.append(cell.values[key])
    return found


def rounded(value: float | None) -> float | None:
    """Return a number to seven digits: more differ from one device to the next."""
    return None if value is None else float(f"{value:.7g}")


def _safe(text: str) -> str:
    """Return text that no spreadsheet takes for a formula."""
    try:
        float(text)
    except ValueError:
        return f"'{text}" if text[:1] in ("=", "+", "-", "@") else text
    return text
