"""Where cells run: in this process, or on the machines of a Ray cluster."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from merge._version import __version__
from merge.background.pool.model import Pool
from merge.background.pool.open import open_pool
from merge.background.pool.options import ExecutorOptions
from merge.editor.load import edit_device
from merge.grid.counting import count_rows, scheduler_config_of
from merge.grid.jobs import BenchSpec
from merge.grid.model import Cell
from merge.json_files import canonical_bytes


def check_doable(options: ExecutorOptions, spec: BenchSpec, cells: Sequence[Cell]) -> None:
    """Refuse now what workers could not do, before an earlier search is replaced.

    Args:
        options: Where cells run; another machine's devices are not known here.
        spec: What workers know.
        cells: Of the grid.

    Raises:
        VerificationError: a scheduler cannot do what is asked of it.
        DeviceError: there is no such device.
    """
    count_rows(spec, cells, cells)
    if options.name == "local":
        edit_device(spec.device)


def make_pool(options: ExecutorOptions, spec: BenchSpec) -> Pool:
    """Return the pool that measures cells.

    Raises:
        ValueError: there is no such executor.
    """
    import torch

    # As many threads as here: sums depend on how they are shared out.
    return open_pool(
        options,
        uses_gpu=spec.device not in ("cpu", "mps"),
        threads=torch.get_num_threads(),
    )


def facts_of(spec: BenchSpec, cells: Sequence[Cell]) -> dict[str, str]:
    """Return what decides the numbers of a grid, in words, each to a digest of it."""
    read: dict[Path, str] = {}

    def picture(path: Path) -> str:
        if path not in read:
            read[path] = _digest(path.read_bytes())
        return read[path]

    samples = [
        [
            sample.seed,
            sample.edit.instruction,
            sample.edit.before_caption,
            sample.edit.after_caption,
            sample.edit.drawing if sample.edit.image is None else picture(sample.edit.image),
            [*map(picture, sample.edit.expected), sample.edit.expected_limit],
        ]
        for sample in cells[0].samples
    ]
    schedulers = [scheduler_config_of(cell, spec.prepared[cell.models]) for cell in cells]
    return {
        "the tool's version": __version__,
        "the grid": _digest([list(cell.words) for cell in cells]),
        "the recipe or an input": _digest([cell.digest for cell in cells]),
        "the edits": _digest(samples),
        "the scheduler": _digest(schedulers),
        "their settings": _digest(
            [[_setting(s) for s in map(dataclasses.asdict, cell.settings)] for cell in cells]
        ),
        "the target's own settings": _digest(list(spec.guidance)),
        "the metrics": _digest([*sorted(spec.metrics), spec.clip or ""]),
        "the device": spec.device,
    }


def _setting(tree: Mapping[str, object]) -> dict[str, object]:
    return {name: list(v) if isinstance(v, tuple) else v for name, v in tree.items()}


def _digest(value: object) -> str:
    data = value if isinstance(value, bytes) else canonical_bytes(value)
    return hashlib.sha256(data).hexdigest()
