"""Score the demo's models exactly, on edits that training never saw and nothing was chosen on.

    python scripts/demo/evaluate.py                            # everything: RESULTS.md, plot, JSON
    python scripts/demo/evaluate.py --model outputs/demo --timesteps 999,199 --at-least 0.75

All settings get the same edits and the same noise; see scoring.py for when an edit is right.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import report
from choice import load_choice
from lines import COUNT, settings_of
from scoring import ROOT, Setting, draw_edits, score, score_all
from world import TEST_SEED


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="score this folder only")
    parser.add_argument("--against", type=Path, help="score this one too, to compare with")
    parser.add_argument("--count", type=int, default=COUNT, help="edits")
    parser.add_argument(
        "--timesteps",
        type=_timesteps,
        action="append",
        help="of --model, such as 999,199, or a number of steps at the scheduler's own; may be "
        "given several times; default: 4",
    )
    parser.add_argument(
        "--at-least",
        type=float,
        action="append",
        default=[],
        help="exit 9 where the lower end of the 95 %% interval is below this share; one for each "
        "--timesteps",
    )
    parser.add_argument("--guidance-scale", type=float, default=1.0, help="of --model")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="settings at a time")
    parser.add_argument("--cache", type=Path, default=ROOT / "outputs" / "demo-evaluation")
    arguments = parser.parse_args()
    if arguments.model is not None:
        sys.exit(_judge(arguments))
    settings = settings_of(load_choice())
    results = score_all(settings, TEST_SEED, arguments.count, arguments.cache, arguments.jobs)
    report.write(results, draw_edits(TEST_SEED, arguments.count))


def _timesteps(text: str) -> tuple[int, tuple[int, ...] | None]:
    """Read `999,199`, or `4` for as many steps at the scheduler's own timesteps."""
    numbers = tuple(map(int, text.split(",")))
    return (len(numbers), numbers) if len(numbers) > 1 else (numbers[0], None)


def _judge(arguments: argparse.Namespace) -> int:
    """Score a folder, say how it did, and return the exit code."""
    edits = draw_edits(TEST_SEED, arguments.count)
    code = 0
    for index, (steps, timesteps) in enumerate(arguments.timesteps or [(4, None)]):
        setting = Setting(
            "given", steps, timesteps=timesteps, guidance_scale=arguments.guidance_scale
        )
        for folder in (arguments.model, arguments.against):
            if folder is None:
                continue
            result = score(folder, setting, edits)
            right = sum(result.right)
            low, high = result.bounds
            print(
                f"{folder}: {right} of {arguments.count} unseen edits are right in {steps} steps, "
                f"{result.unet_rows} UNet rows: {result.share:.1%} "
                f"(95 % interval {low:.1%} to {high:.1%})"
            )
            limit = arguments.at_least[index] if index < len(arguments.at_least) else 0.0
            if folder == arguments.model and low < limit:
                print(f"the lower end must be at least {limit:.1%}", file=sys.stderr)
                code = 9
    return code


if __name__ == "__main__":
    main()
