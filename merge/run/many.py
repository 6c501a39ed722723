"""Several recipes in one call: one after the other here, or side by side on a Ray cluster."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merge.background.pool.model import Pool
from merge.errors import EngineError, MergeError, OutputError
from merge.recipe.schema import Recipe
from merge.records.lock.find import load_recipe_or_lock
from merge.records.lock.model import Lock
from merge.run.model import RunResult
from merge.run.stages import run_recipe


@dataclass(frozen=True, slots=True)
class RunJob:
    """One recipe to run.

    Attributes:
        key: Its place and its name.
        group: The same; no two of them share anything.
        recipe: What to run.
        lock: Use exactly the files that it names.
    """

    key: str
    group: str
    recipe: Recipe
    lock: Lock | None


@dataclass(frozen=True, slots=True)
class RunOptions:
    """How recipes are run, as `run_recipe` has it.

    Attributes:
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        threads: Workers of each merge; None for the default.
        overwrite: Replace earlier outputs.
        resume: Go on with what interrupted runs left.
        verify: Edit with each output.
    """

    device: str = "auto"
    threads: int | None = None
    overwrite: bool = False
    resume: bool = False
    verify: bool = True


@dataclass(frozen=True, slots=True)
class RunOutcome:
    """What became of a recipe.

    Attributes:
        folder: Its output.
        lines: What there is to say.
        error: What went wrong, if anything did; its hint and exit code besides.
        hint: Of the error.
        exit_code: Of the error; 0 for a run that is whole.
    """

    folder: Path
    lines: tuple[str, ...] = ()
    error: str = ""
    hint: str = ""
    exit_code: int = 0


def make_runner(options: RunOptions) -> Runner:
    """Return a worker that runs recipes."""
    return Runner(options)


class Runner:
    """Runs recipes one after the other; one that fails is told and stops no other."""

    def __init__(self, options: RunOptions) -> None:
        self._options = options

    def run(self, job: RunJob, on_progress: Callable[[int], None]) -> RunOutcome:
        """Run a recipe."""
        options, folder = self._options, Path(job.recipe.output.folder).expanduser()
        try:
            result = run_recipe(
                job.recipe,
                device=options.device,
                threads=options.threads,
                overwrite=options.overwrite,
                resume=options.resume,
                verify=options.verify,
                lock=job.lock,
            )
        except MergeError as error:
            return RunOutcome(folder, (), error.message, error.hint, error.exit_code)
        on_progress(1)
        return RunOutcome(result.folder, summary(result))

    def close(self) -> None:
        """Do nothing: a run leaves nothing behind."""


def load_many(recipes: Sequence[str], overrides: Sequence[str]) -> tuple[RunJob, ...]:
    """Load recipes with the same overrides.

    Args:
        recipes: Paths, bundled names or locks.
        overrides: As for `load_recipe`.

    Raises:
        RecipeError: one of them is not valid.
        OutputError: two of them would write one folder.
    """
    jobs = []
    for index, name in enumerate(recipes):
        recipe, lock = load_recipe_or_lock(name, overrides)
        key = f"{index} {recipe.name}"
        jobs.append(RunJob(key, key, recipe, lock))
    folders = Counter(Path(job.recipe.output.folder).expanduser().resolve() for job in jobs)
    twice = [str(folder) for folder, count in folders.items() if count > 1]
    if twice:
        raise OutputError(
            f"two recipes would write {', '.join(twice)}", hint="give each its own output.folder"
        )
    return tuple(jobs)


def run_many(
    jobs: Sequence[RunJob],
    options: RunOptions,
    pool: Pool,
    on_outcome: Callable[[RunJob, RunOutcome], Any],
) -> None:
    """Run recipes on the workers of a pool; all of them, even where one fails.

    Args:
        jobs: From `load_many`.
        options: For all of them.
        pool: Where.
        on_outcome: Told what became of each, as soon as it is known.

    Raises:
        MergeError: of the family of the first that failed, naming all that did.
    """
    outcomes: dict[str, RunOutcome] = {}

    def take(job: RunJob, outcome: RunOutcome) -> None:
        outcomes[job.key] = outcome
        on_outcome(job, outcome)

    pool.run_jobs(make_runner, options, jobs, on_result=take)
    failed = [(job, outcomes[job.key]) for job in jobs if outcomes[job.key].error]
    if failed:
        names = ", ".join(job.recipe.name for job, _ in failed)
        first = failed[0][1]
        error = EngineError(
            f"{len(failed)} of {len(jobs)} recipes failed: {names}; the first: {first.error}",
            hint=first.hint,
        )
        error.exit_code = first.exit_code
        raise error


def summary(result: RunResult) -> tuple[str, ...]:
    """Return what there is to say of a run, for people."""
    counts = result.plan.counts
    applied = counts["delta"] + counts["lora"] + counts["bake"]
    line = (
        f"merged {applied} of {len(result.plan.tensors)} tensors in "
        f"{result.seconds['merge']:.1f} s, {result.seconds['total']:.1f} s in all; "
        f"recipe digest {result.recipe_digest[:16]}"
    )
    return (line, result.verdict) if result.verdict else (line,)
