"""Tensors moved into a new file without a change to their values, in a stream."""

from merge.layout.fit import fit_copies
from merge.layout.model import TensorCopy, TensorPiece, copies_of, piece_of
from merge.layout.single_file import Relayout, plan_components, plan_single_file
from merge.layout.write import write_tensor_copies

__all__ = [
    "Relayout",
    "TensorCopy",
    "TensorPiece",
    "copies_of",
    "fit_copies",
    "piece_of",
    "plan_components",
    "plan_single_file",
    "write_tensor_copies",
]
