"""Proof of a checkpoint: its files are the recorded ones, and it edits pictures."""

from merge.verify.folder import (
    Check,
    Edit,
    default_picture,
    read_edits,
    verify_files,
    verify_folder,
)

__all__ = [
    "Check",
    "Edit",
    "default_picture",
    "read_edits",
    "verify_files",
    "verify_folder",
]
