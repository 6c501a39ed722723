"""The zip archives that `torch.save` writes: where each record's bytes are in the file.

Nothing is ever decompressed. The records of such an archive are stored as they are, so each is a
range of the file. Two readers can disagree on a zip file in many ways (a name twice, other names
in local headers than in the directory, bytes in front, overlapping entries), and what one of them
calls clean another then loads. So an archive is taken only when it can be read in one way:
records fill the file from its first byte to the directory without a gap or overlap, the directory
ends where the end record begins, and both copies of every header agree.

Source: APPNOTE.TXT 6.3.10 (PKWARE), sections 4.3 to 4.5; what PyTorchStreamWriter and miniz write,
from the files of torch 2.13.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from merge.errors import CheckpointError
from merge.reader.byte_reader import ByteReader
from merge.reader.pickles.values import shown

# Of files that torch.save writes; what they are is decided by their bytes.
PICKLE_SUFFIXES = (".bin", ".ckpt", ".pt", ".pth")
MAGIC = b"PK\x03\x04"
# A published model has at most a few thousand records; these bound what a wrong count allocates.
MAX_DIRECTORY_BYTES = 32 * 1024 * 1024
MAX_NAME_BYTES = 1024
# Data begins at a multiple of 64 bytes.
_PADDING_BYTES = 128
_CHUNK_BYTES = 4 * 1024 * 1024

_END = struct.Struct("<4s4H2IH")
_END64 = struct.Struct("<4sQ2H2I4Q")
_LOCATOR64 = struct.Struct("<4sIQI")
_CENTRAL = struct.Struct("<4s6H3I5H2I")
_LOCAL = struct.Struct("<4s5H3I2H")
_DESCRIPTOR = struct.Struct("<4s3I")
_DESCRIPTOR64 = struct.Struct("<4sI2Q")
_U16, _U32 = 0xFFFF, 0xFFFFFFFF
_HAS_DESCRIPTOR, _IS_UTF8, _IS_ENCRYPTED = 0x08, 0x800, 0x2041
_ZIP64_FIELD = 0x0001
_RECORDS = re.compile(
    r"data\.pkl|data/[^/]+|version|byteorder|\.format_version|\.storage_alignment"
    r"|\.data/serialization_id|\.data/version"
)


@dataclass(frozen=True, slots=True)
class Record:
    """One file inside an archive.

    Attributes:
        name: Without the archive's top folder, e.g. `data/0`.
        start: First byte, counted from the start of the archive.
        size_bytes: Length.
        crc32: Checksum that the archive states for it.
    """

    name: str
    start: int
    size_bytes: int
    crc32: int


@dataclass(frozen=True, slots=True)
class _Entry:
    """One line of the archive's directory."""

    name: bytes
    flags: int
    method: int
    crc32: int
    packed_bytes: int
    size_bytes: int
    offset: int


def read_archive(source: ByteReader, file_bytes: int) -> Mapping[str, Record]:
    """Return the records of an archive by name.

    Args:
        source: The file.
        file_bytes: Its size.

    Raises:
        CheckpointError: the archive is damaged, ambiguous or nothing that `torch.save` writes.
    """
    directory_start, directory, count = _read_directory(source, file_bytes)
    entries = sorted(_parse_directory(directory, count), key=lambda entry: entry.offset)
    _refuse_programs(entries)
    for entry in entries:
        if entry.offset >= directory_start:
            break
        # With what ends the record before it, and the fields that pad a header.
        before = min(_DESCRIPTOR64.size, entry.offset)
        size = before + _LOCAL.size + len(entry.name) + _PADDING_BYTES
        source.will_need(entry.offset - before, min(size, directory_start - entry.offset + before))
    position = 0
    folder: str | None = None
    records: dict[str, Record] = {}
    for entry in entries:
        _check_stored(entry)
        if entry.offset != position:
            what = "overlaps what is before it" if entry.offset < position else "follows a gap"
            raise CheckpointError(f"record {_text(entry.name)} {what}, at byte {entry.offset}")
        start, position = _check_local(source, entry, directory_start)
        top, name = _split_name(entry.name)
        if folder is not None and top != folder:
            raise CheckpointError(f"records are in two folders, {shown(folder)} and {shown(top)}")
        folder = top
        if name in records:
            raise CheckpointError(f"there are two records {shown(name)}")
        records[name] = Record(name, start, entry.size_bytes, entry.crc32)
    if position != directory_start:
        raise CheckpointError(f"{directory_start - position} unknown bytes follow the last record")
    _check_names(records)
    _check_format(source, records)
    return records


def check_crc32(source: ByteReader, record: Record) -> None:
    """Read a record through a small buffer and compare its checksum.

    torch.load does not check it, so that a flipped bit loads without a word.

    Raises:
        CheckpointError: the bytes are not those that were written.
    """
    buffer = memoryview(bytearray(min(record.size_bytes, _CHUNK_BYTES) or 1))
    crc32 = 0
    for part in source.parts(record.start, record.size_bytes, buffer):
        crc32 = zlib.crc32(part, crc32)
    if crc32 != record.crc32:
        raise CheckpointError(
            f"record {shown(record.name)} is damaged: its CRC-32 is {crc32:08x}, and "
            f"{record.crc32:08x} was written",
            hint=(
                ""
                if record.crc32
                else "save it again with torch.serialization.set_crc32_options(True)"
            ),
        )


def _read_directory(source: ByteReader, file_bytes: int) -> tuple[int, bytes, int]:
    """Return where the directory is, its bytes, and how many entries it has."""
    end_at = file_bytes - _END.size
    fields = _END.unpack(source.read(end_at, _END.size)) if end_at >= 0 else (b"",)
    if fields[0] != b"PK\5\6":
        raise CheckpointError("the archive has no end record: it is truncated, or bytes follow it")
    _, disk, first_disk, here, count, size, start, comment = fields
    if comment:
        raise CheckpointError("the archive has a comment, which torch.save does not write")
    ends_at = end_at
    locator_at = end_at - _LOCATOR64.size
    locator = source.read(locator_at, _LOCATOR64.size) if locator_at >= 0 else b""
    if locator.startswith(b"PK\6\7"):
        ends_at = locator_at - _END64.size
        if _LOCATOR64.unpack(locator)[1:] != (0, ends_at, 1) or ends_at < 0:
            raise CheckpointError("the archive's zip64 locator points to a wrong place")
        wide = _END64.unpack(source.read(ends_at, _END64.size))
        if wide[:2] != (b"PK\6\6", _END64.size - 12) or wide[4:6] != (0, 0):
            raise CheckpointError("the archive's zip64 end record is damaged")
        narrow = (here, count, size, start)
        here, count, size, start = wide[6:]
        for short, long, limit in zip(narrow, wide[6:], (_U16, _U16, _U32, _U32), strict=True):
            if short not in (long, limit):
                raise CheckpointError("the archive's two end records disagree")
    if (disk, first_disk) != (0, 0) or here != count:
        raise CheckpointError("the archive is one part of several")
    if start + size != ends_at:
        raise CheckpointError("the archive's directory is not where its end record says")
    if size > MAX_DIRECTORY_BYTES or count * _CENTRAL.size > size:
        raise CheckpointError(f"the archive claims {count:,} records in {size:,} bytes")
    return start, source.read(start, size), count


def _parse_directory(data: bytes, count: int) -> list[_Entry]:
    entries = []
    position = 0
    for _ in range(count):
        if position + _CENTRAL.size > len(data):
            raise CheckpointError("the archive's directory is cut short")
        fields = _CENTRAL.unpack_from(data, position)
        flags, method, crc32, packed, size = fields[3], fields[4], *fields[7:10]
        name_bytes, extra_bytes, comment, disk, offset = *fields[10:14], fields[16]
        position += _CENTRAL.size
        name = data[position : position + name_bytes]
        position += name_bytes
        extra = data[position : position + extra_bytes]
        position += extra_bytes
        if fields[0] != b"PK\1\2" or position > len(data) or comment or disk:
            raise CheckpointError("the archive's directory is damaged")
        if not 0 < name_bytes <= MAX_NAME_BYTES:
            raise CheckpointError(f"a record's name has {name_bytes} bytes")
        wide = _zip64_values(extra, name)
        size, packed, offset = _widened((size, packed, offset), wide)
        if wide:
            raise CheckpointError(f"record {_text(name)} has zip64 values that nothing needs")
        entries.append(_Entry(name, flags, method, crc32, packed, size, offset))
    if position != len(data):
        raise CheckpointError("the archive's directory has bytes that belong to no record")
    return entries


def _check_stored(entry: _Entry) -> None:
    name = _text(entry.name)
    if entry.flags & _IS_ENCRYPTED:
        raise CheckpointError(f"record {name} is encrypted")
    if entry.method != 0 or entry.packed_bytes != entry.size_bytes:
        raise CheckpointError(
            f"record {name} is compressed, and torch.save does not compress",
            hint="load and save it again with torch, or convert it to safetensors",
        )
    if entry.flags & ~(_HAS_DESCRIPTOR | _IS_UTF8):
        raise CheckpointError(f"record {name} has unknown flags {entry.flags:#06x}")


def _check_local(source: ByteReader, entry: _Entry, limit: int) -> tuple[int, int]:
    """Compare an entry with the header in front of its data; return the data's start, and the end.

    Args:
        source: The archive.
        entry: From the directory.
        limit: Where the directory begins.
    """
    name = _text(entry.name)
    start = entry.offset + _LOCAL.size + len(entry.name)
    if start > limit:
        raise CheckpointError(f"record {name} lies outside of the archive")
    head = source.read(entry.offset, _LOCAL.size + len(entry.name))
    fields = _LOCAL.unpack_from(head)
    _, _, flags, method, _, _, crc32, packed, size, name_bytes, extra_bytes = fields
    same = (fields[0], flags, method, name_bytes) == (MAGIC, entry.flags, 0, len(entry.name))
    if not same or head[_LOCAL.size :] != entry.name:
        raise CheckpointError(f"record {name} is another one in the archive's directory")
    if start + extra_bytes + entry.size_bytes > limit:
        raise CheckpointError(f"record {name} lies outside of the archive")
    wide = _zip64_values(source.read(start, extra_bytes), entry.name)
    start += extra_bytes
    is_wide = bool(wide)
    size, packed = _widened((size, packed), wide)
    stated = (crc32, packed, size)
    expected = (entry.crc32, entry.size_bytes, entry.size_bytes)
    end = start + entry.size_bytes
    is_later = bool(flags & _HAS_DESCRIPTOR)
    if stated != expected and not (is_later and stated == (0, 0, 0)):
        raise CheckpointError(f"record {name} is of another size in the archive's directory")
    if is_later:
        end += _descriptor_bytes(source, entry, end, limit, is_wide)
    return start, end


def _descriptor_bytes(
    source: ByteReader, entry: _Entry, position: int, limit: int, is_wide: bool
) -> int:
    """Check what repeats checksum and size behind the data, and return its length."""
    layout = _DESCRIPTOR64 if is_wide else _DESCRIPTOR
    data = source.read(position, min(layout.size, limit - position))
    if entry.size_bytes == 0 and not data.startswith(b"PK\7\x08"):
        # miniz announces a descriptor for an empty record at times and writes none.
        return 0
    expected = (b"PK\7\x08", entry.crc32, entry.size_bytes, entry.size_bytes)
    if len(data) != layout.size or layout.unpack(data) != expected:
        raise CheckpointError(f"record {_text(entry.name)} has a wrong data descriptor")
    return layout.size


def _zip64_values(extra: bytes, name: bytes) -> list[int]:
    """Return the 64-bit values of a header's extra fields, checking that they are well formed."""
    values: list[int] | None = None
    position = 0
    while position < len(extra):
        if position + 4 > len(extra):
            raise CheckpointError(f"record {_text(name)} has damaged extra fields")
        kind, size = struct.unpack_from("<2H", extra, position)
        body = extra[position + 4 : position + 4 + size]
        position += 4 + size
        if position > len(extra):
            raise CheckpointError(f"record {_text(name)} has damaged extra fields")
        if kind == _ZIP64_FIELD:
            if values is not None or size % 8 or not 0 < size <= 24:
                raise CheckpointError(f"record {_text(name)} has damaged zip64 values")
            values = list(struct.unpack(f"<{size // 8}Q", body))
    return values or []


def _widened(fields: Sequence[int], wide: list[int]) -> list[int]:
    """Return a header's fields; those that are full have their values in the extra fields."""
    return [wide.pop(0) if field == _U32 and wide else field for field in fields]


def _split_name(name: bytes) -> tuple[str, str]:
    """Split a record's name into the archive's top folder and the rest."""
    try:
        text = name.decode("utf-8", "strict")
    except UnicodeDecodeError:
        raise CheckpointError(f"record {_text(name)} has a name that is not UTF-8") from None
    folder, _, rest = text.partition("/")
    parts = text.split("/")
    if not rest or "" in parts or ".." in parts or "\\" in text or not rest.isprintable():
        raise CheckpointError(f"record {shown(text)} is not inside the archive's folder")
    return folder, rest


def _refuse_programs(entries: Sequence[_Entry]) -> None:
    for entry in entries:
        name = entry.name.partition(b"/")[2]
        if name == b"constants.pkl" or name.startswith(b"code/"):
            raise CheckpointError(
                "it is a TorchScript program, not a state dict",
                hint="use the model's weights as .safetensors, not an exported program",
            )


def _check_names(records: Mapping[str, Record]) -> None:
    for name in records:
        if not _RECORDS.fullmatch(name):
            raise CheckpointError(f"record {shown(name)} is nothing that torch.save writes")
    if "data.pkl" not in records:
        raise CheckpointError("it is a zip archive without a data.pkl, so not from torch.save")


def _check_format(source: ByteReader, records: Mapping[str, Record]) -> None:
    # Written since torch 2.1 and 2.6.
    for name, expected in (("byteorder", b"little"), (".format_version", b"1")):
        record = records.get(name)
        if record is None:
            continue
        size = len(expected)
        if record.size_bytes != size or source.read(record.start, size) != expected:
            raise CheckpointError(f"its {name} is not {expected.decode()}, which alone is known")
        check_crc32(source, record)


def _text(name: bytes) -> str:
    return shown(name.decode("utf-8", "backslashreplace"))
