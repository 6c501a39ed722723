"""Write the evaluation down: scripts/demo/RESULTS.md, results.json and the plot over weights."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict

import numpy as np
import world
from evaluate import (
    _TEST_SEED,
    GUIDANCE,
    HERE,
    WEIGHT,
    WEIGHTS,
    Result,
    Setting,
    difference,
    interval,
)

_NAMES = {
    "target": "target, unmerged",
    "demo": "merged, full delta",
    "demo-lora": "merged, LoRA",
}


# Measured on 200 validation edits with sample.py: shares of wrong tiles.
_FALLS_SHORT = """
## What falls short

The merge gains less than it should, and loses at weight 1. By kind of tile, 4 steps, 200 validation
edits:

| delta | wrong, of tiles to decide | become another thing, of tiles to keep |
|---|---|---|
| none | 9.0 % | 0.6 % |
| weight 0.5 | 5.7 % | 1.2 % |
| weight 1 | 5.0 % | 3.1 % |
| weight 1, cross-attention (`attn2`) only | 5.7 % | 0.8 % |

So the few-step skill arrives: ghosts and mixed colours become one thing or another. But the delta
also disturbs copying, which a text-to-image base hardly does, and sixteen tiles must all be right.
Small models differ from large ones in that the target had to move by a fifth of the base's norm to
learn to edit. Tried without success: distilling from text alone at nearly three times the rate (13
% of the norm: 30 % right at weight 1), and 2,000 more steps of the target under a pull back to the
base (half the way back, but 77 % right in 25 steps and 59 % merged). Steps placed lower, at
timesteps 999, 659, 319 and 59, give about 85 % with and without the delta. More promising: a larger
base for which editing is a small step, trained for hours on a GPU, and a weight of its own for
cross-attention (`block_weights`).
"""


def write(results: Sequence[Result], norms: dict[str, float], count: int) -> None:
    """Write table, numbers and plot."""
    edits = world.sample_edits(np.random.default_rng(_TEST_SEED), count)
    rows = {result.setting: result for result in results}
    text = "\n".join(
        [
            "# What the demo's merge is worth",
            "",
            f"{count:,} edits that training never saw, with the same noise for every line,",
            f"guidance scale {GUIDANCE:g}, image guidance off. An edit is *right* when all 16",
            f"tiles are: each within an RMS distance of {world.RIGHT_BELOW:g} of a sprite that the",
            "instruction allows there. *Open* instructions (add, plant, build, repaint) have many",
            "right answers, *closed* ones a single one. Written by",
            "`python scripts/demo/evaluate.py`; the numbers are in `results.json`.",
            "",
            *_main_table(rows, edits.is_open, count),
            "",
            *_gains(rows),
            "",
            "## Weights and channel rules",
            "",
            "![Share of right edits over the weight](weights.png)",
            "",
            *_weight_table(rows, count),
            "",
            "## How far the models are apart",
            "",
            "Norms of differences relative to the base's, over all tensors of one shape:",
            f"target - base {norms['target']:.3f}, distilled - base {norms['distilled']:.3f}.",
            _FALLS_SHORT.rstrip(),
        ]
    )
    (HERE / "RESULTS.md").write_text(text + "\n", encoding="utf-8")
    numbers = {
        "count": count,
        "norms": {name: round(value, 4) for name, value in norms.items()},
        "results": [
            {
                **asdict(result.setting),
                "unet_rows": result.unet_rows,
                "right": sum(result.right),
                "right_open": int(np.array(result.right)[edits.is_open].sum()),
                "distance": round(float(np.mean(result.distance)), 4),
            }
            for result in results
        ],
    }
    (HERE / "results.json").write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
    _plot(rows, count)


def _main_table(rows: dict[Setting, Result], is_open: np.ndarray, count: int) -> list[str]:
    lines = [
        "| model | steps | UNet rows | right | 95 % interval | open | closed | distance |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for setting, result in rows.items():
        if setting.weight not in (None, WEIGHT) or setting.channel_rule != "skip":
            continue
        right = np.array(result.right)
        low, high = interval(int(right.sum()), count)
        sampler = "DDIM" if setting.scheduler == "own" else "LCM"
        lines.append(
            f"| {_NAMES[setting.model]} | {setting.steps} {sampler} | {result.unet_rows} | "
            f"**{right.mean():.1%}** | {low:.1%} to {high:.1%} | {right[is_open].mean():.1%} | "
            f"{right[~is_open].mean():.1%} | {np.mean(result.distance):.3f} |"
        )
    return lines


def _gains(rows: dict[Setting, Result]) -> list[str]:
    lines = [f"Merged (full delta, weight {WEIGHT:g}) against unmerged, paired over the edits:", ""]
    for steps in (4, 2, 1):
        gain, half = difference(
            rows[Setting("demo", steps, WEIGHT)], rows[Setting("target", steps)]
        )
        lines.append(
            f"* {steps} step{'s' * (steps > 1)}: {100 * gain:+.1f} ± {100 * half:.1f} points"
        )
    return lines


def _at_weight(rows: dict[Setting, Result], steps: int, weight: float, rule: str = "skip") -> int:
    """Return the number of right edits; a weight of zero is the target itself."""
    if weight == 0:
        return sum(rows[Setting("target", steps)].right)
    return sum(rows[Setting("demo", steps, weight, rule)].right)


def _weight_table(rows: dict[Setting, Result], count: int) -> list[str]:
    lines = ["| weight | skip, 4 steps | first, 4 steps | skip, 2 steps |", "|---|---|---|---|"]
    for weight in (0.0, *WEIGHTS):
        cells = []
        for steps, rule in ((4, "skip"), (4, "first"), (2, "skip")):
            right = _at_weight(rows, steps, weight, rule)
            low, high = interval(right, count)
            cells.append(f"{right / count:.1%} ({low:.0%} to {high:.0%})")
        lines.append(f"| {weight:g} | {' | '.join(cells)} |")
    return lines


def _plot(rows: dict[Setting, Result], count: int) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot, ticker

    weights = (0.0, *WEIGHTS)
    figure, axes = pyplot.subplots(figsize=(7, 3.8), dpi=130)
    for steps, rule, colour, style in (
        (4, "skip", "#2563a8", "-"),
        (4, "first", "#2563a8", ":"),
        (2, "skip", "#d97706", "-"),
    ):
        right = [_at_weight(rows, steps, weight, rule) for weight in weights]
        bounds = np.array([interval(n, count) for n in right]).T
        shares = np.array(right) / count
        label = f"merged, {steps} steps, channel rule {rule}"
        axes.plot(weights, shares, style, color=colour, marker="o", ms=4, label=label)
        axes.fill_between(weights, *bounds, color=colour, alpha=0.12, lw=0)
    own = sum(rows[Setting("target", 50, scheduler="own")].right) / count
    axes.axhline(own, color="#777", lw=1, ls="--", label="target, 50 DDIM steps")
    axes.set(xlabel="weight of the delta (0: unmerged)", ylabel="right edits", ylim=(0, 1))
    axes.yaxis.set_major_formatter(ticker.PercentFormatter(1.0))
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(HERE / "weights.png", metadata={"Software": None})
