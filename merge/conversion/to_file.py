"""A diffusers folder into one LDM/SGM file."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from merge.conversion.metadata import CONVERTIBLE_HINT, single_file_metadata
from merge.conversion.model import ByteCount, ConvertResult, Options, WrittenFile
from merge.conversion.problems import naming, refuse
from merge.errors import CheckpointError, SourceNotFoundError
from merge.family.expected.fit import Fit, fit_to_config
from merge.family.model import Recognised
from merge.family.registry import FAMILIES, main_among, main_names, recognise
from merge.json_files import read_json
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
    main = main_among(lambda name: (source / name).is_dir()) or main_names()[0]
    parts = {main: _read_component(source, main, options.allow_pickle)}
    # A layer may be a matrix or a convolution there, which tells families apart.
    fits = {main: _fit(source, main, parts[main])}
    found = _recognise(source / main, reshaped(parts[main], fits[main].shapes))
    assert found.family.single_file is not None
    for name in found.family.single_file.components[1:]:
        parts[name] = _read_component(source, name, options.allow_pickle)
    fits |= {name: _fit(source, name, part) for name, part in parts.items() if name != main}
    problems = [problem for fit in fits.values() for problem in fit.problems]
    refuse(problems, f"{source} is not whole, or not of its configs:")
    parts = {name: reshaped(part, fits[name].shapes) for name, part in parts.items()}
    prediction_type = _prediction_type(source)
    relayout = plan_single_file(parts)
    copies = relayout.copies[""]
    metadata = single_file_metadata(
        found, out.stem, prediction_type=prediction_type, inherited=parts[main].metadata
    )
    left_out = {**relayout.left_out, **_without_place(source, parts)}
    for name, part in parts.items():
        left_out |= {f"{name}: {key}": reason for key, reason in part.left_out}
    header = plan_header(copies, metadata)[1]
    output.check_space(header.file_bytes)
    count = ByteCount(options.on_progress, header.file_bytes - header.data_start)
    with output:
        check_pickles(parts.values())
        written = write_tensor_copies(output.partial, copies, metadata, on_bytes=count)
        output.publish()
    files = {out.name: WrittenFile(*written)}
    notes = [note for fit in fits.values() for note in fit.notes]
    notes.append(_loading_note(found, out, source))
    return ConvertResult(out, "single-file", files, left_out, tuple(notes))


def check_pickles(parts: Iterable[Checkpoint]) -> None:
    """Compare the checksums of inputs that are pickles; other files have none."""
    for part in parts:
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
    with naming(folder):
        return take_in(checkpoint).checkpoint


def _fit(source: Path, name: str, part: Checkpoint) -> Fit:
    """Compare a component of the folder with its config, and with what the pipeline says it is."""
    index, config = source / "model_index.json", source / name / "config.json"
    entry = read_json(index).get(name) if index.is_file() else None
    class_name = str(entry[1]) if isinstance(entry, list) and len(entry) == 2 else ""
    tree = read_json(config) if config.is_file() else None
    return fit_to_config(name, part.shapes, tree, class_name)


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


def _prediction_type(source: Path) -> str:
    """Return what the model predicts, in diffusers' words.

    Raises:
        CheckpointError: it is an EDM model.
    """
    path = source / "scheduler" / "scheduler_config.json"
    if not path.is_file():
        return "epsilon"
    config = read_json(path)
    name = str(config.get("_class_name", ""))
    if name.startswith("EDM"):
        raise CheckpointError(
            f"{source} has the scheduler {name}: an EDM model's single file needs marker tensors "
            "that a folder does not have",
            hint="without them every reader would take it for an epsilon model; keep the folder",
        )
    return str(config.get("prediction_type", "epsilon"))


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


def _loading_note(found: Recognised, out: Path, source: Path) -> str:
    name = found.family.pipeline_class if found.is_edit else found.family.plain_class
    # Without `config` diffusers takes an 8-channel SDXL file for a plain one.
    # As they were given, so that the line works from where the command was typed.
    arguments = f"{json.dumps(str(out))}, config={json.dumps(str(source))}"
    return f"diffusers loads it with {name}.from_single_file({arguments})"
