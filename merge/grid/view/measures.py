"""Charts of what was measured over the values of a recipe."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from merge.grid.view.cells import Cell, Tree, finite
from merge.grid.view.charts import Drawing, Line, Point, color_of, draw_curves, draw_rows
from merge.verify.document import number

_BETTER = {"lower": "lower is better", "higher": "higher is better"}


def measures(
    tree: Tree, axes: Sequence[Tree], cells: Sequence[Cell]
) -> tuple[list[dict[str, Any]], list[tuple[str, str]]]:
    """Return a chart per metric, and the color and name of each line.

    Args:
        tree: Of the metrics.
        axes: The first one is across.
        cells: What was measured.
    """
    groups = _groups(axes, cells)
    lines = [
        (color_of(index, len(groups), any(cell.mark for cell in group)), name)
        for index, (name, group) in enumerate(groups.items())
    ]
    figures = []
    for metric in tree["metrics"]:
        drawing = _draw(metric, axes[0], list(zip(lines, groups.values(), strict=True)))
        if drawing is not None:
            notes = (metric["meaning"], _BETTER.get(metric["better"], "shown, not judged"))
            note = "; ".join(filter(None, notes))
            figures.append({"title": metric["title"], "note": note, "drawing": drawing})
    return figures, _legend(lines)


def _groups(axes: Sequence[Tree], cells: Iterable[Cell]) -> dict[str, list[Cell]]:
    """Return the cells that differ in the first axis only, by what they have in common."""
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        if cell.problem:
            continue
        others = [axis["key"] for axis in axes[1:]]
        name = ", ".join(f"{key} {cell.labels[key]}" for key in others if key in cell.labels)
        groups.setdefault(name, []).append(cell)
    return groups


def _legend(lines: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    named = [(color, name) for color, name in lines if color != "rest"]
    others = len(lines) - len(named)
    return [*named, *([("rest", f"{others} others")] if others else [])]


def _draw(
    metric: Tree, axis: Tree, lines: Sequence[tuple[tuple[str, str], list[Cell]]]
) -> Drawing | None:
    """Return the chart of a metric, or nothing where it has no value."""
    is_numeric = all(finite(value) is not None for value in axis["values"])
    rows: list[tuple[str, Line]] = []
    curves = []
    for (color, name), group in lines:
        points = []
        for cell in group:
            value = cell.mean(metric["name"])
            if value is None:
                continue
            x = finite(cell.values[axis["key"]]) if is_numeric else None
            title = f"{cell.label}: {number(value)}"
            point = Point(x or 0.0, value, title, is_best=bool(cell.mark))
            points.append(point)
            rows.append((cell.labels[axis["key"]], Line(name, (point,), color)))
        if points:
            curves.append(Line(name, tuple(points), color))
    if not curves:
        return None
    values = [point.y for curve in curves for point in curve.points]
    label = (
        f"{metric['title']} over {axis['key']}: {len(values)} values from "
        f"{number(min(values))} to {number(max(values))}"
    )
    if is_numeric:
        return draw_curves(curves, label=label, x_name=axis["key"])
    return draw_rows(rows, label=label)
