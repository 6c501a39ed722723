"""Score the demo's models exactly, on edits that training never saw and nothing was chosen on.

    python scripts/demo/evaluate.py                            # everything: RESULTS.md, plot, JSON
    python scripts/demo/evaluate.py --model outputs/demo --timesteps 999,199 --at-least 0.75

All settings get the same edits and the same noise; see scoring.py for when an edit is right.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path

from choice import Choice, load_choice
from scoring import (
    ROOT,
    SMALL,
    Setting,
    draw_edits,
    score,
    score_all,
)
from world import TEST_SEED

COUNT = 1_000
STEPS = (8, 4, 3, 2, 1)
ALSO = (999, 299)  # in two steps, besides the chosen ones
GUIDANCE = (1.0, 1.5, 2.0)
OWN_STEPS, OWN_GUIDANCE = (50, 8, 4, 3, 2, 1), 1.5  # of the target with its own DDIM
TARGET_50 = Setting("target", 50, guidance_scale=OWN_GUIDANCE, scheduler="own")
WEIGHTS = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5)  # 0 is the target itself


def places(choice: Choice, steps: int) -> list[tuple[int, ...] | None]:
    """Return the timesteps that a number of steps is measured at: the scheduler's own first."""
    others = [ALSO] if len(ALSO) == steps else []
    return list(dict.fromkeys((None, choice.timesteps[steps], *others)))


def models_of(choice: Choice) -> tuple[tuple[str, float | None], ...]:
    """Return the models that every table compares, each with its weight."""
    return ("target", None), ("demo", choice.weight), ("demo-lora", choice.weight)


def settings_of(choice: Choice) -> list[Setting]:
    """List every line of the tables, each once."""
    found = [replace(TARGET_50, steps=steps) for steps in OWN_STEPS]
    found += [
        Setting(model, steps, weight, timesteps, guidance)
        for guidance in GUIDANCE
        for model, weight in models_of(choice)
        for steps in STEPS
        for timesteps in places(choice, steps)
    ]
    for weight in WEIGHTS:
        for steps in (4, 2):
            for timesteps in (None, choice.timesteps[steps]):
                found.append(Setting("demo", steps, weight, timesteps))
            placed = choice.timesteps[steps]
            found.append(Setting("demo-lora", steps, weight, placed))
            found.append(Setting("demo", steps, weight, placed, channel_rule="first"))
    found += [
        Setting("demo", steps, choice.weight, choice.timesteps[steps], channel_rule="first")
        for steps in (4, 2)
    ]
    found.append(replace(TARGET_50, size=SMALL))
    for small in (None, *WEIGHTS):
        model = "target" if small is None else "demo"
        for steps in (4, 2):
            for timesteps in (None, choice.timesteps[steps]):
                found.append(Setting(model, steps, small, timesteps, size=SMALL))
    return list(dict.fromkeys(found))


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
    import report

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
    # Under its own name, so that report.py and worker processes see the same classes.
    import evaluate

    evaluate.main()
