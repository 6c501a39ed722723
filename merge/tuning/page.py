"""`tune.html`: which weight was chosen, and why."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from merge.grid import page
from merge.grid.page import render
from merge.grid.view.cells import (
    Cell,
    Tree,
    command_of,
    dialog_data,
    embed_samples,
    finite,
    left_out,
    make_cells,
    reference_notes,
    sample_views,
    shown_number,
    table,
    tool_name,
)
from merge.grid.view.charts import Drawing, Line, Point, color_of, draw_curves
from merge.grid.view.grids import by_sample
from merge.grid.view.measures import measures
from merge.verify.document import duration, make_environment, number

_FOLDER = Path(__file__).parent
_WIDE, _NARROW = (1000, 340), (360, 260)
_TICKS = 4
_WORDS = {
    "weight": "weight",
    "guidance_scale": "guidance",
    "timesteps": "timesteps",
    "steps": "steps",
}


def render_tune(tree: Mapping[str, Any], folder: Path) -> str:
    """Return a tuning as one HTML document.

    Everything that comes from the tree is escaped, and the document's own policy forbids every
    script, style and address but those that are in it.

    Args:
        tree: The content of `tune.json`.
        folder: Where the pictures that it names are.
    """
    return render(_environment(), "page.html", _view(tree, folder), ("page.css",))


@functools.cache
def _environment() -> jinja2.Environment:
    return make_environment((_FOLDER, page.FOLDER), {"number": number})


def _view(tree: Tree, folder: Path) -> dict[str, Any]:
    embedding = embed_samples(tree, folder, tree["shown"])
    shown = tree["shown"][: embedding.groups]
    axes = _axes(tree["cells"])
    # The grid marks what was chosen as the best cell.
    chosen = _cell_at(tree["cells"], tree["chosen"])
    best = None if chosen is None else {"index": chosen["index"], "metric": _decides(tree)["name"]}
    marked = {**tree, "best": best}
    cells = make_cells(marked, embedding, shown, "chosen")
    by_index = {cell.index: cell for cell in cells}
    before = _cell_at(tree["cells"], tree["before"])
    along = _along_weight(cells, tree["chosen"] or tree["before"])
    figures, legend = measures(tree, axes, cells) if cells else ([], [])
    return {
        "recipe": tree["recipe"],
        "is_decided": tree["decided"],
        "verdict": _verdict(tree),
        "reason": tree["reason"],
        "command": command_of(tree) if tree["decided"] else "",
        "facts": _facts(tree),
        "decides": _decides(tree),
        "curves": _curves(tree["curves"], tree),
        "spread": tree["spread"],
        "held_out": _held_out(tree["held_out"]),
        "pairs": _pairs(tree, shown, embedding, by_index, before, chosen),
        "panel": by_sample(
            marked, shown, [cell.labels["weight"] for cell in along], along, embedding
        ),
        "has_grid": bool(along and shown),
        "metric": _decides(tree),
        "screen": _screen(tree),
        "figures": figures,
        "legend": legend,
        "table": table(tree, axes, cells) if cells else None,
        "cost": tree["cost"],
        "notes": [
            *tree["notes"],
            *reference_notes(tree),
            *left_out(len(tree["shown"]), embedding),
        ],
        "tool": tool_name(tree),
        "data": dialog_data(tree, cells),
    }


def _decides(tree: Tree) -> dict[str, Any]:
    """Return the metric that decides, with the direction that the list of metrics gives it."""
    decides = tree["decides"]
    known = (m["better"] for m in tree["metrics"] if m["name"] == decides["name"])
    return {"better": next(known, "lower"), **decides}


def _verdict(tree: Tree) -> str:
    chosen, before = tree["chosen"], tree["before"]
    if not tree["decided"] or chosen is None:
        return "Nothing was chosen; the recipe stays as it is"
    parts = []
    for key in tree["over"]:
        name = _WORDS.get(key, key)
        value, old = _words(chosen.get(key)), _words(before.get(key))
        parts.append(
            f"{name} {value}, as it was" if value == old else f"{name} {value} instead of {old}"
        )
    text = "; ".join(parts)
    return f"Chosen: {text}"


def _words(value: Any) -> str:
    if value is None:
        return "the scheduler’s own"
    if isinstance(value, (list, tuple)):
        return "/".join(map(str, value))
    return number(value)


def _facts(tree: Tree) -> list[tuple[str, str, str]]:
    device = tree["device"].split() or ["–"]
    cost, spread = tree["cost"], tree["spread"]
    folds = spread["folds"] if spread else []
    span = "–"
    if folds:
        low, high = number(spread["low"]), number(spread["high"])
        span = low if low == high else f"{low}–{high}"
    return [
        ("Folds pick", span, f"{len(folds)} folds"),
        ("Samples", str(len(tree["samples"])), "per merge"),
        ("Merges", number(cost["merges"]), ""),
        ("UNet rows", number(cost["unet_rows"]), "in all"),
        ("Time", duration(cost["seconds"]), "in all"),
        ("Device", device[0], " ".join(device[1:])),
    ]


def _axes(cells: Iterable[Tree]) -> list[dict[str, Any]]:
    """Return the axes of the cells, the weight first, with their values in order of appearance."""
    found: dict[str, list[Any]] = {"weight": []}
    for cell in cells:
        for key, value in cell["values"].items():
            values = found.setdefault(key, [])
            if value not in values:
                values.append(value)
    return [{"key": key, "values": values} for key, values in found.items()]


def _of(cell: Tree, key: str) -> Any:
    """Return a setting of a cell: one that it varies, or one that all have."""
    return cell["values"][key] if key in cell["values"] else cell["settings"].get(key)


def _is_at(cell: Tree, setting: Tree, *, but: str = "") -> bool:
    """Return True for a cell of a setting, whose values it has or all cells have."""
    for key, value in setting.items():
        if key == but:
            continue
        if key in cell["values"]:
            if cell["values"][key] != value:
                return False
        elif value is not None and cell["settings"].get(key) not in (None, value):
            return False
    return True


def _cell_at(cells: Iterable[Tree], setting: Tree | None) -> Tree | None:
    if setting is None:
        return None
    return next((cell for cell in cells if not cell["problem"] and _is_at(cell, setting)), None)


def _along_weight(cells: Iterable[Cell], setting: Tree) -> list[Cell]:
    """Return the cells that differ from a setting in the weight only, by their weight."""
    along = [
        cell
        for cell in cells
        if finite(cell.values.get("weight")) is not None
        if _is_at(cell.tree, setting, but="weight")
    ]
    return sorted(along, key=lambda cell: float(cell.values["weight"]))


def _pairs(
    tree: Tree,
    shown: Sequence[int],
    embedding: Any,
    cells: Mapping[int, Cell],
    before: Tree | None,
    chosen: Tree | None,
) -> list[dict[str, Any]]:
    """Return the pictures of the recipe as it was beside those of what was chosen."""
    if before is None or chosen is None or before["index"] == chosen["index"]:
        return []
    old, new = cells[before["index"]], cells[chosen["index"]]
    views = zip(shown, sample_views(tree, shown, embedding), strict=True)
    return [
        {
            **view,
            "before": old.pictures[index],
            "after": new.pictures[index],
            "titles": (f"Before: {old.label}", f"Chosen: {new.label}"),
        }
        for index, view in views
        if old.pictures[index] and new.pictures[index]
    ]


def _held_out(held_out: Tree | None) -> dict[str, Any] | None:
    if held_out is None:
        return None
    rows = [
        {
            "weight": number(row["weight"]),
            "difference": shown_number(row["difference"]),
            "interval": f"{shown_number(row['low'])} to {shown_number(row['high'])}",
            "result": "told apart" if row["low"] * row["high"] > 0 else "not told apart",
        }
        for row in held_out["neighbours"]
    ]
    return {**held_out, "rows": rows, "value": shown_number(held_out["value"])}


def _screen(tree: Tree) -> dict[str, Any] | None:
    screen = tree["screen"]
    if screen is None:
        return None
    named: Tree = next((m for m in tree["metrics"] if m["name"] == screen["name"]), {})
    known = {**named, **screen}
    title = known.get("title") or screen["name"]
    return {
        "title": title[:1].upper() + title[1:],
        "meaning": known.get("meaning") or "",
        "curves": _curves(screen["curves"], tree, is_plain=True),
    }


def _curves(curves: Sequence[Tree], tree: Tree, *, is_plain: bool = False) -> dict[str, Any] | None:
    """Return the wide and the narrow drawing of curves over the weight, and their legend.

    Args:
        curves: Of `tune.json`.
        tree: All of it.
        is_plain: Whether to leave out what the choice itself is made of.
    """
    known = [
        curve for curve in curves if any(finite(p["value"]) is not None for p in curve["points"])
    ]
    if not known:
        return None
    chosen = tree["chosen"]
    lines = []
    for index, curve in enumerate(known):
        color = color_of(index, len(known), curve["is_chosen"])
        at = (
            chosen["weight"] if chosen is not None and curve["is_chosen"] and not is_plain else None
        )
        lines.append(_line(curve, color, at, is_banded=len(known) <= 3 or curve["is_chosen"]))
    guides, picks = [], []
    if not is_plain:
        guides.append(
            (float(tree["before"]["weight"]), f"recipe {number(tree['before']['weight'])}")
        )
        if chosen is not None and chosen["weight"] != tree["before"]["weight"]:
            guides.append((float(chosen["weight"]), f"chosen {number(chosen['weight'])}"))
        elif chosen is not None:
            guides = [(float(chosen["weight"]), f"chosen, as it was {number(chosen['weight'])}")]
        picks = [float(pick) for pick in (tree["spread"] or {"folds": []})["folds"]]

    def draw(size: tuple[int, int]) -> Drawing:
        return draw_curves(
            lines,
            label=_label(known),
            x_name="weight",
            size=size,
            ticks=_TICKS,
            guides=guides,
            picks=picks,
        )

    named: list[tuple[str, str]] = [
        (line.color, _legend(curve)) for line, curve in zip(lines, known, strict=True)
    ]
    legend = [(color, name) for color, name in named if color != "rest"]
    if len(legend) < len(named):
        legend.append(("rest", f"{len(named) - len(legend)} others"))
    return {"wide": draw(_WIDE), "narrow": draw(_NARROW), "legend": legend, "only": named[0][1]}


def _line(curve: Tree, color: str, chosen: float | None, *, is_banded: bool) -> Line:
    points = []
    for point in curve["points"]:
        value = finite(point["value"])
        if value is None:
            continue
        low, high = finite(point["low"]), finite(point["high"])
        title = f"{curve['label']}, weight {number(point['weight'])}: {number(value)}"
        if low is not None and high is not None:
            title += f" ({number(low)} to {number(high)})"
        is_best = chosen is not None and math.isclose(point["weight"], chosen)
        points.append(Point(float(point["weight"]), value, title, low, high, is_best))
    return Line(curve["label"], tuple(points), color, is_banded)


def _label(curves: Iterable[Tree]) -> str:
    return "; ".join(_legend(curve) for curve in curves)


def _legend(curve: Tree) -> str:
    best = curve.get("best_weight")
    return str(curve["label"]) + (f", best at {number(best)}" if best is not None else "")
