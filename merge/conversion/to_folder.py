"""One LDM/SGM file into a diffusers folder."""

from __future__ import annotations

import threading
from dataclasses import asdict
from pathlib import Path
from typing import Any

from merge._version import __version__
from merge.conversion.configs import Configs
from merge.conversion.metadata import component_metadata
from merge.conversion.model import ByteCount, ConvertResult, Options, WrittenFile
from merge.conversion.single import read_single_file
from merge.conversion.to_file import check_pickles
from merge.disclosure.portable import blank_file, describe_blank, is_config
from merge.family.registry import component_named
from merge.json_files import json_bytes
from merge.writer.copies.write import plan_header, write_tensor_copies
from merge.writer.folder import OutputFolder
from merge.writer.overlap import refuse_overlap

# What tells a folder that a conversion wrote from one that must not be replaced.
RECORD = "conversion.json"


def convert_to_folder(source: Path, out: Path, config: Path, options: Options) -> ConvertResult:
    """Write a single file's components as a pipeline folder, with the configs of another.

    Raises:
        SourceError: the file or the configs cannot be had.
        CheckpointError: a key is unknown, the file is an EDM model, or the configs are those of
            another model.
        OutputError: the folder exists, or cannot be written.
    """
    refuse_overlap(out, [source, config])
    output = OutputFolder(out, overwrite=options.overwrite, marker=RECORD)
    output.check()
    single = read_single_file(
        source,
        config,
        ema=options.ema,
        exclude=options.exclude,
        allow_pickle=options.allow_pickle,
    )
    checkpoint, parts, configs = single.checkpoint, single.parts, single.configs
    headers = {name: component_metadata(name, checkpoint.metadata) for name in parts}
    planned = [plan_header(copies, headers[name])[1] for name, copies in parts.items()]
    total = sum(header.file_bytes for header in planned)
    output.check_space(total + sum(path.stat().st_size for path in configs.files.values()))
    left_out = {
        **single.left_out,
        **dict.fromkeys(configs.missing, f"neither {source.name} nor {config} has its weights"),
    }
    with output:
        check_pickles([checkpoint])
        blanked = _copy_configs(output, configs)
        count = ByteCount(options.on_progress, total - sum(header.data_start for header in planned))
        files: dict[str, WrittenFile] = {}
        for name, copies in parts.items():
            part = component_named(name)
            assert part is not None
            path = output.place(part.file_name)
            written = write_tensor_copies(path, copies, headers[name], on_bytes=count)
            files[part.file_name] = WrittenFile(*written)
        record = {
            "tool": {"name": "instruct-merge", "version": __version__},
            "source": source.name,
            "files": {name: asdict(file) for name, file in files.items()},
            "left_out": left_out,
        }
        output.write_file(RECORD, json_bytes(record))
        output.publish()
    return ConvertResult(out, "diffusers", files, left_out, (*single.notes, *blanked))


def _copy_configs(output: OutputFolder, configs: Configs) -> tuple[str, ...]:
    """Copy the configs, and say of which ones places of another machine were blanked."""
    stop = threading.Event()
    lines = []
    for name, path in configs.files.items():
        data = path.read_bytes() if is_config(name, path.stat().st_size) else b""
        tree, fields = blank_file(data)
        if fields:
            lines.append(describe_blank(name, fields))
        if name == "model_index.json" and configs.missing:
            index: dict[str, Any] = dict(tree if fields else configs.index)
            index |= {missing: [None, None] for missing in configs.missing}
            output.write_file(name, json_bytes(index))
        elif fields:
            output.write_file(name, json_bytes(tree))
        else:
            output.copy_file(path, name, stop)
    return tuple(lines)
