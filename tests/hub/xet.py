"""The files in the client's own store for content in chunks.

A commit names a large file by its SHA-256, the store by the hash of its chunks; the index files of
the store have both.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

_HEADER = 48
_RECORD = 48
_END = b"\xff" * 32
_HAS_VERIFICATION = 1 << 31
_HAS_SHA256 = 1 << 30

# Arguments: a store, and as JSON a list of the file's hash, its size and where it goes.
_REBUILD = """
import json, sys, time
import hf_xet

session = hf_xet.XetSession()
with session.new_file_download_group(
    endpoint=f"local://{sys.argv[1]}", token="token", token_expiry_unix_secs=int(time.time()) + 3600
) as group:
    for digest, size, path in json.loads(sys.argv[2]):
        group.start_download_file(hf_xet.XetFileInfo(digest, size), path)
"""


class _Stored(NamedTuple):
    sha256: str
    digest: str
    size: int


def rebuild(store: Path, wanted: set[str], folder: Path) -> list[Path]:
    """Write files of a store to a folder.

    Args:
        store: A folder that a client uploaded to as `local://`.
        wanted: The SHA-256 of files.
        folder: Gets those files that the store has, named by their SHA-256.

    Returns:
        The files.

    Raises:
        ValueError: The store cannot be read, or a file came out with another digest.
    """
    indices = sorted((store / "xet/xorbs/shards").glob("*.mdb"))
    found = {file.sha256: file for index in indices for file in _files(index.read_bytes())}
    asked = [found[sha256] for sha256 in sorted(wanted & found.keys())]
    if not asked:
        return []
    with tempfile.TemporaryDirectory() as scratch:
        # Its database is locked as long as the client lives, which a copy of it is not.
        mirror = Path(scratch, "store")
        shutil.copytree(store / "xet/xorbs", mirror / "xet/xorbs")
        orders = [(file.digest, file.size, f"{scratch}/{file.sha256}") for file in asked]
        # In a process of its own, since the library keeps threads and writes logs.
        child = subprocess.run(
            [sys.executable, "-c", _REBUILD, str(mirror), json.dumps(orders)],
            capture_output=True,
            text=True,
            env={**os.environ, "HF_HOME": scratch, "HOME": scratch},
        )
        if child.returncode:
            raise ValueError(f"the store cannot be read: {child.stderr}")
        paths = []
        for file in asked:
            path = Path(scratch, file.sha256)
            if hashlib.sha256(path.read_bytes()).hexdigest() != file.sha256:
                raise ValueError(f"{file.sha256} came out of the store with another digest")
            paths.append(Path(shutil.move(path, folder / file.sha256)))
    return paths


def _files(index: bytes) -> Iterator[_Stored]:
    """Read which files an index file describes."""
    position = _HEADER
    while (digest := index[position : position + 32]) != _END:
        flags, count = struct.unpack_from("<II", index, position + 32)
        records = range(position + _RECORD, position + _RECORD * (count + 1), _RECORD)
        # Of each run of chunks: where they are (32 bytes), flags, the number of bytes, a range.
        size = sum(struct.unpack_from("<I", index, record + 36)[0] for record in records)
        position += _RECORD * (count + 1)
        if flags & _HAS_VERIFICATION:
            position += _RECORD * count
        if flags & _HAS_SHA256:
            yield _Stored(_hex(index[position : position + 32]), _hex(digest), size)
            position += _RECORD


def _hex(digest: bytes) -> str:
    """Write a digest as the library does: as four little-endian numbers."""
    return "".join(f"{number:016x}" for number in struct.unpack("<4Q", digest))
