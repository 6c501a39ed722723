"""The components that an export takes over from the target, held against their configs."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from merge.errors import CheckpointError
from merge.plan.compat import WHOLE_HINT
from merge.plan.model import LeftOut
from merge.plan.opening import Opened, left_out_of, read_weights
from merge.reader.checkpoint import Checkpoint
from merge.reader.intake import Intake
from merge.sources.model import ComponentFiles
from merge.sources.select import converted_name
from merge.writer.copies.fit import fit_copies
from merge.writer.copies.model import TensorCopy, copies_of


@dataclass
class Copied:
    """What the weights of components that are not merged become.

    Attributes:
        relaid: Weight file of the export to its tensors, for components that are written anew:
            pickles are never copied, and no loader multiplies by a scale.
        left_out: What their files hold besides tensors.
        warnings: What a user should know of their shapes and keys.
    """

    relaid: dict[str, tuple[TensorCopy, ...]] = field(default_factory=dict)
    left_out: list[LeftOut] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def read_copied(target: Opened, merged: Collection[str]) -> Copied:
    """Read the headers of the components that an export takes over.

    Args:
        target: The model whose components are exported.
        merged: Components whose weights are written by the merge.

    Raises:
        CheckpointError: a file breaks its format or a component is not what its config asks for;
            better now than after the merge.
    """
    found = Copied()
    problems: list[str] = []
    model = target.model
    for part in model.pipeline.components if model.pipeline is not None else ():
        if not part.weights or part.name in merged:
            continue
        known = target.parts.get(part.name)
        intake = Intake(known) if known is not None else read_weights(model, part.weights)
        copies, fit = fit_copies(
            part.name, copies_of(intake.checkpoint), part.config, part.class_name
        )
        if known is None:
            # What could be merged was held against its config when it was opened.
            problems += fit.problems
            found.warnings += fit.notes
        is_pickle = bool(part.converted_name)
        if is_pickle or fit.shapes or not _is_as_stored(intake.checkpoint):
            found.relaid[_export_name(part)] = copies
            found.left_out += left_out_of(model, intake)
    if problems:
        raise CheckpointError(
            "\n  ".join([f"{target.title} is not whole, or not of its configs:", *problems]),
            hint=WHOLE_HINT,
        )
    return found


def _is_as_stored(checkpoint: Checkpoint) -> bool:
    """Return False where a byte for byte copy would mean something else to a loader."""
    stored = {spec for file in checkpoint.files for spec in file.header.tensors}
    tensors = checkpoint.tensors.items()
    return not checkpoint.scales and all(k == s.name and s in stored for k, (_, s) in tensors)


def _export_name(part: ComponentFiles) -> str:
    if part.converted_name:
        return part.converted_name
    exports = dict(zip((file.name for file in part.files), part.export_names, strict=True))
    return f"{part.name}/{converted_name(exports[part.weights[0].name].rpartition('/')[2], '')}"
