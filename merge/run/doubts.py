"""What looks wrong with a merge though nothing fails, told before it and after its edits."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from merge.plan.model import MergePlan
from merge.recipe.schema import Recipe

if TYPE_CHECKING:
    from merge.engine.origin import Origin

_LOG = logging.getLogger(__name__)
# Checks whose warnings come before the merge already.
_TOLD_BEFORE = ("weight_not_negative", "base_is_nearer")


def tell_doubts(recipe: Recipe, plan: MergePlan) -> tuple[Origin, ...]:
    """Warn of a negative weight and of base and distilled that look swapped.

    Args:
        recipe: For its weight.
        plan: Of the merge; its files are there.

    Returns:
        What was measured of the target's descent.
    """
    from merge.engine.origin import measure_origins

    if recipe.weight < 0:
        _LOG.warning(
            "weight %g is negative: it takes the few-step skill away instead of adding it",
            recipe.weight,
        )
    origins = measure_origins(plan)
    for origin in origins:
        if origin.looks_swapped:
            _LOG.warning(
                "target is nearer to %s than to base (%.4g against %.4g of its norm): "
                "base and distilled look swapped",
                origin.role,
                origin.to_distilled,
                origin.to_base,
            )
    return origins


def tell_verdict(report: Mapping[str, Any]) -> str:
    """Pass on what the closing edits warn of, and return what they prove.

    Args:
        report: As in `report.json`.
    """
    for line in report["warnings"]:
        if not line.startswith(_TOLD_BEFORE):
            _LOG.warning("%s", line)
    return "\n".join(filter(None, (report["verdict"], report["not_judged"])))
