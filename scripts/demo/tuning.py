"""Hold what `tune` chooses, knowing no right answers, against the exact score.

    python scripts/demo/tuning.py            # TUNING.md and tuning.json

For models of both sizes, a full delta and a LoRA: in four steps on three sets of edits, each drawn
anew, and on the recipe's own; in two steps on one set. The exact score is that of 1,000 other
edits. A rank correlation is over the weights 0, 0.25 and on to 1.5; its interval is over the
samples of a set.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import world
import yaml
from PIL import Image
from scoring import LARGE, MODELS, ROOT, SMALL, Result, Setting, draw_edits, score_all
from world import TEST_SEED

from merge.errors import VerificationError
from merge.grid.inputs import Inputs
from merge.grid.statistics import PATH, RESIDUAL, SCORE, Ranking, Values
from merge.tuning.asked import SAMPLES
from merge.tuning.tune import tune

COUNT = 1_000
SETS = (101, 102, 103)  # seeds of drawn edits; None: the recipe's own
WEIGHTS = tuple(index / 4 for index in range(7))
TIMESTEPS = {4: (999, 659, 319, 59), 2: (999, 199)}
ENDPOINT = Ranking("endpoint", "", "", {"endpoint": 1})
MEASURES = {"score": SCORE, "endpoint": ENDPOINT, "path": PATH, "residual": RESIDUAL}
HERE = Path(__file__).resolve().parent
_DRAWS = 500


@dataclass(frozen=True)
class Line:
    """What a tuning chose, and what that is worth.

    Attributes:
        size: Of the models.
        model: `demo` or `demo-lora`.
        steps: Of the edits.
        edits: Seed of the drawn edits; None: the recipe's own.
        chosen: Weight; None where nothing was.
        share: Right edits at that weight, of 1,000.
        best_weight: Of the weights that are scored exactly.
        best_share: Right edits there.
        picks: What quarters of the samples would choose.
        correlations: Measure to its rank correlation with the exact score, and the interval.
    """

    size: str
    model: str
    steps: int
    edits: int | None
    chosen: float | None
    share: float | None
    best_weight: float
    best_share: float
    picks: tuple[float, ...]
    correlations: Mapping[str, tuple[float, float, float]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="settings at a time")
    parser.add_argument("--cache", type=Path, default=ROOT / "outputs" / "demo-evaluation")
    parser.add_argument("--out", type=Path, default=HERE / "tuning.json")
    arguments = parser.parse_args()
    lines: list[Line] = []
    for size in (LARGE, SMALL):
        for model in ("demo", "demo-lora"):
            for steps in TIMESTEPS:
                exact = exact_scores(size, model, steps, WEIGHTS, arguments)
                for edits in (None, *SETS) if steps == 4 else SETS[:1]:
                    lines.append(measure(size, model, steps, edits, exact, arguments))
                    print(asdict(lines[-1]), flush=True)
                    save(arguments.out, lines)
    (HERE / "TUNING.md").write_text(render(lines), encoding="utf-8")


def exact_scores(
    size: str, model: str, steps: int, weights: Sequence[float], arguments: argparse.Namespace
) -> dict[float, Result]:
    """Return the results of 1,000 edits at some weights."""
    settings = [
        Setting(model, steps, weight, TIMESTEPS[steps], size=size)
        if weight
        else Setting("target", steps, None, TIMESTEPS[steps], size=size)
        for weight in weights
    ]
    results = score_all(settings, TEST_SEED, COUNT, arguments.cache, arguments.jobs)
    return dict(zip(weights, results, strict=True))


def measure(
    size: str,
    model: str,
    steps: int,
    edits: int | None,
    exact: dict[float, Result],
    arguments: argparse.Namespace,
) -> Line:
    """Tune on one set of edits and compare."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        inputs = Inputs() if edits is None else Inputs(edits=write_edits(folder, edits))
        words = [f"timesteps={'/'.join(map(str, TIMESTEPS[steps]))}", *models_of(size, model)]
        try:
            found = tune(model, words, out=folder / "out", inputs=inputs, device="cpu")
            chosen: float | None = found.chosen.weight if found.chosen else None
        except VerificationError as error:
            print(error)
            chosen = None
        tree = json.loads((folder / "out" / "tune.json").read_text())
    curve = {
        cell["values"]["weight"]: cell["samples"]
        for cell in tree["cells"]
        if cell["values"]["weight"] in WEIGHTS
    }
    known = dict(exact)
    if chosen is not None and chosen not in known:
        known |= exact_scores(size, model, steps, [chosen], arguments)
    best = max(known, key=lambda weight: known[weight].share)
    return Line(
        size,
        model,
        steps,
        edits,
        chosen,
        known[chosen].share if chosen is not None else None,
        best,
        known[best].share,
        tuple(tree["spread"]["folds"]) if tree["spread"] else (),
        {name: correlation(ranking, curve, exact) for name, ranking in MEASURES.items()},
    )


def models_of(size: str, model: str) -> list[str]:
    """Return the overrides that name the models of a size."""
    models = MODELS[size]
    words = [f"models.target.path={models / 'target'}"]
    if model == "demo":
        return words + [f"models.{role}.path={models / role}" for role in ("base", "distilled")]
    return [*words, f"models.distilled.path={models / 'lcm_lora.safetensors'}"]


def write_edits(folder: Path, seed: int) -> Path:
    """Write drawn edits with their pictures, as one names them to `tune`."""
    drawn = draw_edits(seed, SAMPLES)
    pictures = (world.render(drawn.source) * 255).round().astype(np.uint8)
    tree = []
    for index, (picture, words) in enumerate(zip(pictures, drawn.instructions, strict=True)):
        Image.fromarray(picture).save(folder / f"{index:03d}.png")
        tree.append({"image": f"{index:03d}.png", "instruction": words, "seed": index})
    path = folder / "edits.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


def correlation(
    ranking: Ranking, curve: Mapping[float, Values], exact: Mapping[float, Result]
) -> tuple[float, float, float]:
    """Return Spearman's rank correlation with the exact score, and its 95 % interval."""
    weights = sorted(curve)
    count = len(next(iter(curve[weights[0]].values())))
    truth = _ranks(np.array([[exact[weight].share for weight in weights]]))
    shares = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), _DRAWS) / count
    shares = np.concatenate([np.full((1, count), 1 / count), shares])
    scores = np.stack([-ranking.scores(curve[weight], shares) for weight in weights], axis=1)
    ranks = _ranks(scores)
    centred, wanted = ranks - ranks.mean(1, keepdims=True), truth - truth.mean()
    found = (centred * wanted).sum(1) / np.sqrt((centred**2).sum(1) * (wanted**2).sum())
    low, high = np.percentile(found[1:], (2.5, 97.5))
    return round(float(found[0]), 3), round(float(low), 3), round(float(high), 3)


def _ranks(values: np.ndarray) -> np.ndarray:
    """Return the rank of each value in its row; equal ones share theirs."""
    smaller = (values[:, None, :] < values[:, :, None]).sum(2)
    equal = (values[:, None, :] == values[:, :, None]).sum(2)
    return smaller + (equal - 1) / 2


def save(path: Path, lines: Sequence[Line]) -> None:
    path.write_text(json.dumps([asdict(line) for line in lines], indent=1) + "\n", encoding="utf-8")


def render(lines: Sequence[Line]) -> str:
    """Return TUNING.md."""
    decided = [line for line in lines if line.share is not None]
    losses = [100 * (line.best_share - (line.share or 0)) for line in decided]
    rows = [_row(line) for line in lines]
    means = {name: np.mean([line.correlations[name][0] for line in lines]) for name in MEASURES}
    summary = ", ".join(f"{name} {value:+.2f}" for name, value in means.items())
    return _TEXT.format(
        lines=len(lines),
        decided=len(decided),
        mean_loss=np.mean(losses),
        worst_loss=max(losses),
        summary=summary,
        head=" | ".join(_HEAD).join(("| ", " |\n")) + "|---" * len(_HEAD) + "|",
        rows="\n".join(rows),
    )


def _row(line: Line) -> str:
    def shown(value: Any, pattern: str) -> str:
        return "–" if value is None else pattern.format(value)

    picks = " ".join(f"{pick:.2f}" for pick in line.picks) or "–"
    correlations = " | ".join(
        "{:+.2f} ({:+.2f} to {:+.2f})".format(*line.correlations[name]) for name in MEASURES
    )
    edits = "own" if line.edits is None else str(line.edits)
    return (
        f"| {line.size} | {'full' if line.model == 'demo' else 'LoRA'} | {line.steps} | {edits} | "
        f"{shown(line.chosen, '{:g}')} | {shown(line.share, '{:.1%}')} | {line.best_weight:g} | "
        f"{line.best_share:.1%} | {picks} | {correlations} |"
    )


_HEAD = (
    *("models", "delta", "steps", "edits", "chosen", "right", "best weight", "right"),
    *("quarters choose", *MEASURES),
)
_TEXT = """# What `tune` chooses, against the exact score

`instruct-merge tune` knows no right answers. The demo's world has them, so its choice can be held
against the exact score of 1,000 edits that nothing was chosen on. Models of both sizes, full delta
and LoRA, guidance 1, 128 samples each: in four steps at 999 659 319 59 three sets of drawn edits
and the recipe's own six edits with new noise, in two at 999 199 one set. Written by
`python scripts/demo/tuning.py`; the numbers are in `tuning.json`.

* {decided} of {lines} tunings chose a weight; what they chose is {mean_loss:.1f} points below the
  best weight of the curve in the mean, {worst_loss:.1f} at most.
* Mean rank correlation over the weights: {summary}.

{head}
{rows}

*Right* is the share of the 1,000 edits; the best weight is that of 0, 0.25 and on to 1.5, and of
what was chosen. Correlations are Spearman's, with the 95 % interval over the samples.
"""


if __name__ == "__main__":
    main()
