"""The lock: a recipe after overrides with every input file by commit, size and SHA-256.

It is the same bytes for the same inputs, recipe and tool version: no date, device, machine path or
user name is in it. Local models appear by the name of their file or folder, so a lock finds them
again by looking, and trusts only their digests.
"""

from merge.lock.find import load_recipe_or_lock, lock_for, lock_path_of, open_lock
from merge.lock.model import Lock
from merge.lock.read import is_lock, load_lock
from merge.lock.write import build_lock

__all__ = [
    "Lock",
    "build_lock",
    "is_lock",
    "load_lock",
    "load_recipe_or_lock",
    "lock_for",
    "lock_path_of",
    "open_lock",
]
