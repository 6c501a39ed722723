"""Zip archives and pickles written byte by byte, so that every rule can be broken alone."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

FOLDER = "archive"


@dataclass
class Entry:
    """One record, with what its two headers say of it.

    Attributes:
        name: With the top folder.
        data: Its bytes.
        local_name: Name in front of the data; None: the same.
        flags: General purpose bits; 8 puts checksum and size behind the data, as torch does.
        method: 0 stored, 8 deflated.
        crc32: None: the right one.
        size: In the directory; None: the right one.
        local_size: In front of the data; None: as `size`.
        extra: Extra fields of the local header.
        gap: Bytes in front of the local header.
        offset: In the directory; None: where it is.
        wide: 64-bit descriptor and zip64 fields.
    """

    name: str | bytes
    data: bytes = b""
    local_name: str | bytes | None = None
    flags: int = 0x808
    method: int = 0
    crc32: int | None = None
    size: int | None = None
    local_size: int | None = None
    extra: bytes = b""
    gap: bytes = b""
    offset: int | None = None
    wide: bool = False


@dataclass
class End:
    """What the end records say, where it is not what is there."""

    count: int | None = None
    directory_bytes: int | None = None
    directory_start: int | None = None
    disk: int = 0
    comment: bytes = b""
    zip64: bool = True
    wide_count: int | None = None
    locator: int | None = None


def build_zip(entries: Sequence[Entry], end: End | None = None) -> bytes:
    """Return an archive as torch lays it out, with the entries' lies in it."""
    end = end or End()
    body, directory = bytearray(), bytearray()
    for entry in entries:
        body += entry.gap
        offset = len(body) if entry.offset is None else entry.offset
        name, local = _bytes(entry.name), _bytes(entry.local_name or entry.name)
        crc = zlib.crc32(entry.data) if entry.crc32 is None else entry.crc32
        size = len(entry.data) if entry.size is None else entry.size
        stated = size if entry.local_size is None else entry.local_size
        later = bool(entry.flags & 8)
        extra = entry.extra
        if entry.wide:
            extra = struct.pack("<2H2Q", 1, 16, stated, stated) + extra
        inner = (0, 0, 0) if later else (crc, *([0xFFFFFFFF] * 2 if entry.wide else [stated] * 2))
        body += struct.pack(
            "<4s5H3I2H",
            b"PK\3\4",
            0,
            entry.flags,
            entry.method,
            0,
            0,
            *inner,
            len(local),
            len(extra),
        )
        body += local + extra + entry.data
        if later:
            body += b"PK\7\x08" + struct.pack("<I2Q" if entry.wide else "<3I", crc, stated, stated)
        wide = b"" if size < 2**32 else struct.pack("<2H2Q", 1, 16, size, size)
        short = size if size < 2**32 else 0xFFFFFFFF
        directory += struct.pack(
            "<4s6H3I5H2I",
            *(b"PK\1\2", 0, 0, entry.flags, entry.method, 0, 0, crc, short, short),
            *(len(name), len(wide), 0, 0, 0, 0, offset),
        )
        directory += name + wide
    start = len(body) if end.directory_start is None else end.directory_start
    size = len(directory) if end.directory_bytes is None else end.directory_bytes
    count = len(entries) if end.count is None else end.count
    tail = b""
    if end.zip64:
        wide_count = count if end.wide_count is None else end.wide_count
        at = len(body) + len(directory) if end.locator is None else end.locator
        tail += struct.pack(
            "<4sQ2H2I4Q", b"PK\6\6", 44, 0, 0, 0, 0, wide_count, wide_count, size, start
        )
        tail += struct.pack("<4sIQI", b"PK\6\7", 0, at, 1)
    short = [min(value, limit) for value, limit in ((count, 0xFFFF), (size, 2**32 - 1))]
    tail += struct.pack(
        "<4s4H2IH",
        *(b"PK\5\6", end.disk, end.disk, short[0], short[0], short[1]),
        *(min(start, 2**32 - 1), len(end.comment)),
    )
    return bytes(body) + bytes(directory) + tail + end.comment


def entries_of(pickle: bytes, storages: Mapping[str, bytes] | None = None) -> list[Entry]:
    """Return the records that torch.save would write."""
    storages = {"0": bytes(range(24))} if storages is None else storages
    return [
        Entry(f"{FOLDER}/data.pkl", pickle, extra=b"FB\4\0ZZZZ"),
        Entry(f"{FOLDER}/byteorder", b"little"),
        *(Entry(f"{FOLDER}/data/{key}", data) for key, data in storages.items()),
        Entry(f"{FOLDER}/version", b"3\n"),
    ]


def checkpoint(pickle: bytes, storages: Mapping[str, bytes] | None = None) -> bytes:
    """Return a whole checkpoint around a pickle."""
    return build_zip(entries_of(pickle, storages))


# Pickles ---------------------------------------------------------------------------------------


def text(value: str) -> bytes:
    """Return the opcode for a string."""
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def name(module: str, attribute: str) -> bytes:
    """Return the opcode for a class or function."""
    return f"c{module}\n{attribute}\n".encode()


def number(value: int) -> bytes:
    """Return the opcode for an integer."""
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def sequence(*values: bytes) -> bytes:
    """Return the opcodes for a tuple."""
    return b"(" + b"".join(values) + b"t"


def numbers(*values: int) -> bytes:
    """Return the opcodes for a tuple of integers."""
    return sequence(*map(number, values))


def mapping(**items: bytes) -> bytes:
    """Return the opcodes for a dictionary."""
    return b"}(" + b"".join(text(key) + value for key, value in items.items()) + b"u"


ORDERED = name("collections", "OrderedDict") + b")R"


def storage(kind: bytes | None = None, key: str = "0", count: int = 6, place: str = "cpu") -> bytes:
    """Return the opcodes for a reference to a record."""
    kind = name("torch", "FloatStorage") if kind is None else kind
    return sequence(text("storage"), kind, text(key), text(place), number(count)) + b"Q"


def tensor(
    where: bytes | None = None,
    offset: bytes | None = None,
    shape: bytes | None = None,
    stride: bytes | None = None,
    hooks: bytes = ORDERED,
    *,
    function: str = "_rebuild_tensor_v2",
    more: Sequence[bytes] = (),
) -> bytes:
    """Return the opcodes for a tensor; without arguments a good one of `(2, 3)`."""
    arguments = (
        storage() if where is None else where,
        number(0) if offset is None else offset,
        numbers(2, 3) if shape is None else shape,
        numbers(3, 1) if stride is None else stride,
    )
    if function != "_rebuild_tensor":
        arguments = (*arguments, b"\x89", hooks, *more)
    return name("torch._utils", function) + sequence(*arguments) + b"R"


def program(value: bytes, protocol: int = 2) -> bytes:
    """Return a whole pickle of one value."""
    return bytes([0x80, protocol]) + value + b"."


def _bytes(value: str | bytes) -> bytes:
    return value if isinstance(value, bytes) else value.encode()
