"""Folders into single LDM/SGM files and back, as plans of copies: no value changes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from merge.errors import CheckpointError
from merge.family.keys.pairs import FUSED, FUSED_PARTS, POINTWISE, TRANSPOSED, KeyPair
from merge.family.keys.single_file import join_single_file, split_single_file
from merge.reader.checkpoint import Checkpoint
from merge.writer.copies.model import TensorCopy, dtype_of, piece_of


@dataclass(frozen=True, slots=True)
class Relayout:
    """Tensors under the names of another layout.

    Attributes:
        copies: Component to its tensors; all of a single file are under an empty name.
        left_out: Key of the input to the reason why the output lacks it.
    """

    copies: Mapping[str, tuple[TensorCopy, ...]]
    left_out: Mapping[str, str]


def plan_single_file(parts: Mapping[str, Checkpoint]) -> Relayout:
    """Plan a single file from the components of a folder.

    Args:
        parts: `unet`, `vae`, `text_encoder` and, for SDXL, `text_encoder_2`.

    Raises:
        CheckpointError: a key has no name in a single file, or tensors do not fuse.
    """
    joined = join_single_file({name: part.tensors for name, part in parts.items()})
    copies: list[TensorCopy] = []
    for component, pairs in joined.pairs.items():
        part = parts[component]
        fused: dict[str, dict[int, KeyPair]] = {}
        for pair in pairs:
            if pair.form == FUSED:
                fused.setdefault(pair.single, {})[pair.part] = pair
            else:
                copies.append(_to_single(part, pair))
        copies += [_fuse(part, name, thirds) for name, thirds in fused.items()]
    return Relayout({"": tuple(copies)}, joined.left_out)


def plan_components(checkpoint: Checkpoint) -> Relayout:
    """Plan the components of a folder from a single file.

    Text encoders get transformers' names with `text_model.` in front.

    Raises:
        CheckpointError: a key is unknown, or a fused tensor has no three equal parts.
    """
    split = split_single_file(checkpoint.tensors)
    copies = {
        component: tuple(_to_folder(checkpoint, pair) for pair in pairs)
        for component, pairs in split.pairs.items()
    }
    return Relayout(copies, split.left_out)


def _to_single(part: Checkpoint, pair: KeyPair) -> TensorCopy:
    spec = part.tensors[pair.folder][1]
    shape = spec.shape
    if pair.form == POINTWISE and len(shape) == 2:
        shape = (*shape, 1, 1)
    elif pair.form == TRANSPOSED:
        shape = _turned(pair.folder, shape)
    pieces = (piece_of(part, pair.folder),)
    dtype = dtype_of(part, pair.folder)
    return TensorCopy(pair.single, dtype, shape, pieces, pair.form == TRANSPOSED)


def _fuse(part: Checkpoint, name: str, thirds: Mapping[int, KeyPair]) -> TensorCopy:
    keys = [thirds[index].folder for index in range(FUSED_PARTS)]
    specs = [part.tensors[key][1] for key in keys]
    first = specs[0]
    dtype = dtype_of(part, keys[0])
    for key, spec in zip(keys[1:], specs[1:], strict=True):
        if (dtype_of(part, key), spec.shape) != (dtype, first.shape):
            raise CheckpointError(
                f"{spec.name}: {spec.dtype} of shape {list(spec.shape)} cannot be fused with "
                f"{first.name}, {first.dtype} of shape {list(first.shape)}"
            )
    shape = (FUSED_PARTS * first.shape[0], *first.shape[1:])
    return TensorCopy(name, dtype, shape, tuple(piece_of(part, key) for key in keys))


def _to_folder(checkpoint: Checkpoint, pair: KeyPair) -> TensorCopy:
    shape = checkpoint.tensors[pair.single][1].shape
    dtype = dtype_of(checkpoint, pair.single)
    if pair.form == FUSED:
        rows, rest = divmod(shape[0] if shape else 0, FUSED_PARTS)
        if rest or not shape:
            raise CheckpointError(
                f"{pair.single}: shape {list(shape)} has no three equal parts for query, key, value"
            )
        piece = piece_of(checkpoint, pair.single, pair.part * rows, rows)
        return TensorCopy(pair.folder, dtype, (rows, *shape[1:]), (piece,))
    if pair.form == POINTWISE and len(shape) == 4 and shape[2:] == (1, 1):
        shape = shape[:2]
    elif pair.form == TRANSPOSED:
        shape = _turned(pair.single, shape)
    pieces = (piece_of(checkpoint, pair.single),)
    return TensorCopy(pair.folder, dtype, shape, pieces, pair.form == TRANSPOSED)


def _turned(key: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    if len(shape) != 2:
        raise CheckpointError(f"{key}: shape {list(shape)} is no matrix, and it has to be turned")
    return shape[1], shape[0]
