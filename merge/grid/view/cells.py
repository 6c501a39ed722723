"""Cells of a sweep or a tuning: one merge each, with its pictures and what was measured."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merge.grid.view.embedding import BUDGET_CHARS, Embedded, Embedding, embed
from merge.verify.document import duration, number, seconds

Tree = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Cell:
    """One merge as the page shows it.

    Attributes:
        index: Of the tree's cell.
        label: Its values in words.
        labels: Words of each value, by the keys of the axes.
        values: By the keys of the axes.
        pictures: By the index of their sample; nothing where the picture is missing.
        problem: Why it failed; empty if it did not.
        mark: Why it stands out, such as that it is best; empty if it does not.
        tree: All of it.
    """

    index: int
    label: str
    labels: Mapping[str, str]
    values: Tree
    pictures: Mapping[int, Embedded | None]
    problem: str
    mark: str
    tree: Tree

    @property
    def seconds(self) -> float:
        """Return how long all of it took."""
        return float(sum(self.tree["seconds"].values()))

    def mean(self, metric: str) -> float | None:
        """Return what was measured over all samples, if it is a number."""
        return finite(self.tree["metrics"].get(metric))

    def of_sample(self, metric: str, sample: int) -> float | None:
        """Return what was measured of one sample, if it is a number."""
        values = self.tree.get("samples", {}).get(metric) or ()
        return finite(values[sample]) if sample < len(values) else None


def finite(value: Any) -> float | None:
    """Return a value that can be drawn, or nothing."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if is_number and math.isfinite(value) else None


def shown_number(value: Any) -> str:
    """Return a number of the tree in words."""
    return "–" if value is None else number(value)


def tool_name(tree: Tree) -> str:
    """Return what wrote the tree."""
    return f"{tree['tool']['name']} {tree['tool']['version']}"


def command_of(tree: Tree) -> str:
    """Return the command line that makes a merge, of its words."""
    return shlex.join(tree["command"])


def deciding_metric(tree: Tree) -> Tree | None:
    """Return the metric that cells are compared by."""
    best = tree.get("best")
    named = [m for m in tree["metrics"] if best is not None and m["name"] == best["metric"]]
    judged = [metric for metric in tree["metrics"] if metric["better"]]
    return next(iter(named or judged), None)


def embed_samples(
    tree: Tree, folder: Path, shown: Sequence[int], budget: int = BUDGET_CHARS
) -> Embedding:
    """Embed the pictures of samples, those of the first one first.

    Args:
        tree: Of the samples and cells.
        folder: Where the pictures are.
        shown: Which samples the cells have pictures of, in the order of these.
        budget: How long all addresses together may be.
    """
    groups = []
    for position, index in enumerate(shown):
        sample = tree["samples"][index]
        names = [sample["source"], sample["reference"]]
        names += [
            cell["pictures"][position] for cell in tree["cells"] if position < len(cell["pictures"])
        ]
        groups.append([name for name in names if name])
    return embed(folder, groups, budget)


def make_cells(
    tree: Tree, embedding: Embedding, shown: Sequence[int], mark: str = "best"
) -> list[Cell]:
    """Return the cells with the pictures of the shown samples.

    Args:
        tree: Of a sweep or a tuning.
        embedding: Of its pictures.
        shown: Which samples the cells have pictures of, in the order of these.
        mark: What the best one is called.
    """
    best = tree.get("best")
    found = []
    for cell in tree["cells"]:
        names = dict(zip(shown, cell["pictures"], strict=False))
        labels = _labels(tree, cell)
        found.append(
            Cell(
                cell["index"],
                ", ".join(f"{key} {label}" for key, label in labels.items()),
                labels,
                cell["values"],
                {index: embedding.pictures.get(names.get(index, "")) for index in shown},
                cell["problem"],
                mark if best is not None and best["index"] == cell["index"] else "",
                cell,
            )
        )
    return found


def _labels(tree: Tree, cell: Tree) -> dict[str, str]:
    """Return the words of each value; they are listed in the order of the axes."""
    if "axes" in tree:
        keys = [axis["key"] for axis in tree["axes"]]
    else:
        # The values' own order is lost where the tree was read from a file: its keys are sorted.
        keys = [word.partition("=")[0] for word in cell["words"]]
    if set(keys) != set(cell["values"]):
        keys = list(cell["values"])
    return dict(zip(keys, cell["labels"], strict=False))


def sample_views(tree: Tree, shown: Iterable[int], embedding: Embedding) -> list[dict[str, Any]]:
    """Return what is shown of each sample."""
    samples = [tree["samples"][index] for index in shown]
    return [
        {
            "name": sample["instruction"],
            "about": f"{sample['image']} · seed {sample['seed']}",
            "source": embedding.pictures.get(sample["source"]),
            "reference": embedding.pictures.get(sample["reference"] or ""),
            "has_reference": bool(sample["reference"]),
        }
        for sample in samples
    ]


def reference_notes(tree: Tree) -> list[str]:
    """Return how the reference pictures were made, if there are any."""
    reference = tree["reference"]
    if reference is None:
        return []
    text = (
        f"Reference pictures: guidance {number(reference['guidance_scale'])}, image guidance "
        f"{number(reference['image_guidance_scale'])}, {number(reference['unet_rows'])} UNet rows "
        f"and {duration(reference['seconds'])} for all of them."
    )
    return [text]


def left_out(count: int, embedding: Embedding) -> list[str]:
    """Return what a page says where not all pictures of its samples are in it."""
    what = "Not all pictures are"
    if embedding.is_whole:
        if embedding.groups >= count:
            return []
        what = f"The pictures of the first {embedding.groups} of {count} samples are"
    return [f"{what} in this page: with all of them it would be too large. All are in images/."]


def cells_along(axis: Tree, cells: Iterable[Cell], **others: Any) -> list[Cell | None]:
    """Return the cell at each value of an axis, where those of other axes are given."""
    cells = list(cells)
    return [
        next(
            (
                cell
                for cell in cells
                if all(cell.values.get(k) == v for k, v in {**others, axis["key"]: value}.items())
            ),
            None,
        )
        for value in axis["values"]
    ]


def table(tree: Tree, axes: Sequence[Tree], cells: Iterable[Cell]) -> dict[str, Any]:
    """Return a table of all cells."""
    names = [metric["name"] for metric in tree["metrics"]]
    return {
        "axes": [axis["key"] for axis in axes],
        "metrics": names,
        "rows": [
            {
                "labels": [cell.labels.get(axis["key"], "–") for axis in axes],
                "problem": cell.problem,
                "mark": cell.mark,
                "measured": [shown_number(cell.tree["metrics"].get(name)) for name in names],
                "unet_rows": number(cell.tree["unet_rows"]),
                "time": duration(cell.seconds),
                "sha256": cell.tree["sha256"],
            }
            for cell in cells
        ],
    }


def dialog_data(tree: Tree, cells: Iterable[Cell]) -> dict[str, Any]:
    """Return what the page's script shows of a cell, all of it in words."""
    return {
        "samples": [
            {"name": sample["instruction"], "about": f"{sample['image']} · seed {sample['seed']}"}
            for sample in tree["samples"]
        ],
        "cells": {
            str(cell.index): {
                "label": cell.label,
                "command": command_of(cell.tree),
                "facts": _settings(cell.tree),
                "measures": [_measure(metric, cell, tree) for metric in tree["metrics"]],
            }
            for cell in cells
            if not cell.problem
        },
    }


def _settings(cell: Tree) -> list[tuple[str, str]]:
    settings = cell["settings"]
    timesteps = settings["timesteps"]
    return [
        ("Steps", number(settings["steps"])),
        ("Timesteps", "/".join(map(number, timesteps)) if timesteps else "the scheduler’s own"),
        ("Guidance", number(settings["guidance_scale"])),
        ("Image guidance", number(settings["image_guidance_scale"])),
        ("UNet rows", f"{number(cell['unet_rows'])} per edit"),
        *((f"Time, {name}", seconds(value)) for name, value in cell["seconds"].items()),
        ("SHA-256", cell["sha256"][:12]),
        ("Recipe digest", cell["recipe_digest"][:12]),
    ]


def _measure(metric: Tree, cell: Cell, tree: Tree) -> dict[str, Any]:
    name = metric["name"]
    if name not in cell.tree["metrics"]:
        return {"title": metric["title"], "mean": "–", "samples": []}
    values = [cell.of_sample(name, index) for index in range(len(tree["samples"]))]
    return {
        "title": metric["title"],
        "mean": shown_number(cell.tree["metrics"].get(name)),
        "samples": [shown_number(value) for value in values],
    }
