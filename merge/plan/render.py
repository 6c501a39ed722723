"""A plan as text for people and as JSON for programs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from merge.header.dtypes import DTYPE_WORDS
from merge.methods.table import METHODS
from merge.plan.model import BlockWeight, MergePlan, TensorPlan

SCHEMA_VERSION = 1
_SHOWN = 12
_BLOCKS_PER_LINE = 6


def plan_to_json(plan: MergePlan, peak_bytes: int) -> dict[str, Any]:
    """Return the plan as plain values, every tensor and every left-out key in it."""
    return {
        "schema_version": SCHEMA_VERSION,
        "recipe": plan.recipe,
        "architecture": plan.family.name,
        "tensors": [_row(tensor) for tensor in plan.tensors],
        "left_out": [
            {"model": item.model, "key": item.key, "reason": item.reason} for item in plan.left_out
        ],
        "counts": plan.counts,
        "blocks": [
            {"name": block.name, "weights": list(block.weights), "tensors": block.tensors}
            for block in plan.blocks
        ],
        "notes": list(plan.notes),
        "warnings": list(plan.warnings),
        "read_bytes": plan.read_bytes,
        "write_bytes": plan.write_bytes,
        "peak_bytes": peak_bytes,
    }


def render_plan(plan: MergePlan, peak_bytes: int) -> str:
    """Return a summary of the plan, a screen or two long."""
    return "\n".join(_lines(plan, peak_bytes))


def format_bytes(count: int) -> str:
    """Return a size in the decimal units of disks and of the Hub, e.g. `1.72 GB`."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count} B"


def _row(tensor: TensorPlan) -> dict[str, Any]:
    sources = ["target"]
    if tensor.deltas:
        sources += ["base", *(term.role for term in tensor.deltas)]
    elif any(term.base is not None for term in tensor.loras):
        sources.append("base")
    sources += [term.role for term in tensor.loras]
    sources += [term.role for term in tensor.bakes]
    return {
        "key": tensor.key,
        "component": tensor.component,
        "action": tensor.action,
        "sources": sources,
        "shape": list(tensor.target.shape),
        "dtype_in": DTYPE_WORDS.get(tensor.target.dtype, tensor.target.dtype),
        "dtype_out": DTYPE_WORDS.get(tensor.dtype_out, tensor.dtype_out),
        "weight": tensor.weight,
        "reason": tensor.reason,
    }


def _lines(plan: MergePlan, peak_bytes: int) -> Iterator[str]:
    yield f"recipe        {plan.recipe} ({plan.family.name})"
    yield f"method        {METHODS[plan.method].formula}"
    for role in dict.fromkeys(file.role for file in plan.files):
        names = [file.name for file in plan.files if file.role == role]
        size = sum(file.stamp.size_bytes for file in plan.files if file.role == role)
        shown = names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
        yield f"{role:<13} {shown}, {format_bytes(size)}"
    if len(plan.components) > 1:
        yield f"components    {', '.join(part.name for part in plan.components)}"
    counts = ", ".join(f"{count} {action}" for action, count in plan.counts.items() if count)
    yield f"tensors       {len(plan.tensors)}: {counts}"
    weights = sorted({tensor.weight for tensor in plan.tensors if tensor.weight is not None})
    if weights:
        shown = ", ".join(f"{weight:g}" for weight in weights[:_SHOWN])
        yield f"weight        {shown}{' ...' if len(weights) > _SHOWN else ''}"
    yield from _blocks(plan.blocks)
    dtypes = sorted(
        {f"{DTYPE_WORDS[t.target.dtype]} to {DTYPE_WORDS[t.dtype_out]}" for t in plan.tensors}
    )
    yield f"dtypes        {', '.join(dtypes)}"
    yield f"reads         {format_bytes(plan.read_bytes)}"
    yield f"writes        {format_bytes(plan.write_bytes)}"
    yield f"peak memory   {format_bytes(peak_bytes)}"
    yield from _special_rows(plan)
    yield from _left_out(plan)
    for note in plan.notes:
        yield f"note: {note}"
    for warning in plan.warnings:
        yield f"warning: {warning}"


def _blocks(blocks: Sequence[BlockWeight]) -> Iterator[str]:
    """Yield the weight of every block, neighbours of the same weight together."""
    runs: list[tuple[tuple[float, ...], list[str]]] = []
    for block in blocks:
        if runs and runs[-1][0] == block.weights:
            runs[-1][1].append(block.name)
        else:
            runs.append((block.weights, [block.name]))
    parts = []
    for weights, names in runs:
        span = names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"
        parts.append(f"{span}: {' and '.join(f'{w:g}' for w in weights) or 'nothing'}")
    for first in range(0, len(parts), _BLOCKS_PER_LINE):
        line = ", ".join(parts[first : first + _BLOCKS_PER_LINE])
        yield f"{'' if first else 'blocks':<13} {line}"


def _special_rows(plan: MergePlan) -> Iterator[str]:
    groups: dict[tuple[str, str], list[str]] = {}
    for tensor in plan.tensors:
        if tensor.reason:
            groups.setdefault((tensor.action, tensor.reason), []).append(tensor.key)
    if groups:
        yield ""
        yield "out of the ordinary:"
    for (action, reason), keys in groups.items():
        shown = keys[0] if len(keys) == 1 else f"{len(keys)} tensors such as {keys[0]}"
        yield f"  {action:<6} {shown}: {reason}"


def _left_out(plan: MergePlan) -> Iterator[str]:
    if plan.left_out:
        yield ""
        yield "left out:"
    for item in plan.left_out[:_SHOWN]:
        yield f"  {item.model}: {item.key}: {item.reason}"
    if len(plan.left_out) > _SHOWN:
        yield f"  ... and {len(plan.left_out) - _SHOWN} more (--json lists them all)"
