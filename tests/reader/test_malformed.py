"""Every malformed file of the suite through the front door: refused by rule and file, for little.

The cases themselves are in the tests of their formats. Here all of them are read as a run reads
them, and what that costs is counted: bytes read from the disk, and memory.
"""

from __future__ import annotations

import json
import os
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from merge.errors import CheckpointError, MergeError
from merge.header.encode import encode_header
from merge.reader.checkpoint import FileReader, read_checkpoint, read_header
from tests.archives import checkpoint, mapping, program
from tests.header import test_header
from tests.reader import test_pickles, test_pickles_archive, test_pickles_attacks

MEMORY_BYTES = 50 * 2**20
# A header is looked at in three pieces: what the file is, its length, its text.
AROUND_BYTES = 4096
TERABYTE = 2**40


def _cases() -> Iterator[tuple[str, str, bytes]]:
    for name, header, count, _ in (*test_header.BROKEN, *test_header.STRICTER):
        yield f"header: {name}", ".safetensors", test_header.file_of(header, bytes(count))
    lengths = test_header.test_lengths_that_cannot_be_true.pytestmark[0]
    for content, match in lengths.args[1]:
        yield f"length: {match}", ".safetensors", content
    for name, (content, _) in test_header.FAKES.items():
        yield f"not what it says: {name}", ".safetensors", content
    for name, (content, _) in test_pickles.FOREIGN.items():
        yield f"not what it says: {name}", ".ckpt", content
    for name, (make, _) in test_pickles_archive.ARCHIVES.items():
        yield f"zip: {name}", ".bin", make()
    for name, (value, _) in test_pickles.TENSORS.items():
        yield f"tensor in a pickle: {name}", ".bin", checkpoint(program(mapping(w=value)))
    for name, (value, _) in test_pickles.WHOLES.items():
        yield f"pickle: {name}", ".bin", checkpoint(program(value))
    for name, (value, _) in test_pickles_attacks.BOMBS.items():
        yield f"bomb: {name}", ".bin", checkpoint(program(value))


CASES = {name: (suffix, content) for name, suffix, content in _cases()}


class Meter:
    """Counts what reading costs."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.read_bytes = 0
        read_into = FileReader.read_into

        def counted(reader: FileReader, buffer: memoryview, offset: int) -> None:
            self.read_bytes += len(buffer)
            read_into(reader, buffer, offset)

        patch.setattr(FileReader, "read_into", counted)

    def refused(self, read: Callable[[], Any]) -> MergeError:
        """Return how a call refuses its input; too much memory is an error."""
        tracemalloc.start()
        try:
            with pytest.raises(MergeError) as caught:
                read()
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < MEMORY_BYTES
        return caught.value


def test_there_are_enough_cases() -> None:
    assert len(CASES) >= 200


@pytest.mark.parametrize("name", CASES)
def test_a_malformed_file_is_refused_by_rule_and_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    suffix, content = CASES[name]
    path = tmp_path / f"model{suffix}"
    path.write_bytes(content)
    allow_pickle = not name.startswith("not what it says") or suffix == ".ckpt"
    meter = Meter(monkeypatch)
    error = meter.refused(lambda: read_checkpoint([path], allow_pickle=allow_pickle))
    assert isinstance(error, CheckpointError)
    assert error.message.startswith(f"{path}: ")
    assert len(error.message) > len(f"{path}: ") + 10
    assert error.hint
    assert all(character.isprintable() for character in error.message)
    # A record of an archive may be looked at twice: as what it is, and in its place.
    assert meter.read_bytes <= 2 * len(content) + AROUND_BYTES


# Files of a terabyte: what they claim is never read, nor is memory taken for it.
HALF = TERABYTE // 2
HUGE: dict[str, tuple[dict[str, tuple[int, int]], str]] = {
    "an overlap": ({"a": (0, HALF), "b": (HALF - 2, TERABYTE)}, "b: its data overlaps"),
    "a hole": ({"a": (0, HALF), "b": (HALF + 2, TERABYTE)}, "b: 2 unused bytes before it"),
    "a byte too many": ({"a": (0, TERABYTE - 2)}, "2 bytes follow the last tensor"),
    "a byte too few": ({"a": (0, TERABYTE), "b": (TERABYTE, TERABYTE + 2)}, "is truncated"),
}


@pytest.mark.parametrize("name", HUGE)
def test_what_a_huge_file_claims_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    tensors, rule = HUGE[name]
    header = json.dumps(
        {
            key: {"dtype": "F16", "shape": [(end - start) // 2], "data_offsets": [start, end]}
            for key, (start, end) in tensors.items()
        }
    ).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(test_header.file_of(header))
    os.truncate(path, path.stat().st_size + TERABYTE)
    meter = Meter(monkeypatch)
    assert rule in meter.refused(lambda: read_header(path)).message
    assert meter.read_bytes <= len(header) + AROUND_BYTES


def test_a_file_that_was_made_and_not_yet_filled_is_said_to_be_unfinished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.safetensors"
    path.touch()
    os.truncate(path, TERABYTE)
    meter = Meter(monkeypatch)
    assert "an unfinished download" in meter.refused(lambda: read_header(path)).message
    assert meter.read_bytes <= AROUND_BYTES


def test_every_part_of_a_download_is_refused(tmp_path: Path) -> None:
    """A file that grows while it is downloaded opens only once it is whole."""
    header, parsed = encode_header({"a": ("F16", (500,)), "b": ("F32", (7, 9))}, {"format": "pt"})
    content = header + bytes(range(256)) * 8
    content = content[: parsed.file_bytes]
    path = tmp_path / "model.safetensors"
    with path.open("wb", buffering=0) as file:
        for position in range(0, len(content), 7):
            file.write(content[position : position + 7])
            if file.tell() < len(content):
                with pytest.raises(CheckpointError, match="only|claims|truncated"):
                    read_header(path)
    assert len(read_header(path).header.tensors) == 2
