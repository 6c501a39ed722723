"""One resident model that takes the weights of one cell after the other."""

from __future__ import annotations

import dataclasses
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from merge.background.closable import Closable
from merge.editor.batches import edit_many
from merge.editor.denoise import GuidedModel, make_conditions
from merge.editor.guidance import choose_rows
from merge.editor.load import Editor, load_editor
from merge.editor.pictures import load_image, resize_image
from merge.editor.precision import float32_precision
from merge.editor.result import EditRequest, EditResult, in_8_bits
from merge.editor.schedule import Noise, draw_noise, make_schedule
from merge.editor.settings import EditSettings, check_settings
from merge.editor.text import TextEmbedding, empty_text, encode_texts
from merge.editor.vae import decode_latents, encode_pictures
from merge.editor.weights import put_tensors, view_tensors
from merge.errors import NonFiniteError
from merge.grid.jobs import (
    TARGET,
    BenchSpec,
    CellFailed,
    CellFound,
    CellJob,
    Job,
    ReferenceFound,
    ReferenceJob,
    ResidualJob,
    SampleReference,
)
from merge.grid.measures import endpoint_of, measure_samples, residual_of
from merge.grid.model import Cell
from merge.grid.path import NoiseLevels, follow_path
from merge.plan.export import exported_scheduler
from merge.run.in_memory import MemoryMerger
from merge.run.prepare import PreparedRun
from merge.run.skeleton import write_skeleton
from merge.verify.clip import ClipScorer
from merge.verify.drawings import draw_picture
from merge.verify.memory import free_memory

# Pixels of the pictures that go through the model together: eight of 512 px on a GPU.
_GPU_PIXELS, _CPU_PIXELS = 8 * 512 * 512, 2 * 512 * 512
_MOST_PICTURES = 64
Tell = Callable[[int], None]


def make_bench(spec: BenchSpec) -> Bench:
    """Return a worker; it loads a model with its first job."""
    return Bench(spec)


class Bench(Closable):
    """Does jobs with one model in memory, whose weights are replaced in place."""

    def __init__(self, spec: BenchSpec) -> None:
        self._spec = spec
        self._merger = MemoryMerger("cpu" if spec.device == "mps" else spec.device, spec.threads)
        self._editor: Editor | None = None
        # Whose weights the editor has: index of the models, and digest or `TARGET`.
        self._models, self._digest = -1, ""
        self._sha256 = ""
        self._scheduler: dict[str, Any] = {}
        # What every cell sees of its samples.
        self._pictures: dict[tuple[str, int], Image.Image] = {}
        self._latents: dict[int, torch.Tensor] = {}
        self._texts: dict[str, TextEmbedding] = {}
        self._empty: TextEmbedding | None = None
        self._clip: ClipScorer | None = None

    def run(self, job: Job, on_progress: Tell) -> Any:
        """Do a job.

        Args:
            job: What.
            on_progress: Told the UNet rows that were evaluated since the last call.

        Raises:
            MergeError: of the family that fits.
        """
        if isinstance(job, CellJob):
            try:
                return self._measure(job, on_progress)
            except NonFiniteError as error:
                return CellFailed(error.message)
        if isinstance(job, ReferenceJob):
            return self._follow(job, on_progress)
        return self._residual(job, on_progress)

    def close(self) -> None:
        """Give the model's memory back."""
        if self._editor is not None:
            self._editor = None
            self._merger = MemoryMerger()
            free_memory()

    # Weights ---------------------------------------------------------------------------------

    def _take(self, cell: Cell, *, is_target: bool) -> Editor:
        """Return the model with the weights of a cell, or of its unmerged target."""
        first = self._spec.prepared[cell.models]
        wanted = TARGET if is_target else cell.digest
        if (self._models, self._digest) != (cell.models, wanted):
            recipe = _target_recipe(first) if is_target else cell.recipe
            prepared = first.with_recipe(recipe)
            self._digest = ""
            self._merger.merge(prepared)
            self._put(cell.models, prepared)
            self._digest = wanted
            self._sha256 = self._merger.files[prepared.plan.main.file_name].sha256
        assert self._editor is not None
        # The target too has the cell's own scheduler, for its noise and its timesteps.
        config = exported_scheduler(cell.recipe, first.plan.family, first.sources.target)
        if config != self._scheduler:
            self._editor.use_scheduler(config)
            self._scheduler = config
        return self._editor

    def _put(self, models: int, prepared: PreparedRun) -> None:
        """Put what was merged into the model; load one where there is none for these files."""
        data = self._merger.data
        tensors = {
            component.name: view_tensors(data[component.file_name], component.out_header)
            for component in prepared.plan.components
        }
        if len(tensors) > 1 or models != self._models:
            # Of another text encoder.
            self._texts, self._empty = {}, None
        if self._editor is not None and models == self._models:
            for name, values in tensors.items():
                put_tensors(getattr(self._editor.pipeline, name), values, name)
            return
        self._editor, self._scheduler = None, {}
        self._pictures, self._latents = {}, {}
        free_memory()
        with tempfile.TemporaryDirectory() as scratch:
            write_skeleton(prepared, Path(scratch))
            self._editor = load_editor(
                scratch, device=self._spec.device, scheduler="own", weights=tensors
            )
        self._models = models

    # Jobs ------------------------------------------------------------------------------------

    def _measure(self, job: CellJob, tell: Tell) -> CellFound:
        started = time.perf_counter()
        cell = job.cell
        editor = self._take(cell, is_target=False)
        merged = time.perf_counter()
        results: dict[int, EditResult] = {}
        for indices in self._batches(cell, range(len(cell.samples))):
            settings = cell.settings[indices[0]]
            requests = [
                EditRequest(self._picture(cell, index), sample.edit.instruction, sample.seed)
                for index, sample in ((i, cell.samples[i]) for i in indices)
            ]
            found = edit_many(editor, requests, settings, batch_size=len(indices))
            for index, result in zip(indices, found, strict=True):
                results[index] = result
                tell(result.unet_rows)
        edited = time.perf_counter()
        ordered = [results[index] for index in range(len(cell.samples))]
        references = job.references.get() if job.references is not None else None
        values = measure_samples(ordered, cell.samples, references, self._spec.metrics)
        if references is not None and "endpoint" in self._spec.metrics:
            values["endpoint"] = self._endpoints(editor, cell, references, tell)
        if self._spec.clip is not None:
            values |= self._clip_scores(editor, cell, ordered)
        pictures = {index: _in_bytes(ordered[index]) for index in job.shown}
        done = time.perf_counter()
        return CellFound(
            sha256=self._sha256,
            values=values,
            pictures=pictures,
            latents=tuple(result.latents for result in ordered),
            unet_rows=sum(result.unet_rows for result in ordered) / len(ordered),
            seconds={"merge": merged - started, "edit": edited - merged, "measure": done - edited},
            device=_device_words(editor),
        )

    @torch.inference_mode()
    def _follow(self, job: ReferenceJob, tell: Tell) -> ReferenceFound:
        started = time.perf_counter()
        cell = job.cell
        editor = self._take(cell, is_target=True)
        references, sources, pictures, rows = {}, {}, {}, 0
        for indices in self._batches(cell, job.indices):
            settings = cell.settings[indices[0]]
            check_settings(settings, trained_steps=editor.trained_steps, is_lcm=editor.is_lcm)
            schedule = make_schedule(editor.pipeline.scheduler, settings)
            with float32_precision(allows_tf32=editor.allows_tf32):
                predict, latents = self._guided(editor, cell, indices, self._spec.guidance)
                drawn, generators = draw_noise(
                    [cell.samples[index].seed for index in indices], latents.shape[1:], schedule
                )
                noise, *following = editor.move(drawn)
                count = predict.rows * len(indices)
                states, ends = follow_path(
                    editor,
                    schedule,
                    predict,
                    Noise(noise, tuple(following), generators),
                    lambda count=count: tell(count),  # type: ignore[misc]
                )
                seen = decode_latents(editor, ends[-1]).cpu().numpy()
            rows += count * predict.calls
            for at, index in enumerate(indices):
                references[index] = SampleReference(
                    states[:, at].cpu().numpy(), ends[:, at].cpu().numpy()
                )
                sources[index] = np.asarray(self._picture(cell, index))
                pictures[index] = np.asarray(in_8_bits(seen[at]))
        seconds = time.perf_counter() - started
        return ReferenceFound(references, rows, seconds, sources, pictures)

    def _clip_scores(
        self, editor: Editor, cell: Cell, results: Sequence[EditResult]
    ) -> dict[str, tuple[float | None, ...]]:
        """Return what CLIP says of each sample; what needs captions is None without them."""
        if self._clip is None:
            assert self._spec.clip is not None
            self._clip = ClipScorer(self._spec.clip, editor.device)
        found = [
            self._clip.score(
                result.source,
                result.to_pil(),
                sample.edit.before_caption,
                sample.edit.after_caption,
            )
            for result, sample in zip(results, cell.samples, strict=True)
        ]
        names = dict.fromkeys(name for scores in found for name in scores)
        return {name: tuple(scores.get(name) for scores in found) for name in names}

    @torch.inference_mode()
    def _endpoints(
        self,
        editor: Editor,
        cell: Cell,
        references: Mapping[int, SampleReference],
        tell: Tell,
    ) -> tuple[float | None, ...]:
        """Return how far each step's answer is from where the target leads, for each sample."""
        values: dict[int, float | None] = {}
        for indices in self._batches(cell, range(len(cell.samples))):
            settings = cell.settings[indices[0]]
            schedule = make_schedule(editor.pipeline.scheduler, settings)
            guidance = settings.guidance_scale, settings.image_guidance_scale
            found = [references[index] for index in indices]
            states, ends = (
                torch.from_numpy(np.stack(arrays, axis=1))
                for arrays in ([f.states for f in found], [f.ends for f in found])
            )
            with float32_precision(allows_tf32=editor.allows_tf32):
                predict, _ = self._guided(editor, cell, indices, guidance)
                errors = endpoint_of(editor, schedule, predict, states, ends)
            values |= dict(zip(indices, errors, strict=True))
            tell(predict.rows * predict.calls * len(indices))
        return tuple(values[index] for index in range(len(cell.samples)))

    @torch.inference_mode()
    def _residual(self, job: ResidualJob, tell: Tell) -> tuple[float | None, ...]:
        cell = job.cell
        editor = self._take(cell, is_target=True)
        levels = NoiseLevels.of(editor.pipeline.scheduler)
        values: dict[int, float | None] = {}
        for indices in self._batches(cell, range(len(cell.samples))):
            latents = torch.from_numpy(np.stack([job.latents[index] for index in indices]))
            with float32_precision(allows_tf32=editor.allows_tf32):
                predict, _ = self._guided(editor, cell, indices, self._spec.guidance)
                found = residual_of(editor, levels, predict, latents, indices)
            values |= dict(zip(indices, found, strict=True))
            tell(predict.rows * predict.calls * len(indices))
        return tuple(values[index] for index in range(len(cell.samples)))

    def _guided(
        self, editor: Editor, cell: Cell, indices: Sequence[int], guidance: tuple[float, float]
    ) -> tuple[GuidedModel, torch.Tensor]:
        """Return the model as it stands with a guidance, and the pictures' latents."""
        rows = choose_rows(*guidance)
        texts = [self._text(editor, cell.samples[index].edit.instruction) for index in indices]
        if rows > 1 and self._empty is None:
            self._empty = empty_text(editor, texts[0])
        latents = torch.stack([self._encoded(editor, cell, index) for index in indices])
        empty = self._empty if rows > 1 else None
        conditions = make_conditions(editor, rows, texts, empty, latents)
        return GuidedModel(editor, conditions, guidance), latents

    def _text(self, editor: Editor, instruction: str) -> TextEmbedding:
        if instruction not in self._texts:
            self._texts[instruction] = encode_texts(editor, [instruction])[0]
        return self._texts[instruction]

    def _encoded(self, editor: Editor, cell: Cell, index: int) -> torch.Tensor:
        picture = self._picture(cell, index)
        if id(picture) not in self._latents:
            # Kept with the picture, whose identity is the key.
            self._latents[id(picture)] = encode_pictures(editor, [picture])[0]
        return self._latents[id(picture)]

    # Pictures --------------------------------------------------------------------------------

    def _picture(self, cell: Cell, index: int) -> Image.Image:
        """Return what the model sees of a sample: its picture, resized."""
        assert self._editor is not None
        edit, resolution = cell.samples[index].edit, self._resolution(cell.settings[index])
        key = (str(edit.image or edit.drawing), resolution)
        if key not in self._pictures:
            loaded = (
                draw_picture(edit.drawing, resolution)
                if edit.image is None
                else load_image(edit.image)
            )
            self._pictures[key] = resize_image(loaded, resolution, self._editor.size_multiple)
        return self._pictures[key]

    def _resolution(self, settings: EditSettings) -> int:
        assert self._editor is not None
        return settings.resolution or self._editor.default_resolution

    def _batches(self, cell: Cell, indices: Sequence[int]) -> Iterator[list[int]]:
        """Yield indices of samples that are edited together: of one size and one setting."""
        assert self._editor is not None
        groups: dict[Any, list[int]] = {}
        for index in indices:
            size = self._picture(cell, index).size
            settings = dataclasses.replace(cell.settings[index], seed=0)
            groups.setdefault((size, settings), []).append(index)
        for (size, _), group in groups.items():
            count = pictures_together(self._editor.device, math.sqrt(size[0] * size[1]))
            for begin in range(0, len(group), count):
                yield group[begin : begin + count]


def pictures_together(device: torch.device, side: float) -> int:
    """Return how many pictures go through the model together.

    Args:
        device: Where it is.
        side: Of a picture in pixels; of one that is no square the mean.
    """
    most = _CPU_PIXELS if device.type == "cpu" else _GPU_PIXELS
    return min(_MOST_PICTURES, max(1, int(most // (side * side))))


def _target_recipe(prepared: PreparedRun) -> Any:
    """Return the recipe that leaves every weight as the target has it."""
    return dataclasses.replace(prepared.recipe, exclude=["*"], block_weights={}, allow_noop=True)


def _in_bytes(result: EditResult) -> Any:
    return np.asarray(result.to_pil())


def _device_words(editor: Editor) -> str:
    dtype = str(editor.pipeline.unet.dtype).removeprefix("torch.")
    return f"{editor.device.type} {dtype}"
