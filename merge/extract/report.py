"""The errors of an extraction as a table and as JSON."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from merge.extract.model import BlockError, ExtractResult

_HEAD = f"{'':<16} {'layers':>6} {'rank':>9} {'error':>10} {'energy':>9}"


def render_extraction(result: ExtractResult, *, with_layers: bool = False) -> str:
    """Return the table of the blocks, and what the LoRA lacks.

    Args:
        result: Of `extract_lora`.
        with_layers: Also a line for each layer.
    """
    lines = [_HEAD, *(_line(block) for block in (*result.blocks, result.total))]
    if with_layers:
        lines += ["", f"{'rank':>5} {'error':>10} {'energy':>9}  layer"]
        lines += [
            f"{layer.rank:>5} {layer.relative_error:>10.3e} {layer.energy:>9.6f}  {layer.key}"
            for layer in result.layers
        ]
    capped = sum(layer.is_capped for layer in result.layers)
    if capped:
        lines.append(f"{capped} layers need a higher rank for that energy than --max-rank allows")
    if result.unchanged:
        lines.append(f"{len(result.unchanged)} tensors have a delta of zero")
    by_reason: dict[str, list[float]] = {}
    for item in result.left_out:
        by_reason.setdefault(item.reason, []).append(result.share(item))
    lines += [
        f"left out: {len(shares)} tensors, {sum(shares):.2%} of the squared norm: {reason}"
        for reason, shares in by_reason.items()
    ]
    lines.append(f"relative error of the whole delta: {result.total_error:.3e}")
    return "\n".join(lines)


def extraction_to_json(result: ExtractResult) -> dict[str, Any]:
    """Return everything as plain values; `share` is of the whole delta's squared norm."""
    return {
        "path": str(result.path),
        "form": result.form,
        "dtype": result.dtype,
        "size_bytes": result.size_bytes,
        "relative_error": result.total_error,
        "total": asdict(result.total),
        "blocks": [asdict(block) for block in result.blocks],
        "layers": [{**asdict(layer), "share": result.share(layer)} for layer in result.layers],
        "left_out": [{**asdict(item), "share": result.share(item)} for item in result.left_out],
        "unchanged": list(result.unchanged),
    }


def _line(block: BlockError) -> str:
    low, high = block.ranks
    ranks = str(low) if low == high else f"{low}-{high}"
    return (
        f"{block.name:<16} {block.layers:>6} {ranks:>9} {block.relative_error:>10.3e} "
        f"{block.energy:>9.6f}"
    )
