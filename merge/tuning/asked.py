"""What is asked of a tuning, read and checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from merge.errors import RecipeError
from merge.grid.axes import override_words, read_axes
from merge.grid.inputs import Inputs, find_edits
from merge.grid.planning import CellPlanner
from merge.recipe.load import override_recipe
from merge.recipe.schema import Recipe
from merge.records.lock.find import load_recipe_or_lock
from merge.run.model import Progress
from merge.tuning.settings import Setting, check_over, read_weights, timesteps_for

SAMPLES = 128
METRICS = ("path", "endpoint", "residual")


@dataclass(frozen=True, slots=True)
class Asked:
    """What is asked of a tuning, read and checked.

    Attributes:
        recipe: With the overrides.
        planner: Makes cells of it.
        over: What is tuned.
        weights: To try.
        before: What the recipe has.
        steps: Of the edits.
        overrides: That are in the recipe already.
    """

    recipe: Recipe
    planner: CellPlanner
    over: tuple[str, ...]
    weights: tuple[float, ...]
    before: Setting
    steps: int
    overrides: tuple[str, ...]

    @classmethod
    def of(
        cls,
        recipe: Recipe | str | Path,
        words: Sequence[str],
        over: Sequence[str],
        steps: int | None,
        weights: str,
        inputs: Inputs,
        on_progress: Progress | None,
        *,
        is_dry: bool,
    ) -> Asked:
        """Read and check; the arguments are those of `tune`."""
        names, tried = check_over(over), read_weights(weights)
        axes, overrides = read_axes(words)
        if axes:
            raise RecipeError(
                f"{axes[0].key} has several values, and a tuning chooses them itself",
                [],
                hint="`instruct-merge sweep` measures a grid; --weights says which weights to try",
            )
        if steps is not None:
            overrides += override_words("steps", str(steps))
        loaded, lock = load_recipe_or_lock(recipe, overrides)
        verify = loaded.verify
        timesteps = None if verify.timesteps is None else tuple(verify.timesteps)
        if timesteps is not None and verify.steps != len(timesteps):
            # As many steps without them.
            word = f"verify.steps={len(timesteps)}"
            loaded, overrides = override_recipe(loaded, [word]), (*overrides, word)
        planner = CellPlanner(
            loaded,
            find_edits(loaded, inputs),
            overrides=overrides,
            count=inputs.samples or SAMPLES,
            lock=lock,
            on_progress=on_progress,
            is_dry=is_dry,
        )
        return cls(
            loaded,
            planner,
            names,
            tried,
            Setting(loaded.weight, verify.guidance_scale, timesteps),
            verify.steps if timesteps is None else len(timesteps),
            overrides,
        )

    def expected(self) -> list[Setting]:
        """Return about as many settings as a search measures, for an estimate."""
        before = self.before
        weights = self.weights if "weight" in self.over else (before.weight,)
        around = weights[:3]
        found = [before, *(Setting(w, 1.0, before.timesteps) for w in (before.weight, *weights))]
        places = timesteps_for(self.steps) if "timesteps" in self.over else ()
        found += [Setting(w, 1.0, placed) for placed in places for w in around]
        if "guidance_scale" in self.over:
            found += [Setting(w, g, before.timesteps) for g in (1.0, 1.5, 2.0) for w in around]
        if "weight" in self.over:
            # Around the bottom of the curve, wherever that is.
            found += [Setting(w, 1.0, before.timesteps) for w in (0.123, 0.234, 0.345, 0.456)]
        return list(dict.fromkeys(found))
