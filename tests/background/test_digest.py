from __future__ import annotations

import hashlib
import os
import threading
from pathlib import Path

import pytest

from merge.background.digest_process import DigestProcess
from merge.background.file_digest import FileDigest
from merge.errors import SourceError, SourceNotFoundError


def write_files(folder: Path) -> list[Path]:
    paths = []
    for index, size in enumerate([0, 1, 256 * 1024, 3_000_001, 70_000_000]):
        path = folder / f"file {index}\u00e9"
        path.write_bytes(os.urandom(1000) * (size // 1000) + b"x" * (size % 1000))
        paths.append(path)
    return paths


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_files_are_hashed_in_order_with_progress(tmp_path: Path) -> None:
    paths = write_files(tmp_path)
    counts: list[int] = []
    process = DigestProcess(paths)
    try:
        assert process.result(counts.append) == [sha256(path) for path in paths]
    finally:
        process.close()
    assert sum(counts) == sum(path.stat().st_size for path in paths)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    process = DigestProcess([*write_files(tmp_path), tmp_path / "nothing"])
    with pytest.raises(SourceNotFoundError, match=r"nothing: No such file or directory"):
        process.result(lambda count: None)
    process.close()


def test_a_killed_process_gives_no_digest(tmp_path: Path) -> None:
    process = DigestProcess(write_files(tmp_path))
    process._child.kill()
    with pytest.raises(SourceError, match="was killed"):
        process.result(lambda count: None)
    process.close()
    process.close()


@pytest.mark.parametrize("size", [8, 5000, 3 * 1024 * 1024 + 17])
def test_a_file_is_hashed_while_it_is_written(size: int) -> None:
    header, data = b"headers!", os.urandom(size)
    content = bytearray(len(header)) + data
    follower = FileDigest(
        lambda buffer, offset: buffer.__setitem__(
            slice(None), bytes(content[offset : offset + len(buffer)])
        ),
        header,
        len(content),
    )
    follower.start()
    for position in (*range(8, len(content), 1 + size // 7), len(content)):
        follower.advance(position)
    assert follower.result() == hashlib.sha256(header + data).hexdigest()


def test_following_can_be_given_up_and_reports_failures() -> None:
    before = threading.active_count()
    follower = FileDigest(lambda buffer, offset: None, b"headers!", 1000)
    follower.start()
    follower.stop()
    assert threading.active_count() == before

    def fail(buffer: memoryview, offset: int) -> None:
        raise OSError("gone")

    follower = FileDigest(fail, b"headers!", 1000)
    follower.start()
    follower.advance(1000)
    with pytest.raises(OSError, match="gone"):
        follower.result()
