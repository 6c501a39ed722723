"""Writing: headers last, and files and folders that appear whole or not at all."""

from merge.writer.file import OutputFile, write_atomically
from merge.writer.folder import OutputFolder
from merge.writer.journal import Journal, JournalMark
from merge.writer.overlap import refuse_overlap
from merge.writer.tensors import TensorFileWriter

__all__ = [
    "Journal",
    "JournalMark",
    "OutputFile",
    "OutputFolder",
    "TensorFileWriter",
    "refuse_overlap",
    "write_atomically",
]
