"""Choose the recipes' weight, guidance and timesteps on validation edits, never on the test's.

    python scripts/demo/choose.py               # choice.json and two tables on the screen

First coarsely: for every number of steps every weight, with the scheduler's own timesteps and with
others, at every guidance scale. Then weights around the best one, on more edits. The recipes take
the weight that is best in the mean of 4 and 2 steps at guidance 1, each at the best of its
timesteps: one checkpoint has one weight. Guidance doubles the UNet rows, so it is judged at four
rows: two steps with guidance against four without.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path

from choice import FILE
from scoring import (
    ROOT,
    Result,
    Setting,
    score_all,
)
from world import VALIDATION_SEED

COARSE_COUNT, FINE_COUNT = 400, 1_000  # edits
COARSE = (None, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
FINE = (-0.25, -0.2, -0.15, -0.1, -0.05, 0.0, 0.05, 0.1, 0.15, 0.2, 0.25)  # from the coarse best
_JUDGED = (4, 2)  # steps
GUIDANCE = (1.0, 1.5, 2.0)
# LCM's own for 4 steps are 999, 759, 499, 259; a picture of few latents is settled later.
TIMESTEPS: dict[int, tuple[tuple[int, ...] | None, ...]] = {
    1: (None,),
    2: (None, (999, 399), (999, 299), (999, 199)),
    3: (None, (999, 499, 199), (999, 399, 99)),
    4: (None, (999, 659, 319, 59), (999, 599, 299, 99), (999, 499, 249, 99)),
    8: (None, (999, 859, 719, 579, 439, 299, 159, 59), (999, 799, 599, 499, 399, 299, 199, 99)),
}


def coarse_grid() -> list[Setting]:
    """List what is tried; guidance above 1 costs twice as much and only 4 and 2 steps get it."""
    return [
        Setting("target" if weight is None else "demo", steps, weight, timesteps, guidance)
        for weight in COARSE
        for steps, choices in TIMESTEPS.items()
        for timesteps in choices
        for guidance in GUIDANCE
        if guidance == 1 or steps in _JUDGED
    ]


def fine_grid(middle: float) -> list[Setting]:
    """List the weights around one, at the timesteps that are not the scheduler's own."""
    return [
        Setting("demo", steps, round(middle + offset, 2), timesteps)
        for offset in FINE
        for steps in _JUDGED
        for timesteps in TIMESTEPS[steps]
        if timesteps is not None
    ]


def best(results: Sequence[Result], steps: int, weight: float, guidance: float = 1.0) -> Result:
    """Return the best timesteps."""
    found = [
        result
        for result in results
        if result.setting.guidance_scale == guidance
        and (result.setting.steps, result.setting.weight) == (steps, weight)
    ]
    return max(found, key=lambda result: result.share)


def means(results: Sequence[Result]) -> dict[float, float]:
    """Return weight to what it is judged by."""
    weights = sorted({r.setting.weight for r in results if r.setting.weight is not None})
    return {
        weight: sum(best(results, steps, weight).share for steps in _JUDGED) / len(_JUDGED)
        for weight in weights
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="settings at a time")
    parser.add_argument("--cache", type=Path, default=ROOT / "outputs" / "demo-evaluation")
    parser.add_argument("--out", type=Path, default=FILE)
    arguments = parser.parse_args()

    def run(settings: list[Setting], count: int) -> list[Result]:
        return score_all(settings, VALIDATION_SEED, count, arguments.cache, arguments.jobs)

    coarse = run(coarse_grid(), COARSE_COUNT)
    coarse_means = means(coarse)
    middle = max(coarse_means, key=lambda weight: coarse_means[weight])
    fine = run(fine_grid(middle), FINE_COUNT)
    fine_means = means(fine)
    weight = max(fine_means, key=lambda weight: fine_means[weight])
    chosen = {
        steps: best(fine, steps, weight) if steps in _JUDGED else best(coarse, steps, middle)
        for steps in TIMESTEPS
    }
    at_four_rows = {
        guidance: best(coarse, 4 if guidance == 1 else 2, middle, guidance) for guidance in GUIDANCE
    }
    choice = {
        "weight": weight,
        "guidance_scale": max(at_four_rows, key=lambda guidance: at_four_rows[guidance].share),
        "guidance_at_4_unet_rows": {
            f"{guidance:g}, {result.setting.steps} steps": round(result.share, 4)
            for guidance, result in at_four_rows.items()
        },
        "mean_of_4_and_2_steps": {
            "coarse": {str(w): round(mean, 4) for w, mean in coarse_means.items()},
            "fine": {str(w): round(mean, 4) for w, mean in fine_means.items()},
        },
        "timesteps": {
            str(steps): {
                "timesteps": result.setting.timesteps,
                "weight": result.setting.weight,
                "right": round(result.share, 4),
            }
            for steps, result in chosen.items()
        },
    }
    text = json.dumps(choice, indent=1)
    print(text)
    arguments.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
