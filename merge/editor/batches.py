"""Edit one picture or many: what can be shared is done once, what can be batched in one go."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import torch
from PIL import Image

from merge.editor.denoise import OnStep, denoise, make_conditions
from merge.editor.guidance import Rows, choose_rows
from merge.editor.load import Editor
from merge.editor.pictures import load_image, resize_image
from merge.editor.precision import float32_precision
from merge.editor.result import EditRequest, EditResult, StageTimes
from merge.editor.schedule import Noise, draw_noise, make_schedule
from merge.editor.settings import EditSettings, check_seed, check_settings
from merge.editor.text import TextEmbedding, empty_text, encode_texts, warn_of_cuts
from merge.editor.vae import decode_latents, encode_pictures
from merge.errors import DeviceError, ImageError

# What is kept for later requests: pictures take megabytes, instructions hundreds of kilobytes.
_KEPT_PICTURES = 16
_KEPT_TEXTS = 64

K = TypeVar("K")
V = TypeVar("V")


def edit(
    editor: Editor,
    image: Image.Image | str | Path,
    instruction: str,
    settings: EditSettings | None = None,
) -> EditResult:
    """Edit one picture.

    Args:
        editor: From `load_editor`.
        image: A picture of any size and mode, or the path of one.
        instruction: What to change, as a command.
        settings: Steps, guidance, seed and size; None takes the defaults.

    Raises:
        ImageError: the picture or the instruction is empty, or a setting is out of range.
        DeviceError: the device is out of memory.
    """
    return next(edit_many(editor, [EditRequest(image, instruction)], settings))


def edit_many(
    editor: Editor,
    requests: Iterable[EditRequest],
    settings: EditSettings | None = None,
    *,
    batch_size: int = 1,
    on_step: OnStep | None = None,
) -> Iterator[EditResult]:
    """Edit pictures, lazily and in the order of the requests.

    `batch_size` requests are read at a time, and those whose pictures have one size are edited
    together. A picture is the same alone and in a batch, up to the rounding of the sums inside the
    model. One that is used by requests near one another, as with several seeds, is prepared and
    encoded once, and so is an instruction.

    Args:
        editor: From `load_editor`.
        requests: What to edit; read as results are asked for.
        settings: For all of them; None takes the defaults.
        batch_size: Pictures that go through the model together.
        on_step: Called with the finished steps and all steps of the batch at hand.

    Yields:
        One result per request. After an error in a request, what was read before it still comes.

    Raises:
        ImageError: a setting is out of range (at once), or a picture cannot be read, or an
            instruction is empty (when its turn comes).
        DeviceError: the device is out of memory, or the UNet could not be compiled.
        ValueError: `batch_size` is below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size {batch_size} is below 1")
    settings = settings or EditSettings()
    check_settings(settings, trained_steps=editor.trained_steps, is_lcm=editor.is_lcm)
    # Once here, so that what the scheduler cannot do is said at once.
    steps = len(make_schedule(editor.pipeline.scheduler, settings).timesteps)
    resolution = settings.resolution or editor.default_resolution
    if settings.timesteps is not None:
        settings = dataclasses.replace(settings, steps=steps)
    settings = dataclasses.replace(settings, resolution=resolution)
    return _Session(editor, settings, on_step).run(iter(requests), batch_size)


@dataclass(eq=False, slots=True)
class _Picture:
    """A picture that is ready to be edited.

    Attributes:
        image: As it was given; kept alive, so that no other gets its identity, which is the key.
        source: The picture resized.
        latents: Of the source, `(4, h, w)`, once it is encoded.
    """

    image: Image.Image | str | Path
    source: Image.Image
    latents: torch.Tensor | None = None


@dataclass(frozen=True, eq=False, slots=True)
class _Job:
    """A request whose picture is ready.

    Attributes:
        picture: What to edit.
        instruction: What to change.
        seed: Of the noise.
        prepare_s: What reading and resizing took.
    """

    picture: _Picture
    instruction: str
    seed: int
    prepare_s: float


class _Recent(Generic[K, V]):
    """The values used last, up to a limit."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._values: OrderedDict[K, V] = OrderedDict()

    def get(self, key: K) -> V | None:
        if key in self._values:
            self._values.move_to_end(key)
        return self._values.get(key)

    def put(self, key: K, value: V) -> None:
        self._values[key] = value
        self._values.move_to_end(key)
        while len(self._values) > self._limit:
            self._values.popitem(last=False)


class _Session:
    """One call of `edit_many`: the settings, and what is kept between batches."""

    def __init__(self, editor: Editor, settings: EditSettings, on_step: OnStep | None) -> None:
        self.editor = editor
        self.settings = settings
        self.on_step = on_step
        self.rows = choose_rows(settings.guidance_scale, settings.image_guidance_scale)
        self.pictures: _Recent[str | int, _Picture] = _Recent(_KEPT_PICTURES)
        self.texts: _Recent[str, TextEmbedding] = _Recent(_KEPT_TEXTS)
        self.empty: TextEmbedding | None = None

    def run(self, requests: Iterator[EditRequest], batch_size: int) -> Iterator[EditResult]:
        while True:
            jobs: list[_Job] = []
            failure: Exception | None = None
            try:
                for request in itertools.islice(requests, batch_size):
                    jobs.append(self.prepare(request))  # noqa: PERF401 (those before a failure stay)
            except Exception as error:
                failure = error
            yield from self.edit_window(jobs)
            if failure is not None:
                raise failure
            if len(jobs) < batch_size:
                return

    def prepare(self, request: EditRequest) -> _Job:
        started = time.perf_counter()
        if not request.instruction.strip():
            raise ImageError(
                "the instruction is empty", hint='say what to change: "make it winter"'
            )
        seed = self.settings.seed if request.seed is None else request.seed
        check_seed(seed)
        image = request.image
        key = id(image) if isinstance(image, Image.Image) else str(image)
        picture = self.pictures.get(key)
        if picture is None:
            assert self.settings.resolution is not None
            loaded = image if isinstance(image, Image.Image) else load_image(image)
            source = resize_image(loaded, self.settings.resolution, self.editor.size_multiple)
            picture = _Picture(image, source)
            self.pictures.put(key, picture)
        return _Job(picture, request.instruction, seed, time.perf_counter() - started)

    def edit_window(self, jobs: Sequence[_Job]) -> Iterator[EditResult]:
        """Edit the jobs size by size, and give the results in the order of the jobs."""
        sizes: dict[tuple[int, int], list[int]] = {}
        for index, job in enumerate(jobs):
            sizes.setdefault(job.picture.source.size, []).append(index)
        results: dict[int, EditResult] = {}
        for indices in sizes.values():
            try:
                with float32_precision(allows_tf32=self.editor.allows_tf32):
                    batch = self.edit_batch([jobs[index] for index in indices])
            except torch.OutOfMemoryError as error:
                raise DeviceError(
                    f"the device is out of memory: {error}",
                    hint="use a smaller --resolution or --batch-size",
                ) from error
            except RuntimeError as error:
                # What torch's compiler raises: it is a pile of programs that may be missing.
                if not self.editor.is_compiled:
                    raise
                raise DeviceError(
                    f"the compiled UNet failed: {str(error).strip().splitlines()[0]}",
                    hint="edit without --compile, or install a C++ compiler and Triton",
                ) from error
            results.update(zip(indices, batch, strict=True))
        for index in range(len(jobs)):
            yield results.pop(index)

    @torch.inference_mode()
    def edit_batch(self, jobs: Sequence[_Job]) -> list[EditResult]:
        """Edit pictures of one size together."""
        editor, settings = self.editor, self.settings
        times = [time.perf_counter()]

        def stage_ends() -> None:
            editor.synchronize()
            times.append(time.perf_counter())

        texts = self.embed([job.instruction for job in jobs])
        if self.rows > Rows.TEXT and self.empty is None:
            self.empty = empty_text(editor, texts[0])
        stage_ends()
        image_latents = self.encode([job.picture for job in jobs])
        stage_ends()
        schedule = make_schedule(editor.pipeline.scheduler, settings)
        drawn, generators = draw_noise(
            [job.seed for job in jobs], image_latents.shape[1:], schedule
        )
        first, *following = editor.move(drawn)
        latents = denoise(
            editor,
            schedule,
            make_conditions(editor, self.rows, texts, self.empty, image_latents),
            Noise(first, tuple(following), generators),
            (settings.guidance_scale, settings.image_guidance_scale),
            self.on_step,
        )
        stage_ends()
        pictures = decode_latents(editor, latents).cpu().numpy()
        stage_ends()
        text_s, encode_s, denoise_s, decode_s = (
            (end - begin) / len(jobs) for begin, end in itertools.pairwise(times)
        )
        final = latents.cpu().numpy()
        results = []
        for index, job in enumerate(jobs):
            stages = StageTimes(text_s, encode_s + job.prepare_s, denoise_s, decode_s)
            results.append(
                EditResult(
                    image=pictures[index],
                    source=job.picture.source,
                    unet_rows=len(schedule.timesteps) * self.rows,
                    seconds=stages.total_s,
                    latents=final[index],
                    stages=stages,
                    settings=dataclasses.replace(settings, seed=job.seed),
                )
            )
        return results

    def embed(self, texts: Sequence[str]) -> list[TextEmbedding]:
        """Encode the instructions that are not at hand, in one batch."""
        found = {text: kept for text in texts if (kept := self.texts.get(text)) is not None}
        missing = [text for text in dict.fromkeys(texts) if text not in found]
        if missing:
            for text in missing:
                warn_of_cuts(self.editor, text)
            found.update(zip(missing, encode_texts(self.editor, missing), strict=True))
            for text in missing:
                self.texts.put(text, found[text])
        return [found[text] for text in texts]

    def encode(self, pictures: Sequence[_Picture]) -> torch.Tensor:
        """Return the pictures' latents, `(n, 4, h, w)`; encode those that are not at hand."""
        missing = [picture for picture in dict.fromkeys(pictures) if picture.latents is None]
        if missing:
            encoded = encode_pictures(self.editor, [picture.source for picture in missing])
            for picture, latents in zip(missing, encoded, strict=True):
                picture.latents = latents
        return torch.stack([p.latents for p in pictures if p.latents is not None])
