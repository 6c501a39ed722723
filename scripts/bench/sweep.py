"""What a cell of a sweep costs, against the merge and the edits that it is made of.

    python scripts/bench/sweep.py                       # the demo's models
    python scripts/bench/sweep.py --models FOLDER --resolution 512 --device cuda

A sweep over weights is timed cell by cell, and so are `run` without its closing edits and the edits
of its output with a model that is loaded already. One JSON on stdout.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
# Not this folder, whose merge.py would hide the package.
sys.path[0] = str(ROOT)
# Behind it, for the modules that benchmarks share.
sys.path.insert(1, str(Path(__file__).resolve().parent))

from machine import machine_facts  # noqa: E402

from merge import (  # noqa: E402
    EditRequest,
    EditSettings,
    Inputs,
    edit_many,
    load_editor,
    load_recipe,
    run_recipe,
    sweep,
    tune,
)
from merge.errors import VerificationError  # noqa: E402
from merge.grid.axes import read_axes  # noqa: E402
from merge.grid.inputs import find_edits  # noqa: E402
from merge.grid.planning import CellPlanner  # noqa: E402
from merge.verify.drawings import draw_picture  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=Path, help="folder with base, distilled and target")
    parser.add_argument("--resolution", type=int, help="of the edits; default: the recipe's")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--weights", default="0:1.75:0.25")
    parser.add_argument("--tune", action="store_true", help="time a whole tuning, too")
    arguments = parser.parse_args()
    words = overrides(arguments)
    inputs = Inputs(samples=arguments.samples)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        found = sweep(
            "demo",
            [f"weight={arguments.weights}", *words],
            out=folder / "sweep",
            inputs=inputs,
            metrics=("path",),
            device=arguments.device,
        )
        cells = [found.measured[cell.index] for cell in found.cells[1:]]
        apart = [
            parts(arguments, words, cell.values["weight"], folder / f"{cell.index}", inputs)
            for cell in found.cells[1:]
        ]
        figures = {
            "machine": machine_facts(arguments.device),
            "device": found.device,
            "cells": len(found.cells),
            "samples": arguments.samples,
            "cell_s": median([sum(cell.seconds.values()) for cell in cells]),
            "of_which": {
                name: median([cell.seconds[name] for cell in cells])
                for name in ("merge", "edit", "measure", "write")
            },
            "merge_alone_s": median([each["merge"] for each in apart]),
            "edits_alone_s": median([each["edits"] for each in apart]),
            "path_s": found.reference.seconds if found.reference else None,
            "path_rows": found.reference.unet_rows if found.reference else None,
        }
        both = figures["merge_alone_s"] + figures["edits_alone_s"]
        figures["cell_to_merge_and_edits"] = round(figures["cell_s"] / both, 3)
        if arguments.tune:
            figures["tune"] = whole_tuning(arguments, words, folder, inputs)
    print(json.dumps(figures, indent=1))


def overrides(arguments: argparse.Namespace) -> list[str]:
    """Return the words that make the demo's recipe one over other models."""
    words = []
    if arguments.models is not None:
        words += [
            f"models.{role}.path={(arguments.models / role).resolve()}"
            for role in ("base", "distilled", "target")
        ]
        words += ["scheduler.config={}", "verify.edits=[]", "verify.compare.guidance_scale=7.5"]
        words += ["verify.compare.image_guidance_scale=1.5", "timesteps=null"]
    if arguments.resolution is not None:
        words.append(f"resolution={arguments.resolution}")
    return words


def parts(
    arguments: argparse.Namespace, words: list[str], weight: float, folder: Path, inputs: Inputs
) -> dict[str, float]:
    """Time the merge of one cell as `run` does it, and its edits with a loaded model."""
    _, plain = read_axes(words)
    recipe = load_recipe("demo", [*plain, f"weight={weight}", "allow_noop=true"])
    result = run_recipe(recipe, folder, device=arguments.device, verify=False)
    cell = CellPlanner(recipe, find_edits(recipe, inputs), count=inputs.samples, is_dry=True)
    (planned,) = cell.plan([((), ())])
    started = time.perf_counter()
    cell.prepared[0].with_recipe(recipe)
    planned_s = time.perf_counter() - started
    editor = load_editor(folder, device=arguments.device)
    resolution = recipe.verify.resolution
    requests = [
        EditRequest(
            sample.edit.image or draw_picture(sample.edit.drawing, resolution),
            sample.edit.instruction,
            sample.seed,
        )
        for sample in planned.samples
    ]
    settings: EditSettings = planned.settings[0]
    # Warm, as the resident model of a sweep is.
    list(edit_many(editor, requests[:1], settings))
    started = time.perf_counter()
    list(edit_many(editor, requests, settings, batch_size=len(requests)))
    seconds: dict[str, Any] = result.seconds  # type: ignore[assignment]
    return {
        # As long as the plan is, of which a cell has its own, too.
        "merge": planned_s + seconds["merge"] + seconds["hash_output"],
        "edits": time.perf_counter() - started,
    }


def whole_tuning(
    arguments: argparse.Namespace, words: list[str], folder: Path, inputs: Inputs
) -> dict[str, Any]:
    """Time a tuning over the weight."""
    started = time.perf_counter()
    try:
        tune("demo", words, out=folder / "tune", inputs=inputs, device=arguments.device)
    except VerificationError as error:
        print(error)
    seconds = time.perf_counter() - started
    cost = json.loads((folder / "tune" / "tune.json").read_text())["cost"]
    return {"seconds": round(seconds, 1), **cost}


def median(values: list[float]) -> float:
    return round(statistics.median(values), 4)


if __name__ == "__main__":
    main()
