"""How many UNet rows a grid takes: of the very schedules that its edits are going to have."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from merge.editor.guidance import choose_rows
from merge.editor.load import load_scheduler
from merge.editor.schedule import Schedule, make_schedule
from merge.editor.settings import EditSettings, check_settings
from merge.grid.jobs import BenchSpec
from merge.grid.measures import METRICS
from merge.grid.model import Cell
from merge.grid.path import NoiseLevels, draws_noise, ode_grid, starts_of
from merge.json_files import canonical_bytes
from merge.plan.export import exported_scheduler
from merge.run.prepare import PreparedRun


@dataclass(frozen=True, slots=True)
class Evaluations:
    """How often one sample goes through the UNet.

    Attributes:
        edit: By an edit.
        answers: When its single steps are measured.
        path: On the target's own path.
        draws: True where the steps draw noise that no path knows of.
    """

    edit: int
    answers: int
    path: int
    draws: bool


def count_rows(
    spec: BenchSpec,
    cells: Sequence[Cell],
    judged: Sequence[Cell],
    known: Collection[bytes] = (),
) -> int:
    """Return the UNet rows that a grid takes, over all samples.

    Args:
        spec: What every worker knows.
        cells: What is merged and edited with.
        judged: Cells whose residual is measured.
        known: Keys of the target's paths that are there already.

    Raises:
        MergeError: a scheduler cannot do what is asked of it.
    """
    own, rows = int(choose_rows(*spec.guidance)), 0
    paths = set(known)
    for cell in cells:
        key = reference_key(cell, spec.prepared[cell.models])
        if needs_paths(spec) and key not in paths:
            paths.add(key)
            rows += path_rows(spec, cell)
        for settings in cell.settings:
            each = int(choose_rows(settings.guidance_scale, settings.image_guidance_scale))
            found = evaluations(spec, cell, settings)
            rows += each * (found.edit + (found.answers if "endpoint" in spec.metrics else 0))
    if "residual" in spec.metrics:
        rows += own * sum(len(cell.samples) for cell in judged)
    return rows


def needs_paths(spec: BenchSpec) -> bool:
    """Return True when a metric needs the target's own path."""
    return any(METRICS[name].needs_reference for name in spec.metrics)


def path_rows(spec: BenchSpec, cell: Cell) -> int:
    """Return the UNet rows of the target's own path for a cell, over all samples."""
    own = int(choose_rows(*spec.guidance))
    return own * sum(evaluations(spec, cell, settings).path for settings in cell.settings)


def reference_key(cell: Cell, prepared: PreparedRun) -> bytes:
    """Return what decides the target's own path for a cell: its noise and its timesteps."""
    settings = [
        [s.steps, s.timesteps, s.original_inference_steps, s.resolution] for s in cell.settings
    ]
    seeds = [sample.seed for sample in cell.samples]
    return canonical_bytes([cell.models, scheduler_config_of(cell, prepared), settings, seeds])


def scheduler_config_of(cell: Cell, prepared: PreparedRun) -> dict[str, Any]:
    """Return the configuration of the scheduler that a cell edits with."""
    return exported_scheduler(cell.recipe, prepared.plan.family, prepared.sources.target)


def evaluations(spec: BenchSpec, cell: Cell, settings: EditSettings) -> Evaluations:
    """Return how often a sample of a cell goes through the UNet.

    Args:
        spec: What every worker knows.
        cell: For its scheduler.
        settings: Of the sample's edit.

    Raises:
        MergeError: the scheduler cannot do what is asked of it.
    """
    config = json.dumps(scheduler_config_of(cell, spec.prepared[cell.models]), sort_keys=True)
    needs_levels = needs_paths(spec) or "residual" in spec.metrics
    return _evaluations(config, dataclasses.replace(settings, seed=0), needs_levels)


@functools.lru_cache(maxsize=1024)
def _evaluations(config: str, settings: EditSettings, needs_levels: bool) -> Evaluations:
    scheduler = load_scheduler(json.loads(config))
    trained = int(scheduler.config.num_train_timesteps)
    is_lcm = type(scheduler).__name__ == "LCMScheduler"
    check_settings(settings, trained_steps=trained, is_lcm=is_lcm)
    schedule: Schedule = make_schedule(scheduler, settings)
    steps = len(schedule.timesteps)
    answers = steps if schedule.has_answers else 0
    if not needs_levels:
        return Evaluations(steps, answers, 0, False)
    levels = NoiseLevels.of(scheduler)
    path = sum(len(ode_grid(start, trained)) for start in starts_of(schedule, levels))
    return Evaluations(steps, answers, path, draws_noise(schedule))
