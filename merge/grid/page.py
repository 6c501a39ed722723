"""`sweep.html`: a grid of pictures over the values of a recipe, and what was measured."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from merge.grid.view.cells import (
    Cell,
    Tree,
    cells_along,
    command_of,
    deciding_metric,
    dialog_data,
    embed_samples,
    left_out,
    make_cells,
    reference_notes,
    sample_views,
    table,
    tool_name,
)
from merge.grid.view.grids import by_axes, by_sample
from merge.grid.view.measures import measures
from merge.verify import document
from merge.verify.document import duration, make_environment, number, policy, read_part

FOLDER = Path(__file__).parent


def render_sweep(tree: Mapping[str, Any], folder: Path) -> str:
    """Return a sweep as one HTML document.

    Everything that comes from the tree is escaped, and the document's own policy forbids every
    script, style and address but those that are in it.

    Args:
        tree: The content of `sweep.json`.
        folder: Where the pictures that it names are.
    """
    return render(_environment(), "page.html", _view(tree, folder), ("page.css",))


def render(
    environment: jinja2.Environment, name: str, view: Mapping[str, Any], styles: Sequence[str]
) -> str:
    """Render a page of cells with its style, its script and its policy.

    Args:
        environment: Of the template.
        name: Of the template.
        view: What the template needs besides.
        styles: Files of the template's folder, after the report's and the grid's own.
    """
    paths = [document.FOLDER / "page.css", FOLDER / "page.css"]
    loader = environment.loader
    assert isinstance(loader, jinja2.FileSystemLoader)
    paths += [Path(loader.searchpath[0]) / style for style in styles]
    style = "".join(read_part(path) for path in dict.fromkeys(paths))
    script = read_part(FOLDER / "page.js")
    return environment.get_template(name).render(
        **view, style=style, script=script, policy=policy(style, script)
    )


@functools.cache
def _environment() -> jinja2.Environment:
    return make_environment((FOLDER,), {})


def _view(tree: Tree, folder: Path) -> dict[str, Any]:
    axes, samples = tree["axes"], tree["samples"]
    shown = range(len(samples))
    embedding = embed_samples(tree, folder, shown)
    shown = range(min(embedding.groups, len(samples)))
    cells = make_cells(tree, embedding, shown)
    metric = deciding_metric(tree)
    is_by_sample = len(axes) == 1
    if is_by_sample:
        along = cells_along(axes[0], cells)
        panels = [by_sample(tree, shown, axes[0]["labels"], along, embedding)]
    else:
        panels = by_axes(axes, cells, metric)
    figures, legend = measures(tree, axes, cells)
    return {
        "recipe": tree["recipe"],
        "axes": axes,
        **_outcome(tree, cells),
        "facts": _facts(tree, cells),
        "samples": sample_views(tree, shown, embedding),
        "is_by_sample": is_by_sample,
        "metric": metric,
        "panels": panels,
        "figures": figures,
        "legend": legend,
        "table": table(tree, axes, cells),
        "notes": [*tree["notes"], *reference_notes(tree), *left_out(len(samples), embedding)],
        "tool": tool_name(tree),
        "data": dialog_data(tree, cells),
    }


def _outcome(tree: Tree, cells: Sequence[Cell]) -> dict[str, Any]:
    total = math.prod(len(axis["values"]) for axis in tree["axes"])
    best = next((cell for cell in cells if cell.mark), None)
    failed = sum(bool(cell.problem) for cell in cells)
    made = len(cells) - failed
    if not tree["complete"]:
        words = f"{len(cells)} of {total} cells so far"
        if best is not None:
            words += f"; best so far: {best.label}"
    elif best is not None:
        words = f"Best of {made} cells: {best.label}"
    elif not made:
        words = "No cell could be made"
    elif deciding_metric(tree) is None:
        words = f"{made} cells; nothing was measured that tells which is best"
    else:
        words = "The samples are too few to tell which cell is best"
    doubts = [f"{failed} {'cell' if failed == 1 else 'cells'} failed."] if failed else []
    return {
        "is_good": tree["complete"] and best is not None,
        "verdict": words,
        "command": command_of(best.tree) if best is not None else "",
        "doubts": doubts,
    }


def _facts(tree: Tree, cells: Sequence[Cell]) -> list[tuple[str, str, str]]:
    total = math.prod(len(axis["values"]) for axis in tree["axes"])
    device = tree["device"].split() or ["–"]
    rows = [cell.tree["unet_rows"] for cell in cells if not cell.problem]
    span = "–" if not rows else number(min(rows))
    if rows and min(rows) != max(rows):
        span = f"{number(min(rows))}–{number(max(rows))}"
    spent = sum(cell.seconds for cell in cells)
    return [
        ("Cells", str(len(cells)), "" if len(cells) == total else f"of {total}"),
        ("Samples", str(len(tree["samples"])), "per cell"),
        ("UNet rows", span, "per edit"),
        ("Time", duration(spent), "of all workers"),
        ("Device", device[0], " ".join(device[1:])),
    ]
