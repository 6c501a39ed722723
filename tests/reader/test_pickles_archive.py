"""The zip archives of torch.save: read in one way or not at all."""

from __future__ import annotations

import io
import struct
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from merge.errors import CheckpointError, IntegrityError, MergeError
from merge.reader.checkpoint import CheckpointFile, FileReader, read_header, verify_records
from tests.archives import (
    FOLDER,
    End,
    Entry,
    build_zip,
    checkpoint,
    entries_of,
    mapping,
    program,
    storage,
    tensor,
)

GOOD = program(mapping(w=tensor()))
DATA = bytes(range(24))


def read(folder: Path, data: bytes) -> CheckpointFile:
    path = folder / "model.bin"
    path.write_bytes(data)
    return read_header(path, allow_pickle=True)


def bytes_of(file: CheckpointFile, key: str) -> bytes:
    spec = next(spec for spec in file.header.tensors if spec.name == key)
    with FileReader(file.path, file.stamp) as reader:
        return reader.read(spec.start, spec.size_bytes)


def changed(index: int, **changes: object) -> bytes:
    """Return an archive with one record changed; the records are data.pkl, byteorder, data/0."""
    entries = entries_of(GOOD)
    for name, value in changes.items():
        setattr(entries[index], name, value)
    return build_zip(entries)


def with_more(*entries: Entry) -> bytes:
    return build_zip([*entries_of(GOOD), *entries])


# What is read ----------------------------------------------------------------------------------


def python_zip(compression: int = zipfile.ZIP_STORED, **options: bool) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for entry in entries_of(GOOD):
            with archive.open(str(entry.name), "w", **options) as file:
                file.write(entry.data)
    return buffer.getvalue()


VARIANTS: dict[str, Callable[[], bytes]] = {
    "as torch writes them": lambda: checkpoint(GOOD),
    "checksums in front": lambda: build_zip(
        [Entry(e.name, e.data, flags=0x800) for e in entries_of(GOOD)]
    ),
    "no flags": lambda: build_zip([Entry(e.name, e.data, flags=0) for e in entries_of(GOOD)]),
    "no zip64": lambda: build_zip(entries_of(GOOD), End(zip64=False)),
    "64-bit sizes behind the data": lambda: changed(2, wide=True),
    "64-bit sizes in front": lambda: changed(2, wide=True, flags=0x800),
    "alignment": lambda: changed(2, extra=b"FB" + struct.pack("<H", 4096) + b"Z" * 4096),
    "torch 1.6, without a byte order": lambda: build_zip(
        [entry for entry in entries_of(GOOD) if "byteorder" not in str(entry.name)]
    ),
    "torch 2.13's other records": lambda: with_more(
        Entry(f"{FOLDER}/.format_version", b"1"),
        Entry(f"{FOLDER}/.storage_alignment", b"64"),
        Entry(f"{FOLDER}/.data/serialization_id", b"0" * 40),
    ),
    "Python's zipfile": python_zip,
    "Python's zipfile with zip64": lambda: python_zip(force_zip64=True),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_are_read_as_torch_reads_them(tmp_path: Path, variant: str) -> None:
    file = read(tmp_path, VARIANTS[variant]())
    assert bytes_of(file, "w") == DATA
    verify_records(file.path, file.stamp)
    loaded = torch.load(file.path, weights_only=True)["w"]
    assert loaded.numpy().tobytes() == DATA


@pytest.mark.parametrize("start", [b"", b"\1" * 24])
def test_an_empty_record_with_and_without_a_descriptor(tmp_path: Path, start: bytes) -> None:
    from tests.archives import number, numbers

    empty = tensor(storage(key="1", count=0), number(0), numbers(0, 3), numbers(3, 1))
    pickle = program(mapping(w=tensor(), e=empty))
    data = build_zip(entries_of(pickle, {"0": DATA, "1": b""}))
    for archive in (data, _without_descriptor(data, f"{FOLDER}/data/1")):
        file = read(tmp_path, archive)
        assert bytes_of(file, "e") == b""
        verify_records(file.path, file.stamp)


def _without_descriptor(data: bytes, name: str) -> bytes:
    """Take out the descriptor of an empty record, as miniz does, and move what follows."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        infos = archive.infolist()
        contents = {info.filename: archive.read(info) for info in infos}
    entries = [Entry(info.filename, contents[info.filename]) for info in infos]
    position = next(i for i, entry in enumerate(entries) if entry.name == name)
    entries[position].flags = 0x800
    rebuilt = bytearray(build_zip(entries))
    with zipfile.ZipFile(io.BytesIO(bytes(rebuilt))) as archive:
        offset = archive.getinfo(name).header_offset
    rebuilt[offset + 6] |= 8
    central = rebuilt.rindex(name.encode()) - 46
    rebuilt[central + 8] |= 8
    return bytes(rebuilt)


def test_records_behind_four_gigabytes(tmp_path: Path) -> None:
    """A sparse file: one record of 5 GiB, whose sizes take 64 bits, and one behind it."""
    from tests.archives import number, numbers

    large = 5 * 2**30
    first = tensor(
        storage(key="0", count=large // 4), number(large // 4 - 1), numbers(1), numbers(1)
    )
    second = tensor(storage(key="1"))
    pickle = program(mapping(a=first, b=second))
    name0, name1 = (f"{FOLDER}/data/{key}".encode() for key in "01")
    path = tmp_path / "model.ckpt"
    head = struct.pack("<4s5H3I2H", b"PK\3\4", 0, 0x808, 0, 0, 0, 0, 0, 0, 0, 0)[:26]
    zip64 = struct.pack("<2H2Q", 1, 16, large, large)
    directory = b""

    def central(name: bytes, crc: int, size: int, offset: int) -> bytes:
        values = [value for value in (size, size, offset) if value >= 2**32 - 1]
        extra = struct.pack(f"<2H{len(values)}Q", 1, 8 * len(values), *values) if values else b""
        short, place = min(size, 2**32 - 1), min(offset, 2**32 - 1)
        line = struct.pack(
            "<4s6H3I5H2I",
            *(b"PK\1\2", 0, 0, 0x808, 0, 0, 0, crc, short, short, len(name), len(extra)),
            *(0, 0, 0, 0, place),
        )
        return line + name + extra

    with path.open("wb") as out:
        crc = zlib.crc32(pickle)
        name = f"{FOLDER}/data.pkl".encode()
        out.write(head + struct.pack("<2H", len(name), 0) + name + pickle)
        out.write(b"PK\7\x08" + struct.pack("<3I", crc, len(pickle), len(pickle)))
        directory += central(name, crc, len(pickle), 0)
        offset = out.tell()
        out.write(head + struct.pack("<2H", len(name0), len(zip64)) + name0 + zip64)
        out.seek(large - 4, 1)
        out.write(b"last")
        out.write(b"PK\7\x08" + struct.pack("<I2Q", 0, large, large))
        directory += central(name0, 0, large, offset)
        offset = out.tell()
        # miniz writes 64-bit sizes too when only the place takes 64 bits.
        extra = struct.pack("<2HQ", 1, 8, offset)
        out.write(head + struct.pack("<2H", len(name1), len(extra)) + name1 + extra + DATA)
        out.write(b"PK\7\x08" + struct.pack("<I2Q", zlib.crc32(DATA), 24, 24))
        directory += central(name1, zlib.crc32(DATA), 24, offset)
        offset = out.tell()
        name = f"{FOLDER}/version".encode()
        extra = struct.pack("<2HQ", 1, 8, offset)
        out.write(head + struct.pack("<2H", len(name), len(extra)) + name + extra + b"3\n")
        out.write(b"PK\7\x08" + struct.pack("<I2Q", zlib.crc32(b"3\n"), 2, 2))
        directory += central(name, zlib.crc32(b"3\n"), 2, offset)
        start = out.tell()
        out.write(directory)
        at = out.tell()
        size = len(directory)
        out.write(struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 0, 0, 0, 0, 4, 4, size, start))
        out.write(struct.pack("<4sIQI", b"PK\6\7", 0, at, 1))
        out.write(struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 4, 4, size, 2**32 - 1, 0))
    file = read_header(path, allow_pickle=True)
    assert bytes_of(file, "a") == b"last"
    assert bytes_of(file, "b") == DATA
    loaded = torch.load(path, weights_only=True, mmap=True)
    assert loaded["a"].numpy().tobytes() == b"last"
    assert loaded["b"].numpy().tobytes() == DATA


# What is refused -------------------------------------------------------------------------------


def deflated(data: bytes) -> bytes:
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    return packer.compress(data) + packer.flush()


def overlapping() -> bytes:
    """Two directory lines for the same bytes, quoted by a third record's data."""
    entries = entries_of(GOOD)
    entries[3].offset = build_zip(entries).index(f"{FOLDER}/data/0".encode()) - 30
    return build_zip(entries)


def quoted() -> bytes:
    """A record whose data holds the next record's header."""
    entries = entries_of(GOOD, {"0": DATA, "1": DATA})
    inner = build_zip([Entry(f"{FOLDER}/data/1", DATA, flags=0x800)])[: 30 + 14 + 24]
    entries[2] = Entry(f"{FOLDER}/data/0", inner, flags=0x800)
    place = build_zip(entries).index(inner)
    entries[3] = Entry(f"{FOLDER}/data/1", b"", flags=0x800, offset=place, size=24)
    return build_zip(entries)


def torchscript() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in [
            ("x/data.pkl", b""),
            ("x/code/__torch__.py", b"import os"),
            ("x/constants.pkl", b""),
        ]:
            archive.writestr(name, data)
    return buffer.getvalue()


ARCHIVES: dict[str, tuple[Callable[[], bytes], str]] = {
    "two data.pkl": (
        lambda: build_zip([*entries_of(GOOD), Entry(f"{FOLDER}/data.pkl", GOOD)]),
        r"two records data\.pkl",
    ),
    "two data.pkl, in two folders": (
        lambda: with_more(Entry("other/data.pkl", GOOD)),
        "in two folders, archive and other",
    ),
    "a data.pkl below": (
        lambda: with_more(Entry(f"{FOLDER}/x/data.pkl", GOOD)),
        r"record x/data\.pkl is nothing that torch\.save writes",
    ),
    "another name in front": (
        lambda: changed(0, local_name=f"{FOLDER}/data.pkx"),
        r"archive/data\.pkl is another one in the archive's directory",
    ),
    "a longer name in front": (
        lambda: changed(0, local_name=f"{FOLDER}/data.pkl2"),
        "is another one in the archive's directory",
    ),
    "a wrong checksum of data.pkl": (
        lambda: changed(0, crc32=1),
        r"data\.pkl is damaged: its CRC-32",
    ),
    "no checksums": (lambda: changed(0, crc32=0), r"data\.pkl is damaged"),
    "a wrong checksum of byteorder": (lambda: changed(1, crc32=1), "byteorder is damaged"),
    "another size in front": (
        lambda: changed(2, flags=0x800, local_size=8),
        "data/0 is of another size in the archive's directory",
    ),
    "another size behind": (lambda: changed(2, local_size=8), "data/0 has a wrong data descriptor"),
    "deflated": (lambda: python_zip(zipfile.ZIP_DEFLATED), "is compressed"),
    "a deflate bomb": (
        lambda: changed(2, method=8, data=deflated(b"\0" * 50_000_000), size=50_000_000),
        "data/0 is compressed",
    ),
    "another compressor": (lambda: changed(2, method=14), "data/0 is compressed"),
    "encrypted": (lambda: changed(0, flags=0x809), r"data\.pkl is encrypted"),
    "strongly encrypted": (lambda: changed(0, flags=0x848), r"data\.pkl is encrypted"),
    "an encrypted directory": (lambda: changed(0, flags=0x2808), r"data\.pkl is encrypted"),
    "patched data": (lambda: changed(0, flags=0x828), "unknown flags 0x0828"),
    "bytes in front": (
        lambda: build_zip(
            [Entry(f"{FOLDER}/data.pkl", GOOD, gap=b"PK\3\4MZ"), *entries_of(GOOD)[1:]]
        ),
        "follows a gap",
    ),
    "bytes between": (lambda: changed(2, gap=b"code"), "data/0 follows a gap"),
    "bytes after the records": (
        lambda: build_zip(entries_of(GOOD), End(directory_start=0)),
        "directory is not where its end record says",
    ),
    "bytes after the end": (lambda: checkpoint(GOOD) + b"x", "no end record"),
    "a comment": (lambda: build_zip(entries_of(GOOD), End(comment=b"PK")), "no end record"),
    "an empty comment record": (
        lambda: checkpoint(GOOD)[:-2] + b"\5\0",
        "has a comment",
    ),
    "overlapping records": (overlapping, "overlaps what is before it"),
    "quoted records": (quoted, "overlaps what is before it|follows a gap"),
    "an offset outside": (lambda: changed(2, offset=2**31), "overlaps|follows a gap"),
    "a size outside": (lambda: changed(2, size=2**31), "lies outside of the archive"),
    "a huge size": (lambda: changed(2, size=2**62, wide=True), "lies outside of the archive"),
    "a huge extra field": (
        lambda: changed(0, extra=b"FB\xff\xff"),
        r"data\.pkl has damaged extra fields",
    ),
    "half an extra field": (lambda: changed(0, extra=b"FB"), "damaged extra fields"),
    "empty zip64 values": (lambda: changed(2, extra=b"\1\0\0\0"), "damaged zip64 values"),
    "zip64 values twice": (
        lambda: changed(2, wide=True, extra=b"\1\0\x08\0" + b"\0" * 8),
        "damaged zip64 values",
    ),
    "a part of several": (
        lambda: build_zip(entries_of(GOOD), End(disk=1, zip64=False)),
        "one part of several",
    ),
    "a count too large": (
        lambda: build_zip(entries_of(GOOD), End(count=2**60)),
        "claims 1,152,921,504,606,846,976 records",
    ),
    "a count too small": (
        lambda: build_zip(entries_of(GOOD), End(count=3)),
        "bytes that belong to no record",
    ),
    "a count of one more": (lambda: build_zip(entries_of(GOOD), End(count=5)), "cut short"),
    "two counts": (
        lambda: build_zip(entries_of(GOOD), End(wide_count=3)),
        "two end records disagree",
    ),
    "a wrong locator": (
        lambda: build_zip(entries_of(GOOD), End(locator=4)),
        "locator points to a wrong place",
    ),
    "a huge directory": (
        lambda: build_zip(entries_of(GOOD), End(directory_bytes=2**40)),
        "directory is not where",
    ),
    "no data.pkl": (lambda: build_zip(entries_of(GOOD)[1:]), "without a data.pkl"),
    "an empty archive": (lambda: b"PK\3\4" + build_zip([]), "."),
    "TorchScript": (torchscript, "TorchScript program, not a state dict"),
    "big-endian": (lambda: changed(1, data=b"big"), "its byteorder is not little"),
    "big-endian, as long": (lambda: changed(1, data=b"biggie"), "its byteorder is not little"),
    "a newer format": (
        lambda: with_more(Entry(f"{FOLDER}/.format_version", b"2")),
        r"its \.format_version is not 1",
    ),
    "an unknown record": (
        lambda: with_more(Entry(f"{FOLDER}/run.py")),
        r"record run\.py is nothing",
    ),
    "a folder": (lambda: with_more(Entry(f"{FOLDER}/data/")), "not inside the archive's folder"),
    "no folder": (lambda: with_more(Entry("version2")), "not inside the archive's folder"),
    "a way out": (lambda: with_more(Entry(f"{FOLDER}/../evil")), "not inside the archive's folder"),
    "a way out of Windows": (
        lambda: with_more(Entry(f"{FOLDER}/data/..\\evil")),
        "not inside the archive's folder",
    ),
    "an absolute name": (
        lambda: with_more(Entry("/etc/passwd")),
        "not inside the archive's folder",
    ),
    "a control character": (
        lambda: with_more(Entry(f"{FOLDER}/data/1\x1b[2J")),
        "not inside the archive's folder",
    ),
    "a name with a zero": (lambda: changed(0, name=f"{FOLDER}/data.pkl\0.txt"), "not inside"),
    "a name that is not UTF-8": (lambda: with_more(Entry(b"archive/\xff")), "not UTF-8"),
    "a long name": (lambda: with_more(Entry("a/" + "b" * 2000)), "name has 2002 bytes"),
    "a huge data.pkl": (
        lambda: checkpoint(b"\0" * (16 * 1024 * 1024 + 1)),
        "more than the 16,777,216 allowed",
    ),
}


@pytest.mark.parametrize("name", ARCHIVES)
def test_archives_that_are_refused(tmp_path: Path, name: str) -> None:
    make, message = ARCHIVES[name]
    data = make()
    path = tmp_path / "model.bin"
    path.write_bytes(data)
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=message) as caught:
            read_header(path, allow_pickle=True)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert str(path) in caught.value.message
    assert "\x1b" not in str(caught.value)
    assert peak < 8 * 1024 * 1024


def test_spanned_archives_are_no_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no zip archive, as torch.save writes them"):
        read(tmp_path, b"PK\7\x08" + checkpoint(GOOD))


def test_the_real_torchscript(tmp_path: Path) -> None:
    # torch.jit is deprecated, and files of it will be around for long: this is one of them.
    buffer = io.BytesIO()
    with pytest.warns(DeprecationWarning, match="torch.jit"):
        torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)), buffer)
    with pytest.raises(CheckpointError, match="TorchScript program"):
        read(tmp_path, buffer.getvalue())


def test_scanners_see_another_file_than_torch(tmp_path: Path) -> None:
    """Why two records of one name are refused: readers disagree on which one counts."""
    other = program(mapping(v=tensor()))
    data = build_zip([*entries_of(GOOD), Entry(f"{FOLDER}/data.pkl", other)])
    path = tmp_path / "model.bin"
    path.write_bytes(data)
    with zipfile.ZipFile(path) as archive:
        assert archive.read(f"{FOLDER}/data.pkl") == other
    assert list(torch.load(path, weights_only=True)) == ["w"]
    with pytest.raises(CheckpointError, match="two records"):
        read_header(path, allow_pickle=True)


def test_every_flipped_bit_of_a_record_is_found(tmp_path: Path) -> None:
    data = checkpoint(GOOD)
    file = read(tmp_path, data)
    start = file.header.tensors[0].start
    for position in range(start, start + 24):
        flipped = bytearray(data)
        flipped[position] ^= 1 << (position % 8)
        damaged = read(tmp_path, bytes(flipped))
        with pytest.raises(CheckpointError, match=r"record data/0 is damaged: its CRC-32 is \w{8}"):
            verify_records(damaged.path, damaged.stamp)
        # torch does not look, so that nobody else would have said it.
        assert torch.load(damaged.path, weights_only=True)["w"].numpy().tobytes() != DATA


def test_checksums_take_little_memory(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    torch.save({"w": torch.ones(4_000_000)}, path)
    file = read_header(path, allow_pickle=True)
    tracemalloc.start()
    try:
        verify_records(path, file.stamp)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 5 * 1024 * 1024 < path.stat().st_size


def test_files_without_checksums_have_none_to_verify(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"\2\0\0\0\0\0\0\0{}")
    verify_records(path, read_header(path).stamp)


def test_a_file_that_changed_is_not_verified(tmp_path: Path) -> None:
    file = read(tmp_path, checkpoint(GOOD))
    file.path.write_bytes(checkpoint(GOOD) * 2)
    with pytest.raises(IntegrityError, match="changed while it was in use"):
        verify_records(file.path, file.stamp)


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    data = checkpoint(GOOD)
    path = tmp_path / "model.bin"
    for length in range(len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(CheckpointError):
            read_header(path, allow_pickle=True)


def test_every_changed_byte_is_refused_or_changes_nothing(tmp_path: Path) -> None:
    """Each byte of an archive once: an error of ours, or the same tensors."""
    data = checkpoint(GOOD)
    same = 0
    for position in range(len(data)):
        mutated = bytearray(data)
        mutated[position] ^= 0xFF
        try:
            file = read(tmp_path, bytes(mutated))
            verify_records(file.path, file.stamp)
        except MergeError:
            continue
        same += 1
        assert [(s.name, s.dtype, s.shape) for s in file.header.tensors] == [("w", "F32", (2, 3))]
        assert bytes_of(file, "w") == DATA
    # Times, versions and attributes of the headers mean nothing.
    assert 0 < same < 200
