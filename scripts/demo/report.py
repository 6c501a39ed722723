"""Write the evaluation down: scripts/demo/RESULTS.md, results.json and the plot over weights."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace

import numpy as np
import world
from choice import Choice, load_choice
from lines import (
    GUIDANCE,
    OWN_GUIDANCE,
    OWN_STEPS,
    STEPS,
    TARGET_50,
    WEIGHTS,
    models_of,
    places,
)
from scoring import HERE, LARGE, SMALL, Result, Setting, difference, norms

_NAMES = {
    "target": "target, unmerged",
    "demo": "merged, full delta",
    "demo-lora": "merged, LoRA",
}
_HEAD = (
    "| model | steps | timesteps | UNet rows | right | 95 % interval | open | closed | distance |",
    "|---|---|---|---|---|---|---|---|---|",
)
# What the demo promises: this share of the target's 50 steps in four, so much over it in two.
SHARE_OF_50_STEPS, POINTS_AT_2_STEPS = 0.95, 0.25

_HEADER = """# What the demo's merge is worth

{count:,} edits that training never saw, with the same noise for every line, image guidance off. An
edit is *right* when all 16 tiles are: each within an RMS distance of {limit:g} of a sprite that the
instruction allows there. *Open* instructions (add, plant, build, repaint) have many right answers,
*closed* ones a single one. Weight, guidance and timesteps were chosen on validation edits by
`choose.py` (`choice.json`): a coarse grid on 400, weights around its best on 1,000, guidance at an
equal number of UNet rows. Written by `python scripts/demo/evaluate.py`; the numbers are in
`results.json`.
"""
_MADE = """
## How the models came to be

Text encoder and UNets of 7.0 M parameters were trained from nothing on one H200 in seven minutes by
what is now `train.py --preset large`: 140 s each for base, target and distilled, in batches of 512
from a pool of 150,000 drawn edits. How many steps fitted into these seconds was not written down,
so the preset repeats the procedure and not the bytes. The autoencoder and the tokenizer are those
of the small models. `lcm_lora.safetensors` was not trained: it is `instruct-merge extract-lora` of
the full delta at rank 32, which keeps 88 % of its squared norm. The small models (`small/`, 2.5 M
parameters) are what `train.py --preset small` makes in an hour on two CPU cores, with a LoRA that
was distilled.
"""

_FALLS_SHORT = """
## What falls short

* Well-placed timesteps alone repair most edits of the unmerged target in four steps, more so with
  guidance, which costs twice the rows. The merge is worth most where steps are fewest, and at LCM's
  own timesteps, which stock pipelines take.
* What is wrong at larger weights is not the few-step skill but copying: closed edits, which the
  unmerged target never gets wrong, suffer, and sixteen tiles must all be right. A smaller weight is
  better at four steps and worse at two; a recipe has one weight. At eight well-placed steps the
  merge no longer helps.
* The first choice of weight, by the coarse grid alone, was 1. It got fewer than 95 % of the
  target's edits right in four steps; the finer grid on more validation edits was made after that
  was seen.
* One step stays poor: the delta of a consistency distillation does not carry it over.
* Guidance above 1 harms at two steps of LCM's own and larger weights: the distillation contains
  guidance already.
"""


def write(results: Sequence[Result], edits: world.Edits) -> None:
    """Write table, numbers and plot."""
    choice = load_choice()
    rows = {result.setting: result for result in results}
    count = len(edits.is_open)
    far = {size: norms(size) for size in (LARGE, SMALL)}
    text = "\n".join(
        [
            _HEADER.format(count=count, limit=world.RIGHT_BELOW),
            *_promises(rows, choice),
            "",
            "## The target's own steps",
            "",
            f"DDIM, guidance scale {OWN_GUIDANCE:g}.",
            "",
            *_table(rows, (replace(TARGET_50, steps=n) for n in OWN_STEPS), edits.is_open),
            "",
            *_few_steps(rows, choice, edits.is_open),
            "## Weights and channel rules",
            "",
            "Guidance 1; the LoRA and the rule `first` (which adds the delta to the first four of",
            "conv_in's channels) at the chosen timesteps.",
            "",
            "![Share of right edits over the weight](weights.png)",
            "",
            *_weight_table(rows, choice),
            "",
            "## Small models and large ones",
            "",
            *_sizes(rows, choice, far),
            _MADE.rstrip(),
            _FALLS_SHORT.rstrip(),
        ]
    )
    (HERE / "RESULTS.md").write_text(text + "\n", encoding="utf-8")
    numbers = {
        "count": count,
        "norms": {
            size: {name: round(value, 4) for name, value in values.items()}
            for size, values in far.items()
        },
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
    _plot(rows, choice)


def _promises(rows: dict[Setting, Result], choice: Choice) -> list[str]:
    """Say whether the models show what the demo is for, with the numbers."""
    whole = rows[TARGET_50]
    four = rows[Setting("demo", 4, choice.weight, choice.timesteps[4])]
    ratio = four.share / whole.share

    def verdict(is_kept: bool) -> str:
        return "kept" if is_kept else "**missed**"

    at_4 = (
        f"* Merged in 4 steps: {four.share:.1%} right in {four.unet_rows} UNet rows, "
        f"{ratio:.1%} of the target's {whole.share:.1%} in 50 steps and {whole.unet_rows} rows. "
        f"Promised: {SHARE_OF_50_STEPS:.0%}; {verdict(ratio >= SHARE_OF_50_STEPS)}."
    )
    lines = [at_4]
    for timesteps in places(choice, 2):
        two = rows[Setting("demo", 2, choice.weight, timesteps)]
        plain = rows[Setting("target", 2, timesteps=timesteps)]
        gain, half = difference(two, plain)
        lines.append(
            f"* Merged in 2 steps at {_places(two.setting)}: {two.share:.1%} in {two.unet_rows} "
            f"rows, unmerged at the same settings {plain.share:.1%}: {100 * gain:+.1f} ± "
            f"{100 * half:.1f} points, paired over the edits. Promised: "
            f"{100 * POINTS_AT_2_STEPS:.0f}; {verdict(gain >= POINTS_AT_2_STEPS)}."
        )
    return lines


def _few_steps(rows: dict[Setting, Result], choice: Choice, is_open: np.ndarray) -> Iterable[str]:
    for guidance in GUIDANCE:
        yield f"## Few steps, guidance {guidance:g}"
        yield ""
        settings = [
            Setting(model, steps, weight, timesteps, guidance)
            for steps in STEPS
            for timesteps in places(choice, steps)
            for model, weight in models_of(choice)
        ]
        yield from _table(rows, settings, is_open)
        yield ""


def _table(
    rows: dict[Setting, Result], settings: Iterable[Setting], is_open: np.ndarray
) -> Iterable[str]:
    yield from _HEAD
    for setting in settings:
        result = rows[setting]
        right = np.array(result.right)
        low, high = result.bounds
        name = _NAMES[setting.model]
        if setting.weight is not None:
            name += f" at {setting.weight:g}"
        yield (
            f"| {name} | {setting.steps} | {_places(setting)} | {result.unet_rows} | "
            f"**{right.mean():.1%}** | {low:.1%} to {high:.1%} | {right[is_open].mean():.1%} | "
            f"{right[~is_open].mean():.1%} | {np.mean(result.distance):.3f} |"
        )


def _places(setting: Setting) -> str:
    if setting.scheduler == "own":
        return "DDIM's"
    return " ".join(map(str, setting.timesteps)) if setting.timesteps else "LCM's own"


def _at_weight(rows: dict[Setting, Result], setting: Setting, weight: float) -> Result:
    """Return the result at another weight; a weight of zero is the target itself."""
    if weight == 0:
        return rows[replace(setting, model="target", weight=None, channel_rule="skip")]
    return rows[replace(setting, weight=weight)]


def _cells(results: Iterable[Result]) -> str:
    cells = []
    for result in results:
        low, high = result.bounds
        cells.append(f"{result.share:.1%} ({low:.0%} to {high:.0%})")
    return " | ".join(cells)


def _weight_table(rows: dict[Setting, Result], choice: Choice) -> Iterable[str]:
    columns = {}
    for steps in (4, 2):
        placed = Setting("demo", steps, 1.0, choice.timesteps[steps])
        columns |= {
            f"{steps} steps": placed,
            f"{steps} steps, LCM's own": replace(placed, timesteps=None),
            f"{steps} steps, LoRA": replace(placed, model="demo-lora"),
            f"{steps} steps, `first`": replace(placed, channel_rule="first"),
        }
    yield from _over_weights(rows, columns, sorted({0.0, *WEIGHTS, choice.weight}))


def _over_weights(
    rows: dict[Setting, Result], columns: dict[str, Setting], weights: Iterable[float]
) -> Iterable[str]:
    """Return a table with a line for each weight and a column for each setting."""
    settings = columns.values()
    yield f"| weight | {' | '.join(columns)} |"
    yield f"|---{'|---' * len(columns)}|"
    yield f"| UNet rows | {' | '.join(str(rows[s].unet_rows) for s in settings)} |"
    for weight in weights:
        yield f"| {weight:g} | {_cells(_at_weight(rows, s, weight) for s in settings)} |"


def _sizes(
    rows: dict[Setting, Result], choice: Choice, far: dict[str, dict[str, float]]
) -> Iterable[str]:
    yield (
        "Merged, full delta, guidance 1: the same world, text encoder and autoencoder; UNets of "
        "7.0 M and 2.5 M parameters. Norms of differences relative to the base's: target "
        f"{far[LARGE]['target']:.3f} and {far[SMALL]['target']:.3f}, distilled "
        f"{far[LARGE]['distilled']:.3f} and {far[SMALL]['distilled']:.3f}."
    )
    yield ""
    own = [rows[replace(TARGET_50, size=size)] for size in (LARGE, SMALL)]
    yield "In 50 steps the targets get " + " and ".join(f"{r.share:.1%}" for r in own) + " right."
    yield ""
    columns = {
        f"{size}, {steps} steps{where}": Setting("demo", steps, 1.0, timesteps, size=size)
        for steps in (4, 2)
        for timesteps, where in ((choice.timesteps[steps], ""), (None, ", LCM's own"))
        for size in (LARGE, SMALL)
    }
    yield from _over_weights(rows, columns, (0.0, *WEIGHTS))
    yield ""
    best, gains = {}, {}
    for size in (LARGE, SMALL):
        shares = {
            weight: _at_weight(rows, Setting("demo", 4, 1.0, size=size), weight).share
            for weight in (0.0, *WEIGHTS)
        }
        best[size] = max(WEIGHTS, key=shares.__getitem__)
        gains[size] = shares[best[size]] - shares[0.0]
    yield (
        "Interference falls with size: with LCM's own four timesteps the best weight of the large "
        f"models is {best[LARGE]:g} and gains {100 * gains[LARGE]:.0f} points, that of the small "
        f"ones {best[SMALL]:g} and {100 * gains[SMALL]:.0f}."
    )


def _plot(rows: dict[Setting, Result], choice: Choice) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot, ticker

    weights = (0.0, *WEIGHTS)
    figure, axes = pyplot.subplots(figsize=(7, 3.8), dpi=130)
    lines = [
        (Setting("demo", steps, 1.0, timesteps, size=size), colour, style)
        for steps, colour in ((4, "#2563a8"), (2, "#d97706"))
        for size, timesteps, style in (
            (LARGE, choice.timesteps[steps], "-"),
            (LARGE, None, "--"),
            (SMALL, choice.timesteps[steps], ":"),
        )
    ]
    for setting, colour, style in lines:
        results = [_at_weight(rows, setting, weight) for weight in weights]
        where = "placed" if setting.timesteps else "LCM's own"
        label = f"{setting.size}, {setting.steps} steps, {where} timesteps"
        shares = [result.share for result in results]
        axes.plot(weights, shares, style, color=colour, marker="o", ms=4, label=label)
        bounds = np.array([result.bounds for result in results]).T
        axes.fill_between(weights, *bounds, color=colour, alpha=0.1, lw=0)
    axes.axhline(rows[TARGET_50].share, color="#777", lw=1, label="large target, 50 DDIM steps")
    axes.set(xlabel="weight of the delta (0: unmerged)", ylabel="right edits", ylim=(0, 1.02))
    axes.yaxis.set_major_formatter(ticker.PercentFormatter(1.0))
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="lower center", ncol=2)
    figure.tight_layout()
    figure.savefig(HERE / "weights.png", metadata={"Software": None})
