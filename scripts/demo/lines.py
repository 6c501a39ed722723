"""The lines of the demo's tables: which models are measured with which settings."""

from __future__ import annotations

from dataclasses import replace

from choice import Choice
from scoring import SMALL, Setting

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
