"""The delta of a recipe, factored tensor by tensor and written as a LoRA."""

from __future__ import annotations

import hashlib
import math
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import torch

from merge.engine.buffers import TORCH_DTYPES
from merge.engine.device import choose_device, device_errors, single_threaded
from merge.errors import EngineError, NonFiniteError, OutputError, PlanError, RecipeError
from merge.extract.deltas import DeltaReader
from merge.extract.factor import check_target, factor_delta, residual, squared_norm
from merge.extract.model import ExtractedLayer, ExtractResult, LeftOutDelta
from merge.extract.names import FORMS, factor_names, module_name, reason_against
from merge.header.dtypes import DTYPE_CODES
from merge.header.encode import encode_header
from merge.methods.table import METHODS
from merge.plan.build import build_plan
from merge.plan.model import MergePlan, TensorPlan
from merge.reader.checkpoint import FileReader
from merge.recipe.schema import Recipe
from merge.sources.resolve import resolve_sources
from merge.writer.file import OutputFile
from merge.writer.overlap import refuse_overlap
from merge.writer.tensors import TensorFileWriter, write_error

DEFAULT_RANK = 64
DEFAULT_MAX_RANK = 512
DTYPES = ("float16", "bfloat16", "float32")
_SUFFIX = ".safetensors"

# Stage, what is done, of how much.
Progress = Callable[[str, int, int], None]


def extract_lora(
    recipe: Recipe,
    out: str | Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    max_rank: int = DEFAULT_MAX_RANK,
    form: str = "kohya",
    dtype: str = "float16",
    device: str = "auto",
    overwrite: bool = False,
    on_progress: Progress | None = None,
) -> ExtractResult:
    """Write what a recipe adds to its target as a LoRA.

    One tensor is in memory at a time. The same inputs give the same bytes on the same device. The
    file appears complete or not at all.

    Args:
        recipe: Its method must be one that only adds deltas, as `add_difference` does.
        out: A new `.safetensors` file.
        rank: Of every layer; 64 when `energy` is not given either.
        energy: In place of `rank`: each layer gets the smallest rank that keeps this part of its
            squared norm, 0 < energy <= 1.
        max_rank: The most that `energy` may take.
        form: `kohya` or `peft`.
        dtype: Of the factors: `float16`, `bfloat16` or `float32`.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        overwrite: Replace an existing file.
        on_progress: Called with `extract`, the tensors done and the tensors in all.

    Raises:
        RecipeError: the method is not linear in the deltas.
        PlanError: the models do not fit, or nothing is added.
        EngineError: every delta is zero, an input is not finite, or a factor leaves `dtype`.
        OutputError: the file exists, or cannot be written.
        ValueError: rank and energy together, one of them out of range, or an unknown form or dtype.
    """
    if rank is None and energy is None:
        rank = DEFAULT_RANK
    check_target(rank, energy, max_rank)
    for what, value, known in (("form", form, FORMS), ("dtype", dtype, DTYPES)):
        if value not in known:
            raise ValueError(f"{what} {value!r} is not one of {', '.join(known)}")
    out = Path(out)
    if out.suffix != _SUFFIX:
        raise OutputError(
            f"the LoRA {out} must have a name that ends in {_SUFFIX}", hint=f"try {out}{_SUFFIX}"
        )
    output = OutputFile(out, overwrite=overwrite)
    output.check()
    plan = _plan(recipe)
    refuse_overlap(out, (file.path for file in plan.files))
    where = choose_device(device)
    try:
        with output, tempfile.TemporaryFile(dir=out.absolute().parent) as spool:
            job = _Extraction(plan, form, DTYPE_CODES[dtype], spool, rank, energy, max_rank)
            with single_threaded(), device_errors(where):
                job.run(where, on_progress)
            size = job.write(output.partial, recipe.name)
            output.publish()
    except OSError as error:
        # Of the spool: every other file has errors of its own.
        raise write_error(out, error) from error
    return ExtractResult(
        out,
        form,
        dtype,
        size,
        tuple(job.layers),
        tuple(job.left_out),
        tuple(job.unchanged),
        tuple(plan.family.blocks.sort({layer.block for layer in job.layers if layer.block})),
    )


def _plan(recipe: Recipe) -> MergePlan:
    """Plan a recipe whose deltas a LoRA can hold."""
    if not METHODS[recipe.method].is_sum:
        sums = [name for name, method in METHODS.items() if method.is_sum]
        raise RecipeError(
            f"the method {recipe.method} has no delta of its own that a LoRA could hold",
            ["its result depends on the target's values or on all deltas at once"],
            hint=f"extract with method={' or '.join(sums)}",
        )
    plan = build_plan(recipe, resolve_sources(recipe))
    if not any(tensor.is_merged for tensor in plan.tensors):
        raise PlanError(
            "there is nothing to extract: the recipe adds nothing to any tensor",
            [],
            hint="is its weight 0?",
        )
    return plan


@dataclass(slots=True)
class _Extraction:
    """Factors in a nameless file until all ranks, and so the header, are known."""

    plan: MergePlan
    form: str
    code: str
    spool: IO[bytes]
    rank: int | None
    energy: float | None
    max_rank: int
    # Name to offset and shape.
    spooled: dict[str, tuple[int, tuple[int, ...]]] = field(default_factory=dict)
    layers: list[ExtractedLayer] = field(default_factory=list)
    left_out: list[LeftOutDelta] = field(default_factory=list)
    unchanged: list[str] = field(default_factory=list)

    @property
    def alpha(self) -> float:
        """Return the alpha of every module.

        The same for all, with the rest of the scale in the factors: diffusers 0.42 loses the
        alphas of attention layers as soon as two modules differ. Small where the ranks are not
        known, since factors that shrink lose bits in float16.
        """
        return float(self.rank or 1)

    def run(self, device: torch.device, on_progress: Progress | None) -> None:
        """Factor every delta of the plan."""
        rows = [tensor for tensor in self.plan.tensors if tensor.is_merged]
        with ExitStack() as stack:
            readers = [stack.enter_context(FileReader(f.path, f.stamp)) for f in self.plan.files]
            deltas = DeltaReader(self.plan, readers, device)
            for done, tensor in enumerate(rows, 1):
                with torch.inference_mode():
                    self._extract(tensor, deltas.read(tensor))
                if on_progress is not None:
                    on_progress("extract", done, len(rows))
            for reader, file in zip(readers, self.plan.files, strict=True):
                reader.check_unchanged(file.stamp)
        if not self.layers:
            raise EngineError(
                "there is nothing to extract: no weight has a delta that a LoRA can hold",
                hint="are base and distilled the same model?",
            )

    def write(self, path: Path, recipe_name: str) -> int:
        """Write the file from the spooled factors; return its size."""
        specs = {name: (self.code, shape) for name, (_, shape) in self.spooled.items()}
        target = f"rank {self.rank}" if self.energy is None else f"energy {self.energy}"
        metadata = {
            "format": "pt",
            "instruct_merge.extracted_from": recipe_name,
            "instruct_merge.extracted_with": target,
        }
        head, header = encode_header(specs, metadata)
        with TensorFileWriter(path, header.file_bytes) as writer:
            for spec in header.tensors:
                self.spool.seek(self.spooled[spec.name][0])
                writer.write(memoryview(self.spool.read(spec.size_bytes)), spec.start)
            writer.finish(head)
        return header.file_bytes

    def _extract(self, tensor: TensorPlan, delta: torch.Tensor) -> None:
        matrix = delta.view(len(delta), -1)
        squared = squared_norm(matrix)
        if not math.isfinite(squared):
            raise NonFiniteError(
                f"{tensor.key}: its delta has values that are NaN or infinite",
                hint="the base or the distilled model is damaged; use another one",
            )
        reason = reason_against(tensor, self.plan.family)
        if reason:
            self.left_out.append(LeftOutDelta(tensor.key, tensor.component, reason, squared))
            return
        if squared == 0:
            self.unchanged.append(tensor.key)
            return
        found = factor_delta(
            matrix,
            rank=self.rank,
            energy=self.energy,
            max_rank=self.max_rank,
            # A seed of its own, so that a layer does not depend on the others.
            seed=int.from_bytes(hashlib.sha256(tensor.key.encode()).digest()[:7], "little"),
        )
        stored_in = TORCH_DTYPES[self.code]
        scale = self.alpha / found.rank if self.form == "kohya" else 1.0
        up, down = ((factor / math.sqrt(scale)).to(stored_in) for factor in (found.up, found.down))
        lost = residual(matrix, up.float(), down.float(), scale)
        if not math.isfinite(lost):
            raise NonFiniteError(
                f"{tensor.key}: its factors are too large for {stored_in}",
                hint="store them with --dtype float32",
            )
        self._store(tensor, up, down)
        self.layers.append(
            ExtractedLayer(
                tensor.key,
                tensor.component,
                tensor.block,
                found.rank,
                squared,
                math.sqrt(lost / squared),
                found.energy,
                found.is_capped,
            )
        )

    def _store(self, tensor: TensorPlan, up: torch.Tensor, down: torch.Tensor) -> None:
        """Put the factors of a layer into the spool, convolutions with their kernel below."""
        module = module_name(tensor, self.form, self.plan.family)
        names = factor_names(module, self.form)
        rank = up.shape[1]
        inner = tensor.target.shape[1:]
        ones = (1,) * len(inner[1:])
        values: Mapping[str, torch.Tensor] = {
            "down": down.reshape(rank, *inner),
            "up": up.reshape(len(up), rank, *ones),
            "alpha": torch.tensor(self.alpha, dtype=up.dtype),
        }
        for role, name in names.items():
            if name in self.spooled:
                raise PlanError(f"two weights have the same module name {module}", [tensor.key])
            data = values[role].contiguous().cpu()
            self.spooled[name] = (self.spool.seek(0, 2), tuple(data.shape))
            self.spool.write(data.reshape(-1).view(torch.uint8).numpy().data)
