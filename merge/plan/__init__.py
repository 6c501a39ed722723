"""Decide what happens to every tensor, from headers alone, before any weight is read."""

from merge.plan.build import build_plan
from merge.plan.memory import default_threads, peak_bytes
from merge.plan.model import (
    BakeTerm,
    ComponentPlan,
    DeltaTerm,
    LeftOut,
    LoraTerm,
    MergePlan,
    PlanFile,
    TensorPlan,
    TensorRef,
)
from merge.plan.render import plan_to_json, render_plan

__all__ = [
    "BakeTerm",
    "ComponentPlan",
    "DeltaTerm",
    "LeftOut",
    "LoraTerm",
    "MergePlan",
    "PlanFile",
    "TensorPlan",
    "TensorRef",
    "build_plan",
    "default_threads",
    "peak_bytes",
    "plan_to_json",
    "render_plan",
]
