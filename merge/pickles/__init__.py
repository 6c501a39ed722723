"""Checkpoints that `torch.save` wrote, read without running anything of them.

`.bin`, `.ckpt`, `.pt` and `.pth` files are zip archives of raw records and one pickle, a program
that says which record is which tensor. `archive` finds the records, `machine` reads the program as
a description, `table` turns it into the same table as a safetensors header. Neither torch nor
Python's pickle takes part.
"""

from merge.pickles.archive import MAGIC, Source, check_crc32, read_archive
from merge.pickles.legacy import HEAD_BYTES, describe_foreign
from merge.pickles.table import PickleTable, read_table

# Of files that torch.save writes; what they are is decided by their bytes.
PICKLE_SUFFIXES = (".bin", ".ckpt", ".pt", ".pth")

__all__ = [
    "HEAD_BYTES",
    "MAGIC",
    "PICKLE_SUFFIXES",
    "PickleTable",
    "Source",
    "check_crc32",
    "describe_foreign",
    "read_archive",
    "read_table",
]
