"""What a grid is going to take: merges, UNet rows, seconds and memory, before it begins."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from merge.editor.guidance import choose_rows
from merge.editor.load import edit_device
from merge.editor.settings import EditSettings
from merge.engine.device import device_errors
from merge.grid.bench import pictures_together
from merge.grid.counting import count_rows
from merge.grid.jobs import BenchSpec
from merge.grid.model import Cell
from merge.plan.memory import default_threads, peak_bytes
from merge.plan.render import format_bytes
from merge.run.prepare import PreparedRun

# Of a merge, measured: bytes that are read, added and hashed in a second.
_CPU_BYTES_PER_S, _GPU_BYTES_PER_S = 0.4e9, 1.5e9


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a grid is going to take.

    Attributes:
        cells: Combinations.
        samples: Edits of each.
        merges: Different weights among them, the target's own included.
        unet_rows: Over all cells, the target's path and what it says of the results.
        row_seconds: Of one row on this device, timed with a model of this size.
        seconds: About, with one worker.
        memory_bytes: Of one worker: its model, what is merged, and the merge's buffers.
        batch: Pictures that go through the model together, which takes memory besides.
        device: Kind of device and dtype.
    """

    cells: int
    samples: int
    merges: int
    unet_rows: int
    row_seconds: float
    seconds: float
    memory_bytes: int
    batch: int
    device: str

    @property
    def tree(self) -> dict[str, Any]:
        """Return it as JSON has it."""
        return {
            "cells": self.cells,
            "samples": self.samples,
            "merges": self.merges,
            "unet_rows": self.unet_rows,
            "row_seconds": round(self.row_seconds, 6),
            "seconds": round(self.seconds, 1),
            "memory_bytes": self.memory_bytes,
            "batch": self.batch,
            "device": self.device,
        }

    @property
    def lines(self) -> tuple[str, ...]:
        """Return it for people."""
        return (
            f"cells      {self.cells}, {self.samples} edits each",
            f"merges     {self.merges}",
            f"UNet rows  {self.unet_rows:,} of {self.row_seconds * 1000:.3g} ms on {self.device}",
            f"time       about {_duration(self.seconds)} with one worker",
            f"memory     {format_bytes(self.memory_bytes)}, and what a batch of {self.batch} takes",
        )


def estimate(spec: BenchSpec, cells: Sequence[Cell]) -> Estimate:
    """Estimate a grid.

    One forward pass is timed, with a model of the right size and no weights.

    Args:
        spec: What workers would know; its models may be sketches.
        cells: Of the grid.

    Raises:
        DeviceError: there is no such device, or it is too small for the model.
    """
    device = edit_device(spec.device)
    dtype = torch.float32 if device.type == "cpu" else torch.float16
    prepared, settings = spec.prepared[cells[0].models], cells[0].settings[0]
    rows = count_rows(spec, cells, cells)
    batch = pictures_together(device, settings.resolution or 512)
    with device_errors(device):
        row_seconds = _row_seconds(prepared, settings, device, dtype, batch)
    merges = {(cell.models, cell.digest) for cell in cells}
    own = {cell.models for cell in cells}
    speed = _GPU_BYTES_PER_S if device.type == "cuda" else _CPU_BYTES_PER_S
    read = sum(
        spec.prepared[models].plan.read_bytes - spec.prepared[models].plan.copy_bytes
        for models in [models for models, _ in merges] + list(own)
    )
    return Estimate(
        cells=len(cells),
        samples=len(cells[0].samples),
        merges=len(merges) + len(own),
        unet_rows=rows,
        row_seconds=row_seconds,
        seconds=rows * row_seconds + read / speed,
        memory_bytes=max(_memory_bytes(p, dtype) for p in spec.prepared),
        batch=batch,
        device=f"{device.type} {str(dtype).removeprefix('torch.')}",
    )


def _memory_bytes(prepared: PreparedRun, dtype: torch.dtype) -> int:
    """Return the memory of a worker, of the machine and of its GPU together."""
    plan = prepared.plan
    elements = sum(tensor.target.element_count for tensor in plan.tensors)
    # The other components' files are about as many bytes in memory, in float32 twice as many.
    others = plan.copy_bytes * dtype.itemsize // 2
    return (
        elements * dtype.itemsize + others + plan.merged_bytes + peak_bytes(plan, default_threads())
    )


@torch.inference_mode()
def _row_seconds(
    prepared: PreparedRun,
    settings: EditSettings,
    device: torch.device,
    dtype: torch.dtype,
    batch: int,
) -> float:
    """Return the time of one row of the main network in a batch, the second time."""
    import diffusers

    config = dict(prepared.sources.target.config or {})
    with torch.device("meta"):
        network = diffusers.UNet2DConditionModel.from_config(config)
    network = torch.nn.Module.to(network, dtype).to_empty(device=device).eval()
    for value in network.state_dict().values():
        value.zero_()
    rows = batch * int(choose_rows(settings.guidance_scale, settings.image_guidance_scale))
    side = (settings.resolution or 512) // _pixels_per_latent(prepared)
    channels = network.config.in_channels
    inputs = torch.zeros(rows, channels, side, side, device=device, dtype=dtype)
    width = network.config.cross_attention_dim
    states = torch.zeros(rows, 77, width, device=device, dtype=dtype)
    added = None
    if network.config.addition_embed_type == "text_time":
        sizes = 6 * network.config.addition_time_embed_dim
        pooled = network.config.projection_class_embeddings_input_dim - sizes
        added = {
            "text_embeds": torch.zeros(rows, pooled, device=device, dtype=dtype),
            "time_ids": torch.zeros(rows, 6, device=device, dtype=dtype),
        }
    step = torch.tensor(999, device=device)
    seconds = 0.0
    for _ in range(2):
        started = time.perf_counter()
        network(inputs, step, states, added_cond_kwargs=added, return_dict=False)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - started
    return seconds / rows


def _pixels_per_latent(prepared: PreparedRun) -> int:
    """Return the pixels of a side that become one latent."""
    pipeline = prepared.sources.target.pipeline
    parts = pipeline.components if pipeline is not None else ()
    config = next((part.config for part in parts if part.name == "vae" and part.config), None)
    levels = len((config or {}).get("block_out_channels", (0,) * 4))
    return int(2 ** (levels - 1))


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
