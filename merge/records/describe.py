"""What a checkpoint is, read from headers and configs."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from merge.errors import CheckpointError, SourceError, SourceNotFoundError
from merge.family.keys.single_file import SplitFile, is_single_file, split_single_file
from merge.family.model import Recognised
from merge.family.registry import main_among, recognise
from merge.header.dtypes import DTYPE_WORDS
from merge.json_files import read_json
from merge.lora.roles import is_lora
from merge.plan.model import DIGEST_KEY
from merge.plan.render import format_bytes
from merge.reader.checkpoint import Checkpoint, read_checkpoint
from merge.reader.kinds.prediction import is_marker
from merge.reader.pickles.archive import PICKLE_SUFFIXES
from merge.records.folder import OutputRecords
from merge.sources.select import select_weights


def describe_path(path: str | Path) -> dict[str, Any]:
    """Describe a weight file, a folder of one network or a pipeline folder.

    Returns:
        Plain values: `path, layout, architecture, in_channels, tensors, parameters, dtypes,
        size_bytes, metadata`, for pickles `pickle, left_out`, for a single file `components`,
        and for a pipeline `pipeline, scheduler, components`; for an output of this tool also
        `recipe, recipe_digest, parents, files`.

    Raises:
        SourceNotFoundError: there is nothing there that can be described.
        CheckpointError: a file breaks its format.
    """
    path = Path(path)
    if path.is_file():
        if path.suffix.lower() not in (".safetensors", *PICKLE_SUFFIXES):
            raise SourceError(f"{path} is no weight file: its name ends in none of their suffixes")
        return {"path": str(path), **_describe_weights([path], "")}
    if not path.is_dir():
        raise SourceNotFoundError(f"there is no file or folder {path}")
    folder = path / main_among(lambda name: (path / name).is_dir())
    names = {entry.name for entry in folder.iterdir() if entry.is_file()}
    weights = select_weights(names, None, str(folder), allow_pickle=True)
    index = path / "model_index.json"
    layout = "diffusers pipeline" if index.is_file() else "diffusers folder"
    tree = {
        "path": str(path),
        **_describe_weights([folder / name for name in weights.names], layout),
    }
    if index.is_file():
        tree |= _describe_pipeline(path, read_json(index))
    records = OutputRecords(path)
    manifest = records.manifest
    if manifest is not None:
        tree["recipe"] = records.recipe
        tree["recipe_digest"] = manifest.get("recipe_digest")
        tree["parents"] = manifest.get("inputs")
        tree["files"] = manifest["files"]
    return tree


def render_description(tree: dict[str, Any]) -> str:
    """Return a description as text for people."""
    lines = [
        f"path          {tree['path']}",
        f"layout        {tree['layout']}",
        f"architecture  {tree['architecture']}",
        (
            f"tensors       {tree['tensors']}, {tree['parameters']:,} parameters, "
            f"{format_bytes(tree['size_bytes'])}"
        ),
        "dtypes        " + ", ".join(f"{k} ({v})" for k, v in tree["dtypes"].items()),
    ]
    if tree.get("pickle"):
        lines.append("format        a PyTorch pickle, read without running anything of it")
    if tree["in_channels"] is not None:
        lines.append(f"in_channels   {tree['in_channels']}")
    lines += [f"{name:<13} {tree[name]}" for name in ("pipeline", "scheduler") if name in tree]
    if "components" in tree:
        lines.append(f"components    {', '.join(tree['components'])}")
    recipe = tree.get("recipe")
    if recipe:
        lines.append(
            f"recipe        {recipe['name']}: {recipe['method']}, weight {recipe['weight']:g}"
        )
        lines.append(f"digest        {tree['recipe_digest']}")
    for role, parent in (tree.get("parents") or {}).items():
        name = parent.get("name") or f"{parent.get('repo')}@{parent.get('commit')}"
        lines.append(f"{role:<13} {name}")
    for name, record in (tree.get("files") or {}).items():
        lines.append(f"  {record['sha256']}  {name}")
    lines += [f"not a tensor  {key}: {reason}" for key, reason in tree.get("left_out", ())]
    if not recipe:
        lines += [f"  {key} = {value!r}"[:200] for key, value in sorted(tree["metadata"].items())]
    return "\n".join(lines)


def _describe_weights(paths: list[Path], layout: str) -> dict[str, Any]:
    # Describing a pickle is as safe as describing a header: neither runs anything.
    checkpoint = read_checkpoint(paths, allow_pickle=True)
    split = _split(checkpoint)
    names = split.names(next(iter(split.pairs))) if split is not None else {}
    found = recognise({names.get(key, key): shape for key, shape in checkpoint.shapes.items()})
    dtypes = Counter(spec.dtype for _, spec in checkpoint.tensors.values())
    parameters = sum(spec.element_count for _, spec in checkpoint.tensors.values())
    return {
        "layout": layout or _layout_of(checkpoint, found),
        "architecture": found.family.name if found is not None else "unknown",
        "in_channels": found.in_channels if found is not None else None,
        "tensors": len(checkpoint.tensors),
        "parameters": parameters,
        "dtypes": {DTYPE_WORDS.get(code, code): n for code, n in sorted(dtypes.items())},
        "size_bytes": sum(file.stamp.size_bytes for file in checkpoint.files),
        "metadata": dict(checkpoint.metadata),
        "recipe_digest": checkpoint.metadata.get(DIGEST_KEY),
        **({"components": list(split.pairs)} if split is not None else {}),
        **(
            {"pickle": True, "left_out": [list(item) for item in checkpoint.left_out]}
            if any(file.is_pickle for file in checkpoint.files)
            else {}
        ),
    }


def _split(checkpoint: Checkpoint) -> SplitFile | None:
    """Sort a single file's keys; None for other files, and for what cannot be sorted."""
    if not is_single_file(checkpoint.tensors):
        return None
    try:
        return split_single_file([name for name in checkpoint.tensors if not is_marker(name)])
    except CheckpointError:
        return None


def _layout_of(checkpoint: Checkpoint, found: Recognised | None) -> str:
    if is_lora(checkpoint.tensors):
        return "LoRA"
    if is_single_file(checkpoint.tensors):
        return "LDM/SGM single file"
    return f"diffusers {found.family.main.title}" if found is not None else "tensors"


def _describe_pipeline(path: Path, index: dict[str, Any]) -> dict[str, Any]:
    scheduler = path / "scheduler" / "scheduler_config.json"
    tree: dict[str, Any] = {
        "pipeline": index.get("_class_name"),
        "components": sorted(
            name for name, entry in index.items() if isinstance(entry, list) and entry[0]
        ),
    }
    if scheduler.is_file():
        tree["scheduler"] = read_json(scheduler).get("_class_name")
    return tree
