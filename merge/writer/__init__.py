"""Writing: one tensor file with its header last, and a folder that appears whole or not at all."""

from merge.writer.folder import OutputFolder
from merge.writer.tensors import TensorFileWriter

__all__ = ["OutputFolder", "TensorFileWriter"]
