"""Prove a checkpoint: its files are as recorded, its numbers finite, and it edits pictures."""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from merge.background.closable import Closable
from merge.background.workers import Workers
from merge.card.refresh import refresh_card
from merge.editor.batches import edit as edit_picture
from merge.editor.load import Editor, load_editor
from merge.editor.pictures import load_image
from merge.editor.settings import EditSettings
from merge.editor.vae import encode_pictures
from merge.errors import VerificationError
from merge.records.folder import IMAGES_NAME, PAGE_NAME, OutputRecords
from merge.verify.checks import (
    check_edit,
    check_expected,
    check_repeat,
    check_weights,
    make_check,
)
from merge.verify.clip import ClipScorer, find_clip
from merge.verify.compare import Comparison
from merge.verify.drawings import draw_picture
from merge.verify.edits import DEFAULT_EDITS
from merge.verify.files import FilesCheck
from merge.verify.memory import free_memory
from merge.verify.metrics import SSIM_HINT, has_ssim, measure_pair
from merge.verify.model import Check, CompareOptions, Edit, EditRow, Picture
from merge.verify.ownership import refuse_foreign
from merge.verify.page import render_page
from merge.verify.record import check_record
from merge.verify.report import Report, write_report
from merge.verify.residual import Sample, make_sample, noise_left
from merge.verify.roundtrip import round_trip
from merge.verify.verdict import describe, failures, warnings
from merge.verify.weights import (
    WeightsMeasured,
    load_weights,
    main_weights,
    measure_weights,
)

_LOG = logging.getLogger(__name__)


def verify_folder(
    folder: str | Path,
    *,
    edits: Sequence[Edit] = (),
    device: str = "auto",
    compare: CompareOptions | None = None,
    clip: str | None = None,
    target_weights: Sequence[Path] = (),
    strict: bool = False,
    on_edit: Callable[[int, int], None] | None = None,
) -> Report:
    """Run edits with the settings of the folder's recipe, check them, write the report.

    Writes `report.json`, `report.html` and `images/` into the folder, whether the checks pass or
    not. One model is in memory at a time.

    Args:
        folder: A pipeline folder; only an export of this tool has hashes that can be checked.
        edits: What to edit; empty: pictures that come with the tool.
        device: As for `load_editor`.
        compare: Show pictures of this model beside them.
        clip: Folder or Hub id of a CLIP model to measure the edits with.
        target_weights: The unmerged UNet's files, to measure how far each block moved and what
            the target thinks of the pictures; those of `compare` when empty.
        strict: Take a check that only warns for one that fails.
        on_edit: Called with the number of finished pictures and of all.

    Returns:
        What was found; `report_to_json` gives the same as the file.

    Raises:
        VerificationError: a check failed, or warned and `strict`; the message names each with
            value and limit.
        SourceError: the folder is no pipeline, or a picture or another model is not there.
        OutputError: the report cannot be written, or would replace one that is not ours.
    """
    job = _prepare(Path(folder), edits)
    clip_name = find_clip(clip) if clip is not None else None
    with ExitStack() as stack:
        comparison = Comparison(compare) if compare is not None else None
        if comparison is not None:
            stack.callback(comparison.close)
            target_weights = target_weights or comparison.target.weights
        background = stack.enter_context(_Background(job, target_weights))
        progress = _Progress(on_edit, job, comparison is not None)
        edited = _edit_all(job, device, target_weights, progress)
        free_memory()
        rows = edited.rows
        if comparison is not None:
            rows = comparison.run(rows, edited.settings, device, edited.device, progress.step)
            free_memory()
        rows = _measure(rows, clip, edited.torch_device)
        checks = [*background.checks(), *check_record(job.recipe, job.run), *edited.checks]
        report = Report(
            name=str(job.recipe.get("name") or job.folder.resolve().name),
            recipe=job.recipe,
            recipe_text=job.recipe_text,
            recipe_digest=job.recipe_digest,
            settings=edited.settings,
            device=edited.device,
            checks=tuple(checks),
            rows=tuple(rows),
            blocks=background.weights().blocks,
            target=comparison.target if comparison is not None else None,
            compare=compare,
            clip=clip_name,
            notes=tuple(_notes(job, background, bool(edits), bool(target_weights))),
        )
    write_report(job.folder, report, render_page(report))
    refresh_card(job.folder)
    _judge(report, job.folder, strict)
    return report


def _judge(report: Report, folder: Path, strict: bool) -> None:
    """Raise for what failed, and tell what warns."""
    total = len(report.checks)
    failed, warned = failures(report.checks), warnings(report.checks)
    hint = f"see {folder / PAGE_NAME} and {folder / IMAGES_NAME}"
    if failed:
        lines = "".join(f"\n  {line}" for line in describe(failed))
        raise VerificationError(
            f"the merged model in {folder} fails {len(failed)} of {total} checks:{lines}",
            hint=f"{hint}; a smaller weight may help",
        )
    if warned and strict:
        lines = "".join(f"\n  {line}" for line in describe(warned))
        raise VerificationError(
            f"the merged model in {folder} has {len(warned)} "
            f"warning{'s' * (len(warned) != 1)} of {total} checks:{lines}",
            hint=f"{hint}; without --strict they are no failure",
        )
    for line in describe(warned):
        _LOG.warning("%s", line)


@dataclass(frozen=True, slots=True)
class _Job:
    """What is to be done, read before anything slow begins."""

    folder: Path
    recipe: Mapping[str, Any]
    recipe_text: str
    recipe_digest: str
    run: Mapping[str, Any]
    files: Mapping[str, Mapping[str, Any]]
    settings: EditSettings
    todo: tuple[tuple[Edit, int], ...]
    pictures: Mapping[Path, Image.Image]


@dataclass(frozen=True, slots=True)
class _Edited:
    rows: list[EditRow]
    checks: list[Check]
    settings: EditSettings
    device: str
    torch_device: Any


class _Progress:
    """Counts pictures: the edits, one repetition, and two of the target for each edit."""

    def __init__(
        self, on_edit: Callable[[int, int], None] | None, job: _Job, compared: bool
    ) -> None:
        self._on_edit = on_edit
        self._done = 0
        self._total = len(job.todo) * (3 if compared else 1) + 1

    def step(self) -> None:
        self._done += 1
        if self._on_edit is not None:
            self._on_edit(self._done, self._total)


class _Background(Closable):
    """Hashes the files and measures the weights beside the edits."""

    def __init__(self, job: _Job, target_weights: Sequence[Path]) -> None:
        self._files = FilesCheck(job.folder, job.files) if job.files else None
        self._stop = threading.Event()
        self._workers = Workers(1, "weights")
        self._measured = self._workers.submit(
            lambda: measure_weights(main_weights(job.folder), target_weights, self._stop)
        )

    def close(self) -> None:
        self._stop.set()
        self._workers.end()
        if self._files is not None:
            self._files.close()

    def weights(self) -> WeightsMeasured:
        return self._measured.result()

    def checks(self) -> list[Check]:
        found = []
        if self._files is not None:
            wrong = self._files.result()
            found.append(make_check("files_as_recorded", len(wrong), detail=wrong))
        return [*found, check_weights(self.weights().non_finite)]


def _prepare(folder: Path, edits: Sequence[Edit]) -> _Job:
    refuse_foreign(folder)
    records = OutputRecords(folder)
    recipe, manifest = records.recipe or {}, records.manifest or {}
    verify = recipe.get("verify") or {}
    seeds = verify.get("seeds") or [0]
    todo = tuple(
        (edit, seed)
        for edit in (edits or DEFAULT_EDITS)
        for seed in ([edit.seed] if edit.seed is not None else seeds)
    )
    paths = {path for edit, _ in todo for path in (edit.image, *edit.expected) if path is not None}
    return _Job(
        folder=folder,
        recipe=recipe,
        recipe_text=records.lock_text if recipe else "",
        recipe_digest=str(manifest.get("recipe_digest") or ""),
        run=records.run,
        files=manifest.get("files", {}),
        settings=_settings(verify),
        todo=todo,
        pictures={path: load_image(path) for path in sorted(paths)},
    )


def _settings(verify: Mapping[str, Any]) -> EditSettings:
    names = {field.name for field in dataclasses.fields(EditSettings)} - {"seed"}
    given = {name: value for name, value in verify.items() if name in names and value is not None}
    if "timesteps" in given:
        given["timesteps"] = tuple(given["timesteps"])
        given["steps"] = len(given["timesteps"])
    return EditSettings(**given)


def _edit_all(
    job: _Job, device: str, target_weights: Sequence[Path], progress: _Progress
) -> _Edited:
    """Run every edit; the model is gone when this returns and memory is freed."""
    editor = load_editor(job.folder, device=device)
    settings = job.settings
    if settings.resolution is None:
        settings = dataclasses.replace(settings, resolution=editor.default_resolution)
    for line in editor.warnings_for(settings):
        _LOG.warning("%s", line)
    rows: list[EditRow] = []
    checks: list[Check] = []
    samples: list[Sample] = []
    for index, (edit, seed) in enumerate(job.todo):
        chosen = edit.settings(settings, seed)
        row, found, sample = _edit_one(editor, job, index, edit, chosen)
        rows.append(row)
        checks += found
        samples.append(sample)
        progress.step()
        if index == 0:
            progress.step()
    dtype = str(editor.pipeline.unet.dtype).removeprefix("torch.")
    checks += _noise_checks(editor, samples, target_weights)
    return _Edited(rows, checks, settings, f"{editor.device.type} {dtype}", editor.device)


def _noise_checks(
    editor: Editor, samples: Sequence[Sample], target_weights: Sequence[Path]
) -> list[Check]:
    """Measure what noise the merged UNet leaves, and then the target's, which takes its place."""
    found = {"noise_left": noise_left(editor, samples)}
    if target_weights and load_weights(editor.pipeline.unet, target_weights):
        found["noise_left_by_target"] = noise_left(editor, samples)
    return [make_check(name, value) for name, value in found.items() if value is not None]


def _edit_one(
    editor: Editor, job: _Job, index: int, edit: Edit, settings: EditSettings
) -> tuple[EditRow, list[Check], Sample]:
    assert settings.resolution is not None
    picture = (
        draw_picture(edit.drawing, settings.resolution)
        if edit.image is None
        else job.pictures[edit.image]
    )
    result = edit_picture(editor, picture, edit.instruction, settings)
    checks = []
    if index == 0:
        again = edit_picture(editor, picture, edit.instruction, settings)
        checks.append(check_repeat(result, again))
    with torch.inference_mode():
        image_latents = encode_pictures(editor, [result.source])
    checks += check_edit(index, result, round_trip(editor, result.source, image_latents))
    merged = Picture(
        result.to_pil(),
        result.settings,
        "lcm" if editor.is_lcm else "own",
        result.unet_rows,
        result.seconds,
    )
    row = EditRow(edit, settings.seed, result.source, {"merged": merged})
    if edit.expected:
        known = [_of_size(job.pictures[path], merged.image.size) for path in edit.expected]
        check, nearest = check_expected(index, merged.image, known, edit.expected_limit)
        checks.append(check)
        row = dataclasses.replace(row, expected=nearest)
    return row, checks, make_sample(editor, result, edit.instruction, image_latents)


def _of_size(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    return image if image.size == size else image.resize(size, Image.Resampling.LANCZOS)


def _measure(rows: Sequence[EditRow], clip: str | None, device: Any) -> list[EditRow]:
    """Add what is shown and not judged: distances to the source and to the target, CLIP scores."""
    scorer = ClipScorer(clip, device) if clip is not None else None
    measured = []
    for row in rows:
        metrics: dict[str, dict[str, float | None]] = {}
        target = row.pictures.get("target")
        for kind, picture in row.pictures.items():
            values = measure_pair(row.source, picture.image)
            if target is not None and kind != "target":
                pair = measure_pair(target.image, picture.image)
                values |= {f"{name}_to_target": value for name, value in pair.items()}
            if scorer is not None:
                before, after = row.edit.before_caption, row.edit.after_caption
                values |= scorer.score(row.source, picture.image, before, after)
            metrics[kind] = values
        measured.append(dataclasses.replace(row, metrics=metrics))
    return measured


def _notes(job: _Job, background: _Background, has_edits: bool, has_target: bool) -> list[str]:
    notes = []
    listed = (job.recipe.get("verify") or {}).get("edits")
    if listed and not has_edits:
        notes.append(
            "The recipe's own edits need their pictures, which a checkpoint does not hold: these "
            "are the edits that come with the tool. Name others with --edits."
        )
    if not job.files:
        notes.append("There is no manifest, so no hashes were checked.")
    if not background.weights().blocks:
        notes.append(
            "The target's weights have other keys or shapes, so the blocks cannot be compared."
            if has_target
            else "How far each block moved is shown with --compare TARGET."
        )
    if not has_ssim():
        notes.append(f"SSIM is not measured: {SSIM_HINT}.")
    return notes
