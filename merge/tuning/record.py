"""`tune.json`: everything that a tuning measured and chose."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from merge._version import __version__
from merge.grid.model import Measured
from merge.grid.record import SWEEP_VERSION, cell_tree, metric_names, metric_trees, score_of
from merge.grid.statistics import part, score_interval
from merge.tuning.fit import folds
from merge.tuning.model import Curve, HeldOut, TuneResult

JSON_NAME, PAGE_NAME, RECIPE_NAME = "tune.json", "tune.html", "tuned.yaml"


def tune_tree(
    result: TuneResult,
    deciding: Sequence[int],
    samples: Sequence[Mapping[str, Any]],
    shown: Sequence[int],
    facts: Mapping[str, str],
    cost: Mapping[str, float],
) -> dict[str, Any]:
    """Return the contents of `tune.json`.

    Args:
        result: What was found by now.
        deciding: Indices of the samples that settings are chosen on.
        samples: As JSON has them.
        shown: Indices of those with pictures.
        facts: What decides the numbers, each to a digest of it.
        cost: `unet_rows`, `seconds` and `merges`.
    """
    reference, ranking = result.reference, result.ranking
    names, score = metric_names(result.measured.values()), score_of(result.measured.values())
    return {
        "schema_version": SWEEP_VERSION,
        "tool": {"name": "instruct-merge", "version": __version__},
        "recipe": result.recipe,
        "device": result.device,
        "facts": dict(facts),
        "decided": result.chosen is not None,
        "reason": result.reason,
        "over": list(result.over),
        "chosen": None if result.chosen is None else result.chosen.tree(_steps(result)),
        "words": list(result.overrides),
        "command": ["instruct-merge", "run", result.source, *result.overrides],
        "before": result.before.tree(result.steps),
        "decides": {"name": ranking.name, "title": ranking.title, "meaning": ranking.meaning},
        "spread": None
        if not result.picks
        else {
            "folds": [round(weight, 3) for weight in result.picks],
            "low": round(min(result.picks), 3),
            "high": round(max(result.picks), 3),
        },
        "curves": [_curve(result, curve, deciding) for curve in result.curves],
        "held_out": None if result.held_out is None else _held_out(result.held_out),
        "screen": None,
        "samples": list(samples),
        "shown": list(shown),
        "reference": None
        if reference is None
        else {
            "guidance_scale": reference.guidance_scale,
            "image_guidance_scale": reference.image_guidance_scale,
            "unet_rows": reference.unet_rows,
            "seconds": round(reference.seconds, 3),
        },
        "metrics": metric_trees(names),
        "cells": [
            cell_tree(cell, result.measured[cell.index], result.source, score)
            for cell in result.cells
            if cell.index in result.measured
        ],
        "cost": dict(cost),
        "notes": list(result.notes),
    }


def _steps(result: TuneResult) -> int:
    assert result.chosen is not None
    timesteps = result.chosen.timesteps
    return result.steps if timesteps is None else len(timesteps)


def _curve(result: TuneResult, curve: Curve, deciding: Sequence[int]) -> dict[str, Any]:
    chosen = result.chosen
    places = "own timesteps" if curve.timesteps is None else "/".join(map(str, curve.timesteps))
    is_chosen = chosen is not None and (chosen.guidance_scale, chosen.timesteps) == (
        curve.guidance_scale,
        curve.timesteps,
    )
    return {
        "label": f"{result.steps} steps at {places}, guidance {curve.guidance_scale:g}",
        "is_chosen": is_chosen,
        "points": [
            {"weight": weight, "index": index, **_point(result, result.measured[index], deciding)}
            for weight, index in curve.cells.items()
        ],
        "best_weight": curve.best_weight,
    }


def _point(result: TuneResult, measured: Measured, deciding: Sequence[int]) -> dict[str, Any]:
    ranking, values = result.ranking, part(measured.values, deciding)
    found = score_interval(ranking, values)
    parts = [ranking.score(part(measured.values, fold)) for fold in folds(deciding)]
    return {
        "value": _amount(found.value, ranking.is_share),
        # A share counts from above, so that its ends change places.
        "low": _amount(found.high if ranking.is_share else found.low, ranking.is_share),
        "high": _amount(found.low if ranking.is_share else found.high, ranking.is_share),
        "folds": [_amount(score, ranking.is_share) for score in parts],
    }


def _amount(score: float, is_share: bool) -> float:
    """Return a score as what it is made of: a share, or a mean square."""
    return float(f"{-score if is_share else math.exp(score):.7g}")


def _held_out(found: HeldOut) -> dict[str, Any]:
    return {
        "samples": found.samples,
        "what": found.what,
        "value": found.value,
        "neighbours": [
            {
                "weight": neighbour.weight,
                # How many times as large.
                "difference": round(math.expm1(neighbour.difference.value), 6),
                "low": round(math.expm1(neighbour.difference.low), 6),
                "high": round(math.expm1(neighbour.difference.high), 6),
            }
            for neighbour in found.neighbours
        ],
        "passed": found.passed,
    }
