"""Grids of pictures: which cell stands in which column and row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from merge.grid.view.cells import (
    Cell,
    Tree,
    cells_along,
    deciding_metric,
    sample_views,
    shown_number,
)
from merge.grid.view.embedding import Embedding
from merge.verify.document import GAP, number

_SHADES = 5
# Of columns up to which pictures are this large; the smallest ones are for what has more.
_SIZES = ((4, "large"), (6, "medium"))


def _size(columns: int) -> str:
    return next((name for limit, name in _SIZES if columns <= limit), "small")


def by_axes(
    axes: Sequence[Tree], cells: Sequence[Cell], metric: Tree | None
) -> list[dict[str, Any]]:
    """Return a grid for each value of the third axis, or the only one."""
    across, down, *rest = axes
    name = metric["name"] if metric else ""
    shades = _shades({cell.index: cell.mean(name) for cell in cells}, metric)
    third = zip(rest[0]["labels"], rest[0]["values"], strict=True) if rest else [("", None)]
    panels = []
    for title, value in third:
        rows = []
        for label, at in zip(down["labels"], down["values"], strict=True):
            fixed = {down["key"]: at} | ({rest[0]["key"]: value} if rest else {})
            items = [
                {
                    "cell": cell,
                    "value": shown_number(cell.mean(name)) if cell and metric else "",
                    "shade": shades.get(cell.index, "") if cell else "",
                }
                for cell in cells_along(across, cells, **fixed)
            ]
            rows.append({"label": label, "about": "", "given": [], "cells": items, "sample": None})
        panels.append(
            {
                "title": title,
                "corner": f"{down['key']}{GAP}↓\n{across['key']}{GAP}→",
                "size": _size(len(across["values"])),
                "columns": [{"label": text, "value": "", "shade": ""} for text in across["labels"]],
                "rows": rows,
            }
        )
    return panels


def by_sample(
    tree: Tree,
    shown: Sequence[int],
    labels: Sequence[str],
    along: Sequence[Cell | None],
    embedding: Embedding,
) -> dict[str, Any]:
    """Return a grid with a row per shown sample.

    Args:
        tree: Of the samples.
        shown: Which samples.
        labels: Of the columns.
        along: The cell of each column.
        embedding: Of the pictures.
    """
    metric = deciding_metric(tree)
    name = metric["name"] if metric else ""
    shades = _shades({cell.index: cell.mean(name) for cell in along if cell}, metric)
    has_reference = any(tree["samples"][index]["reference"] for index in shown)
    rows = []
    for index, sample in zip(shown, sample_views(tree, shown, embedding), strict=True):
        own = {cell.index: cell.of_sample(name, index) for cell in along if cell}
        own_shades = _shades(own, metric)
        rows.append(
            {
                "label": sample["name"],
                "about": sample["about"],
                "sample": index,
                "given": [
                    ("Source", sample["source"]),
                    *([("Reference", sample["reference"])] if has_reference else []),
                ],
                "cells": [
                    {
                        "cell": cell,
                        "value": _shown(own[cell.index]) if cell and metric else "",
                        "shade": own_shades.get(cell.index, "") if cell else "",
                    }
                    for cell in along
                ],
            }
        )
    given = ["Source", *(["Reference"] if has_reference else [])]
    columns = [{"label": title, "value": "", "shade": ""} for title in given]
    for label, cell in zip(labels, along, strict=True):
        value = cell.mean(name) if cell else None
        shade = shades.get(cell.index, "") if cell else ""
        columns.append(
            {
                "label": label,
                "value": f"mean {number(value)}" if value is not None else "",
                "shade": shade,
            }
        )
    return {
        "title": "",
        "corner": "Sample",
        "size": _size(len(columns)),
        "columns": columns,
        "rows": rows,
    }


def _shown(value: float | None) -> str:
    """Return a number in words, and nothing where a metric has none for a sample."""
    return "" if value is None else shown_number(value)


def _shades(values: Mapping[int, float | None], metric: Tree | None) -> dict[int, str]:
    """Return the class of each value's ground, from the worst one to the best."""
    known = {index: value for index, value in values.items() if value is not None}
    if metric is None or not metric["better"] or not known:
        return {}
    worst, best = max(known.values()), min(known.values())
    if metric["better"] == "higher":
        worst, best = best, worst
    return {
        index: f"shade-{round((value - worst) / (best - worst) * _SHADES) if best != worst else 0}"
        for index, value in known.items()
    }
