"""Proof of a checkpoint: its files are the recorded ones, and it edits pictures."""

from merge.verify.drawings import default_picture
from merge.verify.edits import DEFAULT_EDITS, read_edits
from merge.verify.files import verify_files
from merge.verify.folder import verify_folder
from merge.verify.model import Check, CompareOptions, Edit

__all__ = [
    "DEFAULT_EDITS",
    "Check",
    "CompareOptions",
    "Edit",
    "default_picture",
    "read_edits",
    "verify_files",
    "verify_folder",
]
