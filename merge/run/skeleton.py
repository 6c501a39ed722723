"""An output without its merged weights, for models that never leave the memory."""

from __future__ import annotations

from pathlib import Path

from merge.errors import SourceNotFoundError
from merge.run.prepare import PreparedRun
from merge.writer.copies.write import write_tensor_copies


def write_skeleton(prepared: PreparedRun, folder: Path) -> None:
    """Make what an output holds beside its merged weights: configs, tokenizers, other components.

    Files that an output has copies of are links here, so that this takes no time and no space.

    Args:
        prepared: Whose target is a whole pipeline.
        folder: An empty one.

    Raises:
        SourceNotFoundError: the target is one network, which cannot edit by itself.
        OutputError: the folder cannot be written.
    """
    if prepared.sources.target.pipeline is None:
        family = prepared.plan.family
        raise SourceNotFoundError(
            f"the target is a {family.main.title} without a pipeline, which cannot edit",
            hint="name a whole pipeline folder as models.target, or give a file its config",
        )
    for name, file in prepared.export.copies.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(file.path.resolve())
    for name, data in prepared.export.written.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    for name, copies in prepared.plan.relaid.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_tensor_copies(path, copies, {"format": "pt"})
