"""`run`, `plan` and `reproduce`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from merge.background.pool.options import ExecutorOptions
from merge.cli.options import (
    PATH,
    command,
    json_option,
    merge_device_option,
    overrides_argument,
    overwrite_option,
)
from merge.cli.output import Bars, is_quiet, print_json, remark
from merge.cli.searches import executor_options

if TYPE_CHECKING:
    from merge.run.many import RunOptions
    from merge.sources.model import Sources


@command(
    "run",
    "run demo",
    "run sd15-lcm-lora weight=0.8 --out outputs/mine",
    "run my.yaml models.target=./ip2p out_dtype=bfloat16 --device cuda",
    "run my.yaml --write-lock",
    "run outputs/mine/recipe.lock.yaml --out outputs/again",
    "run a.yaml b.yaml c.yaml --executor ray",
)
@click.argument("recipe")
@click.argument("words", nargs=-1, metavar="[RECIPE]... [KEY=VALUE]...")
@click.option("--out", type=PATH, help="The output folder itself.")
@merge_device_option
@click.option(
    "--threads", type=click.IntRange(1, 64), help="Workers; the bytes do not depend on it."
)
@overwrite_option
@click.option("--resume", is_flag=True, help="Go on with what an interrupted run left.")
@click.option("--no-verify", is_flag=True, help="Leave out the closing edit.")
@click.option(
    "--locked", is_flag=True, help="Use exactly the inputs of NAME.lock.yaml beside the recipe."
)
@click.option("--write-lock", is_flag=True, help="Make NAME.lock.yaml beside the recipe.")
@executor_options
def run_command(
    recipe: str,
    words: tuple[str, ...],
    out: Path | None,
    device: str,
    threads: int | None,
    overwrite: bool,
    resume: bool,
    no_verify: bool,
    locked: bool,
    write_lock: bool,
    executor: str,
    address: str,
    jobs: int | None,
) -> None:
    """Merge a RECIPE's models, export a standalone checkpoint and edit a picture with it.

    RECIPE is a YAML file or the name of a bundled recipe. KEY=VALUE words change its values, e.g.
    weight=0.8 or block_weights[mid_block.*]=0.5. The last line on stdout is the output folder,
    which appears only when it is complete. A lock such as an output's recipe.lock.yaml runs too,
    with exactly the inputs that it names or not at all.

    Several recipes run one after the other, or with --executor ray side by side, each into its own
    folder; one that fails stops no other.
    """
    recipes = (recipe, *(word for word in words if "=" not in word))
    overrides = tuple(word for word in words if "=" in word)
    if len(recipes) > 1 or executor == "ray":
        if out is not None or locked or write_lock:
            raise click.UsageError(
                "--out, --locked and --write-lock are for a single recipe that runs here"
            )
        from merge.run.many import RunOptions

        _run_many(
            recipes,
            overrides,
            RunOptions(device, threads, overwrite, resume, not no_verify),
            ExecutorOptions(executor, address, jobs),
        )
        return
    from merge.records.lock.find import load_recipe_or_lock, lock_for, lock_path_of
    from merge.run.many import summary
    from merge.run.stages import run_recipe

    if locked and write_lock:
        raise click.UsageError("--locked uses a lock and --write-lock makes one: give one of them")
    loaded, lock = load_recipe_or_lock(recipe, overrides)
    if lock is not None and write_lock:
        raise click.UsageError(f"{recipe} is a lock already, so --write-lock has no use")
    lock_path = lock_path_of(recipe, loaded.name) if lock is None else None
    if locked and lock_path is not None:
        loaded, lock = lock_for(loaded, lock_path)
    with Bars(quiet=is_quiet()) as bars:
        result = run_recipe(
            loaded,
            out,
            device=device,
            threads=threads,
            overwrite=overwrite,
            resume=resume,
            verify=not no_verify,
            lock=lock,
            write_lock=lock_path if write_lock else None,
            on_progress=bars,
        )
    remark(*summary(result))
    click.echo(result.folder)


def _run_many(
    recipes: tuple[str, ...],
    overrides: tuple[str, ...],
    options: RunOptions,
    executor: ExecutorOptions,
) -> None:
    """Run several recipes; tell each as soon as it is done."""
    from merge.background.pool.open import open_pool
    from merge.run.many import RunJob, RunOutcome, load_many, run_many

    jobs = load_many(recipes, overrides)

    def tell(job: RunJob, outcome: RunOutcome) -> None:
        if outcome.error:
            remark(f"{job.recipe.name}: {outcome.error}", f"hint: {outcome.hint}")
            return
        remark(*(f"{job.recipe.name}: {line}" for line in outcome.lines))
        click.echo(outcome.folder)

    uses_gpu = options.device not in ("cpu", "mps")
    with open_pool(executor, uses_gpu=uses_gpu, threads=options.threads) as pool:
        run_many(jobs, options, pool, tell)


@command(
    "plan",
    "plan demo",
    "plan demo weight=0.5 --json",
)
@click.argument("recipe")
@overrides_argument
@json_option
def plan_command(recipe: str, overrides: tuple[str, ...], as_json: bool) -> None:
    """Show what a RECIPE will do to every tensor, from the files' headers alone.

    Lists what is merged, copied, cast and left out, each with its reason, the bytes read and
    written and the peak memory. Writes nothing.
    """
    from merge.plan.build import build_plan
    from merge.plan.memory import default_threads, peak_bytes
    from merge.plan.render import plan_to_json, render_plan
    from merge.records.lock.find import load_recipe_or_lock
    from merge.sources.resolve import resolve_sources

    loaded, lock = load_recipe_or_lock(recipe, overrides)
    sources = resolve_sources(loaded, download=False)
    if lock is not None:
        sources = lock.pin(sources)
    plan = build_plan(loaded, sources)
    _tell_download(sources)
    peak = peak_bytes(plan, default_threads())
    if as_json:
        print_json(plan_to_json(plan, peak))
    else:
        click.echo(render_plan(plan, peak))


def _tell_download(sources: Sources) -> None:
    """Say how much a run would fetch; a plan reads only headers of what is on the Hub."""
    from merge.plan.render import format_bytes

    files = {file.path: file for model in sources.models for file in model.files}
    absent = [file for file in files.values() if not file.is_present]
    if absent:
        size = format_bytes(sum(file.size_bytes for file in absent))
        remark(f"a run downloads {size} in {len(absent)} files first")


@command(
    "reproduce",
    "reproduce outputs/mine",
    "reproduce downloads/somebodys-model --out outputs/again",
    "reproduce outputs/mine models.target.path=./ip2p",
)
@click.argument("folder", type=PATH)
@click.argument("overrides", nargs=-1, metavar="[models.ROLE.path=PATH]...")
@click.option("--out", type=PATH, help="Keep the new output as this folder.")
@merge_device_option
@click.option("--threads", type=click.IntRange(1, 64), help="Workers.")
@click.option("--resume", is_flag=True, help="Go on with what an interrupted one left at --out.")
@json_option
def reproduce_command(
    folder: Path,
    overrides: tuple[str, ...],
    out: Path | None,
    device: str,
    threads: int | None,
    resume: bool,
    as_json: bool,
) -> None:
    """Run the lock of an output FOLDER again and compare the SHA-256 of everything it made.

    Without --out the new output is removed after the comparison. Local models are looked for where
    they were, beside the folder's lock and in the current folder; models.ROLE.path=PATH says where
    they are. The exit code is 9 when a file differs. The last line on stdout is the folder.
    """
    if resume and out is None:
        raise click.UsageError("--resume needs --out: without it nothing of a repetition is kept")
    from merge.run.repetition import reproduce

    with Bars(quiet=is_quiet()) as bars:
        found = reproduce(
            folder,
            out,
            overrides=overrides,
            device=device,
            threads=threads,
            resume=resume,
            on_progress=bars,
        )
    if as_json:
        tree = {"folder": str(folder), "reproduced": True, "recipe_digest": found.recipe_digest}
        print_json({**tree, "files": dict(found.sha256)})
        return
    remark(
        f"reproduced: {len(found.sha256)} files, manifest and provenance have the same bytes; "
        f"recipe digest {found.recipe_digest[:16]}"
    )
    click.echo(out if out is not None else folder)
