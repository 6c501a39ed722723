"""A diffusers folder into one LDM/SGM file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from merge.conversion.metadata import CONVERTIBLE_HINT, single_file_metadata
from merge.conversion.model import ByteCount, ConvertResult, Options, WrittenFile
from merge.errors import CheckpointError, SourceNotFoundError
from merge.family.expected.fit import fit_to_config
from merge.family.model import Recognised
from merge.family.registry import FAMILIES, main_names, recognise
from merge.json_files import read_json
from merge.plan.compat import WHOLE_HINT
from merge.reader.checkpoint import Checkpoint, read_checkpoint, verify_records
from merge.reader.intake import reshaped, take_in
from merge.sources.select import has_weights, select_weights
from merge.writer.copies.single_file import plan_single_file
from merge.writer.copies.write import plan_header, write_tensor_copies
from merge.writer.file import OutputFile
from merge.writer.overlap import refuse_overlap


def convert_to_file(source: Path, out: Path, options: Options) -> ConvertResult:
    """Write the components of a folder as one file.

    Raises:
        SourceError: a component is not there.
        CheckpointError: a key has no name in a single file.
        OutputError: the file exists, or cannot be written.
    """
    refuse_overlap(out, [source])
    output = OutputFile(out, overwrite=options.overwrite)
    output.check()
    names = main_names()
    main = next((name for name in names if (source / name).is_dir()), names[0])
    parts = {main: _read_component(source, main, options.allow_pickle)}
    # A layer may be a matrix or a convolution there, which tells families apart.
    found = _recognise(source / main, _fitted(source, parts, is_whole=False)[0][main])
    assert found.family.single_file is not None
    for name in found.family.single_file.components[1:]:
        parts[name] = _read_component(source, name, options.allow_pickle)
    parts, shape_notes = _fitted(source, parts)
    scheduler = _scheduler(source)
    relayout = plan_single_file(parts)
    copies = relayout.copies[""]
    metadata = single_file_metadata(
        found,
        out.stem,
        prediction_type=str(scheduler.get("prediction_type", "epsilon")),
        inherited=parts[main].metadata,
    )
    left_out = {**relayout.left_out, **_without_place(source, parts)}
    for name, part in parts.items():
        left_out |= {f"{name}: {key}": reason for key, reason in part.left_out}
    header = plan_header(copies, metadata)[1]
    output.check_space(header.file_bytes)
    count = ByteCount(options.on_progress, header.file_bytes - header.data_start)
    with output:
        check_pickles(parts)
        size, sha256 = write_tensor_copies(output.partial, copies, metadata, on_bytes=count)
        output.publish()
    notes = (*shape_notes, *_notes(found, out, source))
    files = {out.name: WrittenFile(size, sha256)}
    return ConvertResult(out, "single-file", files, left_out, notes)


def check_pickles(parts: Mapping[str, Checkpoint]) -> None:
    """Compare the checksums of inputs that are pickles; other files have none."""
    for part in parts.values():
        for file in part.files:
            if file.is_pickle:
                verify_records(file.path, file.stamp)


def _read_component(source: Path, name: str, allow_pickle: bool) -> Checkpoint:
    folder = source / name
    if not folder.is_dir():
        single = FAMILIES[-1].single_file
        *first, last = single.components if single is not None else (name,)
        raise SourceNotFoundError(
            f"{source} lacks the folder {name}, which a single file needs",
            hint=f"a whole pipeline folder has {', '.join(first)} and {last}",
        )
    names = {path.name for path in folder.iterdir() if path.is_file()}
    weights = select_weights(names, None, str(folder), allow_pickle=allow_pickle)
    paths = [folder / file for file in weights.names]
    checkpoint = read_checkpoint(paths, allow_pickle=allow_pickle)
    try:
        return take_in(checkpoint).checkpoint
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error.message}", hint=error.hint) from None


def _fitted(
    source: Path, parts: Mapping[str, Checkpoint], *, is_whole: bool = True
) -> tuple[dict[str, Checkpoint], tuple[str, ...]]:
    """Give every component the shapes of its config.

    Args:
        source: The folder.
        parts: Its components' tensors.
        is_whole: Refuse what does not fit; otherwise it is passed over.

    Raises:
        CheckpointError: a weight is missing, or its numbers are not those of the shape.
    """
    index_path = source / "model_index.json"
    index = read_json(index_path) if index_path.is_file() else {}
    fitted: dict[str, Checkpoint] = {}
    problems: list[str] = []
    notes: list[str] = []
    for name, part in parts.items():
        path = source / name / "config.json"
        entry = index.get(name)
        class_name = str(entry[1]) if isinstance(entry, list) and len(entry) == 2 else ""
        config = read_json(path) if path.is_file() else None
        fit = fit_to_config(name, part.shapes, config, class_name)
        fitted[name] = reshaped(part, fit.shapes)
        problems += fit.problems
        notes += fit.notes
    if problems and is_whole:
        raise CheckpointError(
            "\n  ".join([f"{source} is not whole, or not of its configs:", *problems]),
            hint=WHOLE_HINT,
        )
    return fitted, tuple(notes)


def _recognise(folder: Path, part: Checkpoint) -> Recognised:
    found = recognise(part.shapes)
    if found is None:
        raise CheckpointError(f"{folder} holds no model that is known")
    family = found.family
    if family.single_file is None:
        raise CheckpointError(
            f"{folder.parent} is a {family.title} model, whose single-file layout is not supported",
            hint=CONVERTIBLE_HINT,
        )
    if found.has_guidance_embedding and family.guidance is not None:
        raise CheckpointError(
            f"{folder}: {family.guidance.key}, the guidance embedding of a full LCM, "
            "has no name in a single file",
            hint="merge it first with guidance_embedding: bake, or keep the folder",
        )
    return found


def _scheduler(source: Path) -> dict[str, Any]:
    path = source / "scheduler" / "scheduler_config.json"
    if not path.is_file():
        return {}
    config = read_json(path)
    name = str(config.get("_class_name", ""))
    if name.startswith("EDM"):
        raise CheckpointError(
            f"{source} has the scheduler {name}: an EDM model's single file needs marker tensors "
            "that a folder does not have",
            hint="without them every reader would take it for an epsilon model; keep the folder",
        )
    return config


def _without_place(source: Path, parts: Mapping[str, Checkpoint]) -> dict[str, str]:
    """Name the parts of the folder that no single file holds."""
    left_out = {}
    for folder in sorted(path for path in source.iterdir() if path.is_dir()):
        names = {path.name for path in folder.iterdir() if path.is_file()}
        if folder.name in parts or folder.name.startswith(".") or not names:
            continue
        if has_weights(names):
            left_out[folder.name] = "a single file has no place for it"
        elif any(name.endswith(("config.json", "vocab.json")) for name in names):
            left_out[folder.name] = "configs and vocabularies are in no single file"
    return left_out


def _notes(found: Recognised, out: Path, source: Path) -> tuple[str, ...]:
    name = found.family.pipeline_class if found.is_edit else found.family.plain_class
    # Without `config` diffusers takes an 8-channel SDXL file for a plain one.
    # As they were given, so that the line works from where the command was typed.
    line = f"{name}.from_single_file({json.dumps(str(out))}, config={json.dumps(str(source))})"
    return (f"diffusers loads it with {line}",)
