"""Tensors moved into a new file without a change to their values, in a stream."""

from merge.layout.model import TensorCopy, TensorPiece, copies_of, piece_of
from merge.layout.write import write_tensor_copies

__all__ = ["TensorCopy", "TensorPiece", "copies_of", "piece_of", "write_tensor_copies"]
