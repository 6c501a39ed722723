"""Prove a checkpoint: its files are as recorded, its numbers finite, and it edits pictures."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
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
from merge.verify.verdict import describe
from merge.verify.weights import load_weights, main_weights, measure_weights

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
    folder = Path(folder)
    work = _Work(folder, edits)
    clip_name = find_clip(clip) if clip is not None else None
    # The edits, one repetition, and two pictures of the target for each edit.
    total = len(work.todo) * (3 if compare is not None else 1) + 1
    done = itertools.count(1)

    def step() -> None:
        if on_edit is not None:
            on_edit(next(done), total)

    with ExitStack() as stack:
        comparison = None
        if compare is not None:
            comparison = stack.enter_context(Comparison(compare))
            target_weights = target_weights or comparison.target.weights
        background = stack.enter_context(_Background(folder, work.files, target_weights))
        work.edit_all(device, target_weights, step)
        free_memory()
        if comparison is not None:
            work.rows = comparison.run(work.rows, work.settings, device, work.device, step)
            free_memory()
        rows = _measure(work.rows, clip, work.torch_device)
        checks = [*background.checks(), *check_record(work.recipe, work.run), *work.checks]
        blocks = background.measured.result().blocks
        report = Report(
            name=str(work.recipe.get("name") or folder.resolve().name),
            recipe=work.recipe,
            recipe_text=work.recipe_text,
            recipe_digest=work.recipe_digest,
            settings=work.settings,
            device=work.device,
            checks=tuple(checks),
            rows=tuple(rows),
            blocks=blocks,
            target=comparison.target if comparison is not None else None,
            compare=compare,
            clip=clip_name,
            notes=tuple(_notes(work, bool(edits), bool(target_weights), bool(blocks))),
        )
    write_report(folder, report, render_page(report))
    refresh_card(folder)
    _judge(report, folder, strict)
    return report


def _judge(report: Report, folder: Path, strict: bool) -> None:
    """Raise for what failed, and tell what warns."""
    failed, warned = report.failed, report.warned
    if failed or (warned and strict):
        if failed:
            count = f"fails {len(failed)}"
            advice = "a smaller weight may help"
        else:
            count = f"has {len(warned)} warning{'s' * (len(warned) != 1)}"
            advice = "without --strict they are no failure"
        lines = "".join(f"\n  {line}" for line in describe(failed or warned))
        raise VerificationError(
            f"the merged model in {folder} {count} of {len(report.checks)} checks:{lines}",
            hint=f"see {folder / PAGE_NAME} and {folder / IMAGES_NAME}; {advice}",
        )
    for line in describe(warned):
        _LOG.warning("%s", line)


class _Work:
    """The edits of a folder: what is to be done, and what was found."""

    def __init__(self, folder: Path, edits: Sequence[Edit]) -> None:
        """Read what is needed before anything slow begins."""
        refuse_foreign(folder)
        self.folder = folder
        records = OutputRecords(folder)
        self.recipe = records.recipe or {}
        self.recipe_text = records.lock_text if self.recipe else ""
        manifest = records.manifest or {}
        self.recipe_digest = str(manifest.get("recipe_digest") or "")
        self.files = manifest.get("files", {})
        self.run = records.run
        verify = self.recipe.get("verify") or {}
        self.settings = _settings(verify)
        seeds = verify.get("seeds") or [0]
        self.todo = [
            (edit, seed)
            for edit in (edits or DEFAULT_EDITS)
            for seed in ([edit.seed] if edit.seed is not None else seeds)
        ]
        paths = {path for edit in edits for path in (edit.image, *edit.expected) if path}
        self.pictures = {path: load_image(path) for path in sorted(paths)}
        self.device = ""
        self.torch_device = torch.device("cpu")
        self.rows: list[EditRow] = []
        self.checks: list[Check] = []

    def edit_all(
        self, device: str, target_weights: Sequence[Path], step: Callable[[], None]
    ) -> None:
        """Run every edit; the model is gone when this returns and memory is freed."""
        editor = load_editor(self.folder, device=device)
        if self.settings.resolution is None:
            self.settings = dataclasses.replace(self.settings, resolution=editor.default_resolution)
        for line in editor.warnings_for(self.settings):
            _LOG.warning("%s", line)
        samples = []
        for index, (edit, seed) in enumerate(self.todo):
            samples.append(self.edit_one(editor, index, edit, edit.settings(self.settings, seed)))
            step()
            if index == 0:
                step()
        dtype = str(editor.pipeline.unet.dtype).removeprefix("torch.")
        self.device, self.torch_device = f"{editor.device.type} {dtype}", editor.device
        # What noise the merged UNet leaves, and then the target's, which takes its place.
        found = {"noise_left": noise_left(editor, samples)}
        if target_weights and load_weights(editor.pipeline.unet, target_weights):
            found["noise_left_by_target"] = noise_left(editor, samples)
        self.checks += [make_check(n, value) for n, value in found.items() if value is not None]

    def edit_one(self, editor: Editor, index: int, edit: Edit, settings: EditSettings) -> Sample:
        """Run an edit and check it; return what noise is added to later."""
        assert settings.resolution is not None
        if edit.image is None:
            picture = draw_picture(edit.drawing, settings.resolution)
        else:
            picture = self.pictures[edit.image]
        result = edit_picture(editor, picture, edit.instruction, settings)
        if index == 0:
            again = edit_picture(editor, picture, edit.instruction, settings)
            self.checks.append(check_repeat(result, again))
        with torch.inference_mode():
            image_latents = encode_pictures(editor, [result.source])
        self.checks += check_edit(index, result, round_trip(editor, result.source, image_latents))
        merged = Picture.of(result, "lcm" if editor.is_lcm else "own")
        nearest = None
        if edit.expected:
            size, resample = merged.image.size, Image.Resampling.LANCZOS
            known = [self.pictures[path].resize(size, resample) for path in edit.expected]
            check, nearest = check_expected(index, merged.image, known, edit.expected_limit)
            self.checks.append(check)
        row = EditRow(edit, settings.seed, result.source, {"merged": merged}, expected=nearest)
        self.rows.append(row)
        return make_sample(editor, result, edit.instruction, image_latents)


class _Background(Closable):
    """Hashes the files and measures the weights beside the edits."""

    def __init__(
        self,
        folder: Path,
        files: Mapping[str, Mapping[str, Any]],
        target_weights: Sequence[Path],
    ) -> None:
        self._files = FilesCheck(folder, files) if files else None
        self._stop = threading.Event()
        self._workers = Workers(1, "weights")
        self.measured = self._workers.submit(
            lambda: measure_weights(main_weights(folder), target_weights, self._stop)
        )

    def close(self) -> None:
        self._stop.set()
        self._workers.end()
        if self._files is not None:
            self._files.close()

    def checks(self) -> list[Check]:
        found = []
        if self._files is not None:
            wrong = self._files.result()
            found.append(make_check("files_as_recorded", len(wrong), detail=wrong))
        return [*found, check_weights(self.measured.result().non_finite)]


def _settings(verify: Mapping[str, Any]) -> EditSettings:
    names = {field.name for field in dataclasses.fields(EditSettings)} - {"seed"}
    given = {name: value for name, value in verify.items() if name in names and value is not None}
    if "timesteps" in given:
        given["timesteps"] = tuple(given["timesteps"])
        given["steps"] = len(given["timesteps"])
    return EditSettings(**given)


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


def _notes(work: _Work, has_edits: bool, has_target: bool, has_blocks: bool) -> list[str]:
    notes = []
    listed = (work.recipe.get("verify") or {}).get("edits")
    if listed and not has_edits:
        notes.append(
            "The recipe's own edits need their pictures, which a checkpoint does not hold: these "
            "are the edits that come with the tool. Name others with --edits."
        )
    if not work.files:
        notes.append("There is no manifest, so no hashes were checked.")
    if not has_blocks:
        notes.append(
            "The target's weights have other keys or shapes, so the blocks cannot be compared."
            if has_target
            else "How far each block moved is shown with --compare TARGET."
        )
    if not has_ssim():
        notes.append(f"SSIM is not measured: {SSIM_HINT}.")
    return notes
