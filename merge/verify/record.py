"""What a run and its recipe tell about a merge, as checks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from merge.verify.checks import make_check
from merge.verify.model import Check

# A target that lies beyond distilled descends from neither; see `merge.engine.origin`.
_BEYOND = 1.5


def check_record(recipe: Mapping[str, Any], run: Mapping[str, Any]) -> list[Check]:
    """Check a merge's weight, and which of its parents the target descends from.

    Args:
        recipe: Of the lock; empty without one.
        run: Of `run.json`; `origins` are `merge.engine.Origin`s.
    """
    checks = []
    weight = _number(recipe, "weight")
    if weight is not None:
        checks.append(make_check("weight_not_negative", weight))
    origins = run.get("origins")
    for origin in origins if isinstance(origins, list) else []:
        position = _number(origin, "position")
        if position is not None and position < _BEYOND:
            detail = [str(origin["role"])] if origin.get("role") else []
            checks.append(make_check("base_is_nearer", position, detail=detail))
    return checks


def _number(tree: Any, name: str) -> float | None:
    """Return a finite number of a table that anybody can have written to."""
    value = tree.get(name) if isinstance(tree, dict) else None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)
