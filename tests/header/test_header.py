from __future__ import annotations

import copy
import io
import json
import pickle
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize
from safetensors.torch import save, save_file

from merge.errors import CheckpointError
from merge.header.dtypes import DTYPE_BITS, DTYPE_CODES, DTYPE_WORDS, element_count, tensor_bytes
from merge.header.encode import encode_header, file_order
from merge.header.model import Header, TensorSpec
from merge.header.parse import MAX_HEADER_BYTES, parse_header, parse_length, sniff

# The reference library's words for the dtypes of its `serialize`.
REFERENCE_WORDS = {
    "BOOL": "bool",
    "F4": "float4_e2m1fn_x2",
    "U8": "uint8",
    "I8": "int8",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "I16": "int16",
    "U16": "uint16",
    "F16": "float16",
    "BF16": "bfloat16",
    "I32": "int32",
    "U32": "uint32",
    "F32": "float32",
    "C64": "complex64",
    "F64": "float64",
    "I64": "int64",
    "U64": "uint64",
}
TORCH_DTYPES = {code: getattr(torch, word) for code, word in REFERENCE_WORDS.items()}
Layout = dict[str, tuple[str, tuple[int, ...]]]


def file_of(header: bytes, data: bytes = b"") -> bytes:
    return len(header).to_bytes(8, "little") + header + data


def parse_file(content: bytes) -> Header:
    length = parse_length(content[:64], len(content))
    return parse_header(content[8 : 8 + length], len(content))


def layout_of(header: Header) -> Layout:
    return {spec.name: (spec.dtype, spec.shape) for spec in header.tensors}


def entry(dtype: object = "F32", shape: object = (1,), offsets: object = (0, 4)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def dump(tree: object) -> bytes:
    return json.dumps(tree).encode()


# -------------------------------------------------------------------------------------- writing


def test_the_bytes_of_a_header_written_out() -> None:
    text = (
        b'{"__metadata__":{"a":"1","z":"2"},'
        b'"b":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
        b'"a":{"dtype":"F16","shape":[1,3],"data_offsets":[8,14]},'
        b'"c":{"dtype":"F16","shape":[],"data_offsets":[14,16]}}'
    )
    assert len(text) == 197
    written, header = encode_header(
        {"a": ("F16", (1, 3)), "b": ("F32", [2]), "c": ("F16", ())}, {"z": "2", "a": "1"}
    )
    # Three spaces bring 8 + 197 to a multiple of eight.
    assert written == b"\xc8\x00\x00\x00\x00\x00\x00\x00" + text + b"   "
    assert header == Header(
        tensors=(
            TensorSpec("b", "F32", (2,), 208, 8),
            TensorSpec("a", "F16", (1, 3), 216, 6),
            TensorSpec("c", "F16", (), 222, 2),
        ),
        metadata={"a": "1", "z": "2"},
        data_start=208,
        file_bytes=224,
    )


def test_an_empty_header_is_padded_and_has_no_metadata() -> None:
    written, header = encode_header({}, {})
    assert written == b"\x08\0\0\0\0\0\0\0{}      " == save({})
    assert header == Header((), {}, 16, 16)


def test_metadata_is_sorted_whatever_order_it_comes_in() -> None:
    keys = ["title", "format", "Z", "é", "a"]
    forward, header = encode_header({}, dict.fromkeys(keys, "v"))
    backward, _ = encode_header({}, dict.fromkeys(reversed(keys), "v"))
    assert forward == backward
    assert list(json.loads(forward[8:])["__metadata__"]) == sorted(keys) == list(header.metadata)


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}], ids=["bare", "format"])
def test_all_dtypes_at_once_equal_the_library(
    metadata: dict[str, str] | None, tmp_path: Path
) -> None:
    tensors = {}
    for index, (code, dtype) in enumerate(TORCH_DTYPES.items()):
        for suffix, count in (("z", 6), ("A", 0), ("m", 1)):
            width = dtype.itemsize
            raw = torch.arange(count * width, dtype=torch.uint8) % 2
            shape = (2, 3) if count == 6 else (0, 4) if count == 0 else (1,)
            tensors[f"{index % 3}.{code}.{suffix}"] = raw.view(dtype).reshape(shape)
    save_file(tensors, tmp_path / "reference.safetensors", metadata)
    reference = (tmp_path / "reference.safetensors").read_bytes()
    assert reference == save(tensors, metadata)
    parsed = parse_file(reference)
    assert len(parsed.tensors) == len(tensors)
    written, header = encode_header(layout_of(parsed), metadata or {})
    assert written == reference[: parsed.data_start]
    assert header == parsed


@pytest.mark.parametrize(
    "codes",
    [
        ("F16",),
        ("F32", "F16"),
        ("F16", "BF16"),
        ("BF16", "F32", "I64"),
        ("I64", "U64", "F64", "C64"),
        ("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2"),
        ("I16", "U16", "F16", "BF16"),
    ],
    ids="+".join,
)
@pytest.mark.parametrize("metadata", [None, {'a "quoted" key': "line\nbreak \x7f é 😀"}])
def test_dtype_mixes_equal_the_library(
    codes: tuple[str, ...], metadata: dict[str, str] | None
) -> None:
    names = [
        "b.weight",
        "a.weight",
        "B",
        "é",
        "a.weight2",
        "a.weight.10",
        "a.weight.9",
        "\U0001f600",
    ]
    layout: Layout = {
        name: (codes[index % len(codes)], (index, 3)) for index, name in enumerate(names)
    }
    tensors = {
        name: torch.zeros(shape, dtype=TORCH_DTYPES[code]) for name, (code, shape) in layout.items()
    }
    reference = save(tensors, metadata)
    written, header = encode_header(layout, metadata or {})
    assert reference.startswith(written)
    assert header.file_bytes == len(reference)
    assert parse_file(reference) == header


def test_every_dtype_has_the_width_of_the_library() -> None:
    for code, dtype in TORCH_DTYPES.items():
        per_element = 2 if code == "F4" else 1
        assert DTYPE_BITS[code] * per_element == dtype.itemsize * 8, code
    assert set(DTYPE_BITS) - set(TORCH_DTYPES) == {"F6_E2M3", "F6_E3M2"}
    assert {DTYPE_CODES[word]: word for word in DTYPE_WORDS.values()} == DTYPE_WORDS


def test_wide_dtypes_come_first_then_names_by_their_utf8_bytes() -> None:
    pairs = [("b", "F16"), ("a", "F16"), ("z", "F32"), ("c", "BF16"), ("é", "F16"), ("Z", "F16")]
    assert [name for name, _ in file_order(pairs)] == ["z", "c", "Z", "a", "b", "é"]
    # UTF-16 order, that of some languages, would have the surrogates of the emoji first.
    assert file_order([("\U0001f600", "I8"), ("\uffee", "I8")])[0][0] == "\uffee"


def test_sizes() -> None:
    assert element_count(()) == 1
    assert element_count((2, 0, 3)) == 0
    assert tensor_bytes("F64", (3, 5)) == 120
    assert tensor_bytes("F4", (4,)) == 2
    with pytest.raises(CheckpointError, match=r"shape \[3\] of F6_E3M2 does not fill whole bytes"):
        tensor_bytes("F6_E3M2", (3,))


# -------------------------------------------------------------------------------------- reading


def test_specs_say_where_each_tensor_lies() -> None:
    header = dump(
        {
            "second": entry("F32", [2, 1], [2, 10]),
            "__metadata__": {"format": "pt"},
            "first": entry("F16", [], [0, 2]),
            "empty": entry("I64", [0, 7], [10, 10]),
        }
    )
    start = 8 + len(header)
    parsed = parse_header(header, start + 10)
    assert parsed.metadata == {"format": "pt"}
    assert parsed.tensors == (
        TensorSpec("first", "F16", (), start, 2),
        TensorSpec("second", "F32", (2, 1), start + 2, 8),
        TensorSpec("empty", "I64", (0, 7), start + 10, 0),
    )
    assert [spec.element_count for spec in parsed.tensors] == [1, 2, 0]


# (what, header, bytes of data, what the message says)
Case = tuple[str, bytes, int, str]
DEEP = b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"

# Broken for everybody: the reference library refuses these too.
BROKEN: list[Case] = [
    ("one brace", b"{ ", 0, "no JSON"),
    ("BOM", b"\xef\xbb\xbf{}", 0, "does not begin with `{`"),
    ("UTF-16", '{"a":1}'.encode("utf-16-le"), 0, "no JSON"),
    ("UTF-16 with BOM", '{"a":1}'.encode("utf-16"), 0, r"not UTF-8 \(byte 0\)"),
    ("bad UTF-8", b'{"\xff":1}', 0, r"not UTF-8 \(byte 2\)"),
    ("overlong UTF-8", b'{"\xc0\xaf":1}', 0, "not UTF-8"),
    ("surrogate in UTF-8", b'{"\xed\xa0\x80":1}', 0, "not UTF-8"),
    ("lone surrogate in a name", b'{"\\ud800":' + dump(entry()) + b"}", 4, "lone surrogate"),
    ("lone surrogate in metadata", b'{"__metadata__":{"a":"\\ud800"}}', 0, "lone surrogate"),
    ("lone surrogate in a metadata key", b'{"__metadata__":{"\\udc00":""}}', 0, "lone surrogate"),
    ("trailing NULs", b"{}\0\0\0\0", 0, "no JSON: Extra data"),
    ("trailing garbage", b"{}x", 0, "no JSON: Extra data at character 2"),
    ("two objects", b"{}{}", 0, "no JSON: Extra data"),
    ("list", b"[1]", 0, "does not begin with `{`"),
    ("null", b"null", 0, "does not begin with `{`"),
    ("deep nesting", DEEP, 0, "nested too deeply"),
    ("comment", b"{} // x", 0, "no JSON"),
    ("single quotes", b"{'a':1}", 0, "no JSON"),
    ("trailing comma", b'{"__metadata__":{},}', 0, "no JSON"),
    ("control character", b'{"a\nb":1}', 0, "no JSON: Invalid control character"),
    ("number", b'{"a":5}', 0, "a: an entry must have"),
    ("NaN", b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,4]}}', 4, "the number NaN"),
    ("Infinity", b'{"a":{"dtype":"F32","shape":[-Infinity],"data_offsets":[0,4]}}', 4, "-Infinity"),
    ("shape 4.0", dump({"a": entry(shape=[1.0])}), 4, "the number 1.0, and only integers"),
    ("shape 4e0", dump({"a": entry()}).replace(b"[1]", b"[1e0]"), 4, "the number 1e0"),
    ("shape as text", dump({"a": entry(shape=["1"])}), 4, "shape must be at most 16 integers"),
    ("shape true", dump({"a": entry(shape=[True])}), 4, "shape must be at most 16 integers"),
    ("shape null", dump({"a": entry(shape=None)}), 4, "shape must be at most 16 integers"),
    ("shape a number", dump({"a": entry(shape=1)}), 4, "shape must be at most 16 integers"),
    ("shape -1", dump({"a": entry(shape=[-1])}), 4, "the number -1, outside of 0"),
    ("shape -0", dump({"a": entry()}).replace(b"[1]", b"[-0]"), 0, "the number -0, outside of 0"),
    ("shape 01", dump({"a": entry()}).replace(b"[1]", b"[01]"), 4, "no JSON"),
    ("shape 2^64", dump({"a": entry(shape=[2**64])}), 4, "a dimension of 18446744073709551616"),
    ("5000 digits", b'{"a":' + b"9" * 5000 + b"}", 0, "the number 9999.*outside of 0 to 2.64"),
    ("product overflows", dump({"a": entry(shape=[2**32, 2**32])}), 4, "overflow"),
    (
        "zero after overflow",
        dump({"a": entry(shape=[2**40] * 2 + [0], offsets=[0, 0])}),
        0,
        "overflow",
    ),
    (
        "bytes overflow",
        dump({"a": entry(shape=[2**31, 2**31], offsets=[0, 0])}),
        0,
        "data_offsets span 0",
    ),
    ("reversed offsets", dump({"a": entry(offsets=[4, 0])}), 4, "a begin and an end"),
    ("one offset", dump({"a": entry(offsets=[4])}), 4, "a begin and an end"),
    ("three offsets", dump({"a": entry(offsets=[0, 2, 4])}), 4, "a begin and an end"),
    ("offset true", dump({"a": entry("U8", [1], [False, True])}), 1, "a begin and an end"),
    (
        "offset 2^64",
        dump({"a": entry(shape=[0], offsets=[2**64, 2**64])}),
        0,
        "unused bytes before",
    ),
    ("first offset 4", dump({"a": entry(offsets=[4, 8])}), 8, "a: 4 unused bytes before it"),
    (
        "hole",
        dump({"a": entry(), "b": entry(offsets=[8, 12])}),
        12,
        "b: 4 unused bytes before it",
    ),
    (
        "overlap",
        dump({"a": entry(), "b": entry(offsets=[2, 6])}),
        6,
        "b: its data overlaps the tensor before it",
    ),
    ("same bytes twice", dump({"a": entry(), "b": entry()}), 4, "b: its data overlaps"),
    (
        "too few bytes",
        dump({"a": entry(shape=[2])}),
        4,
        "F32 of shape .2. takes 8 bytes, .* span 4",
    ),
    ("too many bytes", dump({"a": entry("U8")}), 4, "takes 1 bytes, data_offsets span 4"),
    ("one byte missing", dump({"a": entry()}), 3, r"truncated: \d+ bytes of \d+ .*tensor is a\)"),
    ("one byte extra", dump({"a": entry()}), 5, "1 bytes follow the last tensor"),
    ("data without tensors", b"{}", 3, "3 bytes follow the last tensor"),
    ("unknown dtype f32", dump({"a": entry("f32")}), 4, "a: unknown dtype 'f32'"),
    ("unknown dtype F8", dump({"a": entry("F8_E4M3FN", [4])}), 4, "unknown dtype 'F8_E4M3FN'"),
    ("dtype a list", dump({"a": entry(["F32"])}), 4, r"unknown dtype \['F32'\]"),
    ("dtype null", dump({"a": entry(None)}), 4, "unknown dtype None"),
    ("odd F4", dump({"a": entry("F4", [3], [0, 1])}), 1, "does not fill whole bytes"),
    ("odd F6", dump({"a": entry("F6_E2M3", [3], [0, 2])}), 2, "does not fill whole bytes"),
    (
        "missing field",
        b'{"a":{"dtype":"F32","shape":[1]}}',
        4,
        "dtype, shape and data_offsets only",
    ),
    (
        "field twice",
        b'{"a":{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        4,
        "the key 'dtype' twice",
    ),
    ("two metadata", b'{"__metadata__":{},"__metadata__":{}}', 0, "key '__metadata__' twice"),
    ("metadata with a number", b'{"__metadata__":{"a":1}}', 0, "from strings to strings"),
    ("metadata nested", b'{"__metadata__":{"a":{"b":"c"}}}', 0, "from strings to strings"),
    ("metadata with null", b'{"__metadata__":{"a":null}}', 0, "from strings to strings"),
    ("metadata a list", b'{"__metadata__":["a"]}', 0, "from strings to strings"),
    ("metadata a tensor", dump({"__metadata__": entry()}), 4, "from strings to strings"),
    ("entry null", b'{"a":null}', 0, "a: an entry must have"),
]

# The reference library reads these; each is ambiguous, or a trap for another reader.
STRICTER: list[Case] = [
    ("leading newline", b"\n{}", 0, "does not begin with `{`"),
    ("leading space", b" {}", 0, "does not begin with `{`"),
    (
        "name twice",
        b'{"a":' + dump(entry()) + b',"a":' + dump(entry("I32")) + b"}",
        4,
        "the key 'a' twice",
    ),
    (
        "name twice, one escaped",
        b'{"a":' + dump(entry()) + b',"\\u0061":' + dump(entry("I32")) + b"}",
        4,
        "the key 'a' twice",
    ),
    (
        "name twice, the first of no size",
        b'{"a":' + dump(entry("F32", [0], [0, 0])) + b',"a":' + dump(entry()) + b"}",
        4,
        "the key 'a' twice",
    ),
    ("metadata key twice", b'{"__metadata__":{"a":"1","a":"2"}}', 0, "the key 'a' twice"),
    ("metadata null", b'{"__metadata__":null}', 0, "from strings to strings"),
    ("unknown field", dump({"a": {**entry(), "strides": "x"}}), 4, "data_offsets only"),
    ("entry a list", b'{"a":["F32",[1],[0,4]]}', 4, "a: an entry must have"),
    ("shape [0, 2^62]", dump({"a": entry(shape=[0, 2**62], offsets=[0, 0])}), 0, "a dimension of"),
    (
        "zero before overflow",
        dump({"a": entry(shape=[0, 2**40, 2**40], offsets=[0, 0])}),
        0,
        "the elements of shape .* overflow",
    ),
    ("200 dimensions", dump({"a": entry(shape=[1] * 200)}), 4, "at most 16 integers"),
    ("empty name", dump({"": entry()}), 4, "tensor name '' has 0 bytes"),
    ("name with NUL", dump({"a\0b": entry()}), 4, "has a control character"),
    ("name with DEL", dump({"a\x7fb": entry()}), 4, "has a control character"),
    ("name with a line break", dump({"a\nb": entry()}), 4, "has a control character"),
    ("name with a C1 control", dump({"a\x9bb": entry()}), 4, "has a control character"),
    ("name of 1 MiB", dump({"x" * 2**20: entry()}), 4, "tensor name 'x{40}' has 1048576 bytes"),
    ("name of 1025 bytes", dump({"é" * 512 + "x": entry()}), 4, "has 1025 bytes"),
    ("name that climbs", dump({"../../etc/passwd": entry()}), 4, "climbs out of its folder"),
    ("name that climbs back", dump({"a\\..\\b": entry()}), 4, "climbs out of its folder"),
]


@pytest.mark.parametrize(
    ("header", "data", "match"), [c[1:] for c in BROKEN], ids=[c[0] for c in BROKEN]
)
def test_what_breaks_the_format_is_refused_by_name(header: bytes, data: int, match: str) -> None:
    content = file_of(header, b"\0" * data)
    with pytest.raises(CheckpointError, match=match):
        parse_file(content)
    with pytest.raises(SafetensorError):
        deserialize(content)


@pytest.mark.parametrize(
    ("header", "data", "match"), [c[1:] for c in STRICTER], ids=[c[0] for c in STRICTER]
)
def test_what_the_library_lets_through_is_refused_by_name(
    header: bytes, data: int, match: str
) -> None:
    content = file_of(header, b"\0" * data)
    deserialize(content)
    with pytest.raises(CheckpointError, match=match):
        parse_file(content)


@pytest.mark.parametrize(
    ("header", "data", "expected"),
    [
        (b"{}", 0, {}),
        (b"{} \t\r\n ", 0, {}),
        (b'{"__metadata__":{}}', 0, {}),
        (dump({"a": entry("U8", [1], [0, 1]), "b": entry("F32", [1], [1, 5])}), 5, None),
        (dump({"a": entry("F4", [2], [0, 1])}), 1, {"a": ("F4", (2,))}),
        (dump({"a": entry("F6_E2M3", [4], [0, 3])}), 3, {"a": ("F6_E2M3", (4,))}),
        (dump({"a": entry("F32", [0], [0, 0])}), 0, {"a": ("F32", (0,))}),
        (
            dump({"a": entry("F32", [0], [0, 0]), "b": entry("I8", [3, 0], [0, 0])}),
            0,
            {"a": ("F32", (0,)), "b": ("I8", (3, 0))},
        ),
        (dump({"a": entry("F32", [1] * 16)}), 4, {"a": ("F32", (1,) * 16)}),
        (dump({"é" * 512: entry()}), 4, {"é" * 512: ("F32", (1,))}),
        # The same letter in two Unicode forms: two names, kept apart.
        (
            dump({"\u00e9": entry("U8", [1], [0, 1]), "e\u0301": entry("I8", [1], [1, 2])}),
            2,
            {"\u00e9": ("U8", (1,)), "e\u0301": ("I8", (1,))},
        ),
        (dump({"a..b": entry(), "..c": entry(offsets=[4, 8])}), 8, None),
        (dump({"\U0001f600": entry()}), 4, {"\U0001f600": ("F32", (1,))}),
    ],
    ids=[
        *("no tensors", "trailing white space", "empty metadata", "F32 at an odd offset"),
        *("F4", "F6", "no elements", "only tensors of no size", "16 dimensions", "1024 bytes"),
        *("Unicode forms", "dots", "surrogate pair"),
    ],
)
def test_what_is_unusual_and_right_is_read(
    header: bytes, data: int, expected: Layout | None
) -> None:
    content = file_of(header, bytes(range(data)))
    parsed = layout_of(parse_file(content))
    assert parsed == {
        name: (tensor["dtype"], tuple(tensor["shape"])) for name, tensor in deserialize(content)
    }
    assert expected is None or parsed == expected


def test_a_key_twice_among_many_is_found_at_once() -> None:
    names = [f'"k{index}":0' for index in range(60_000)]
    header = ("{" + ",".join([*names, '"k59999":0']) + "}").encode()
    started = time.monotonic()
    with pytest.raises(CheckpointError, match="the key 'k59999' twice"):
        parse_file(file_of(header))
    # Counting every name among all others took half a minute.
    assert time.monotonic() - started < 10


# --------------------------------------------------------------------------------------- length


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "only 0 bytes"),
        (b"\x02\0\0\0\0\0\0", "only 7 bytes"),
        (b"\x02\0\0\0\0\0\0\0", "only 8 bytes"),
        (b"\x01\0\0\0\0\0\0\0{", "only 9 bytes"),
        (b"\0\0\0\0\0\0\0\0{}", "the header claims 0 bytes"),
        (b"\x01\0\0\0\0\0\0\0{}", "the header claims 1 bytes"),
        (b"\xff\xff\xff\xff\xff\xff\xff\xff{}", "claims 18,446,744,073,709,551,615 bytes"),
        (b"\x03\0\0\0\0\0\0\0{}", "claims 3 bytes and the file has 2 .*truncated"),
        (b"\0\0\0\0\0\0\0\x02{}", "claims 144,115,188,075,855,872 bytes, more than"),
    ],
    ids=[
        *("empty", "7 bytes", "8 bytes", "one brace", "N = 0", "N = 1", "N = 2^64 - 1"),
        *("N past the end", "big-endian"),
    ],
)
def test_lengths_that_cannot_be_true(content: bytes, match: str) -> None:
    with pytest.raises(CheckpointError, match=match):
        parse_file(content)
    with pytest.raises(SafetensorError):
        deserialize(content)


def test_the_length_is_checked_before_anything_is_read() -> None:
    def head(length: int) -> bytes:
        return length.to_bytes(8, "little") + b"{"

    huge = 10**12
    assert parse_length(head(2), 10) == 2
    assert parse_length(head(100), 108) == 100
    assert parse_length(head(MAX_HEADER_BYTES), huge) == MAX_HEADER_BYTES
    with pytest.raises(CheckpointError, match="claims 101 bytes and the file has 100"):
        parse_length(head(101), 108)
    with pytest.raises(CheckpointError, match="claims 33,554,433 bytes, more than the 33,554,432"):
        parse_length(head(MAX_HEADER_BYTES + 1), huge)
    with pytest.raises(CheckpointError, match="claims 100,000,001 bytes"):
        parse_length(head(100_000_001), huge)


def torch_zip() -> bytes:
    buffer = io.BytesIO()
    torch.save({"a": torch.zeros(3)}, buffer)
    return buffer.getvalue()


FAKES: dict[str, tuple[bytes, str]] = {
    "LFS pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 5\n",
        r"a Git LFS pointer, not the model \(run `git lfs pull`\)",
    ),
    "HTML": (b"<!DOCTYPE html>\n<html><head>", "an HTML page, probably a failed download"),
    "HTML in lower case": (b"<!doctype html><title>404</title>", "an HTML page"),
    "HTML in mixed case": (b"<!DocType HTML><title>404</title>", "an HTML page"),
    "HTML without doctype": (b"<html lang='en'><body>login", "an HTML page"),
    "HTML in capitals": (b"<HTML><BODY>404", "an HTML page"),
    "HTML after blank lines": (b"\r\n \n<!DOCTYPE html><html>", "an HTML page"),
    "HTML with BOM": (b"\xef\xbb\xbf<!DOCTYPE html><html>", "an HTML page"),
    "PyTorch file": (torch_zip(), "a zip archive, probably a PyTorch pickle"),
    "empty zip": (b"PK\x05\x06" + b"\0" * 18, "an empty zip archive"),
    "GGUF": (b"GGUF\x03\0\0\0" + b"\0" * 16, "a GGUF file"),
    "JSON": (b'{"a": {"dtype": "F32"}}', "bare JSON without the length in front"),
    "PNG": (b"\x89PNG\r\n\x1a\n" + b"\0" * 30, "a PNG picture"),
    "zeros": (b"\0" * 4096, "all zeros, probably an unfinished download"),
    **{
        f"pickle {protocol}": (pickle.dumps({"a": [1.5] * 9}, protocol), "a Python pickle")
        for protocol in (2, 3, 4, 5)
    },
}


@pytest.mark.parametrize(("content", "what"), FAKES.values(), ids=FAKES)
def test_what_a_file_really_is_is_said(content: bytes, what: str) -> None:
    with pytest.raises(CheckpointError, match=f"no safetensors file: it is {what}"):
        parse_file(content)


def test_what_a_tiny_file_really_is_is_said() -> None:
    with pytest.raises(CheckpointError, match="only 9 bytes: it is a Python pickle"):
        parse_file(b"\x80\x04N.     ")
    with pytest.raises(CheckpointError, match="only 5 bytes: it is all zeros"):
        parse_file(b"\0" * 5)


def test_nothing_is_said_of_what_is_not_known() -> None:
    assert sniff(b"") == ""
    assert sniff(b"\x10\0\0\0\0\0\0\0{}") == ""
    assert sniff(b"<svg>") == ""


# ---------------------------------------------------------------------------- generated headers

NAMES = st.text(
    st.characters(codec="utf-8", exclude_categories=("Cc", "Cs"), exclude_characters="/\\"),
    min_size=1,
    max_size=8,
) | st.sampled_from(["conv_in.weight", 'a"b', "a\\b", "a/b", "Z", "z", "0"])
SHAPES = st.lists(st.integers(0, 4), max_size=4).map(tuple)
LAYOUTS = st.dictionaries(NAMES, st.tuples(st.sampled_from(sorted(DTYPE_BITS)), SHAPES), max_size=6)
LAYOUTS = LAYOUTS.map(
    lambda layout: {
        name: (dtype, shape)
        for name, (dtype, shape) in layout.items()
        if name != "__metadata__" and element_count(shape) * DTYPE_BITS[dtype] % 8 == 0
    }
)
METADATA = st.dictionaries(
    st.text(st.characters(codec="utf-8"), max_size=6),
    st.text(st.characters(codec="utf-8"), max_size=6),
    max_size=4,
)


def check_against_reference(content: bytes, header: Header) -> None:
    """Same names, dtypes and shapes, and the same bytes for each tensor."""
    reference = dict(deserialize(content))
    assert layout_of(header) == {
        name: (tensor["dtype"], tuple(tensor["shape"])) for name, tensor in reference.items()
    }
    for spec in header.tensors:
        assert content[spec.start : spec.start + spec.size_bytes] == reference[spec.name]["data"]


def some_data(count: int) -> bytes:
    return bytes((index * 7 + 1) % 251 for index in range(count))


@settings(deadline=None, max_examples=120)
@given(layout=LAYOUTS, metadata=METADATA)
def test_generated_headers_round_trip_and_agree_with_the_library(
    layout: Layout, metadata: dict[str, str]
) -> None:
    written, header = encode_header(layout, metadata)
    assert len(written) % 8 == 0
    assert parse_header(written[8:], header.file_bytes) == header
    assert layout_of(header) == layout
    assert header.metadata == metadata
    content = written + some_data(header.file_bytes - len(written))
    assert parse_file(content) == header
    check_against_reference(content, header)


@settings(deadline=None, max_examples=120)
@given(layout=LAYOUTS, metadata=st.none() | METADATA.filter(lambda m: len(m) == 1))
def test_generated_headers_are_the_bytes_of_the_library(
    layout: Layout, metadata: dict[str, str] | None
) -> None:
    # torch makes no tensors of 4 and 6 bits.
    layout = {n: (d, s) for n, (d, s) in layout.items() if d[:2] not in ("F4", "F6")}
    reference = save(
        {
            name: torch.zeros(shape, dtype=TORCH_DTYPES[dtype])
            for name, (dtype, shape) in layout.items()
        },
        metadata,
    )
    written, header = encode_header(layout, metadata or {})
    assert reference[: len(written)] == written
    assert header.file_bytes == len(reference)


ODD_NUMBERS = st.sampled_from(
    [0, 1, 2, 3, 4, 6, 8, -1, 1.0, True, None, "1", 2**40, 2**47, 2**48, 2**63, 2**64 - 1, 2**64]
)
ODD_VALUES = ODD_NUMBERS | st.sampled_from([[], {}, "F32", "f32", "U8", [1], {"a": "b"}, "\ud800"])
ODD_BYTES = st.sampled_from(
    [
        *(
            b" ",
            b"\n",
            b"\t",
            b"\0",
            b"\xff",
            b"\xc3\xa9",
            b"\xef\xbb\xbf",
            b"0",
            b"1",
            b"-",
            b".",
            b"e1",
        ),
        *(
            b'"',
            b"\\",
            b"\\ud800",
            b"\\u0000",
            b"\\u0061",
            b"{",
            b"}",
            b"[",
            b"]",
            b",",
            b":",
            b"//",
        ),
        *(b"null", b"NaN", b'"a":', b'"__metadata__":{"a":"b"},'),
    ]
)


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """A file that was right before one or two changes to its header or the size of its data."""
    layout = draw(LAYOUTS)
    written, header = encode_header(layout, draw(METADATA))
    tree = json.loads(written[8:])
    for _ in range(draw(st.integers(0, 2))):
        name = draw(st.sampled_from(sorted(tree))) if tree else "a"
        kind = draw(st.sampled_from(["dim", "add dim", "offset", "field", "name", "drop", "value"]))
        item = tree.get(name)
        if kind == "drop":
            tree.pop(name, None)
        elif kind == "name":
            tree[draw(st.sampled_from(["a", "", "\0", "../x", "__metadata__", "\ud800"]))] = item
        elif kind == "value" or not isinstance(item, dict) or "shape" not in item:
            tree[name] = copy.deepcopy(draw(ODD_VALUES))
        elif kind == "field":
            field = draw(st.sampled_from(["dtype", "shape", "data_offsets", "x"]))
            item[field] = copy.deepcopy(draw(ODD_VALUES))
        elif isinstance(numbers := item.get("data_offsets" if kind == "offset" else "shape"), list):
            if kind == "add dim" or not numbers:
                numbers.insert(0, draw(ODD_NUMBERS))
            else:
                numbers[draw(st.integers(0, len(numbers) - 1))] = draw(ODD_NUMBERS)
    text = json.dumps(tree, ensure_ascii=draw(st.booleans())).encode("utf-8", "surrogatepass")
    for _ in range(draw(st.integers(0, 2))):
        position = draw(st.integers(0, len(text)))
        cut = draw(st.integers(0, 3))
        text = text[:position] + draw(ODD_BYTES | st.just(b"")) + text[position + cut :]
    size = header.file_bytes - header.data_start + draw(st.sampled_from([0, 0, 0, 0, 1, -1]))
    return file_of(text, some_data(max(size, 0)))


@given(content=mutated())
def check_mutated(content: bytes) -> None:
    try:
        header = parse_file(content)
    except CheckpointError:
        return
    check_against_reference(content, header)


@pytest.mark.parametrize("examples", [400, pytest.param(100_000, marks=pytest.mark.slow)])
def test_what_is_accepted_the_library_accepts_and_reads_alike(examples: int) -> None:
    health = [HealthCheck.too_slow, HealthCheck.data_too_large]
    settings(deadline=None, max_examples=examples, suppress_health_check=health)(check_mutated)()


@settings(deadline=None, max_examples=120)
@given(content=st.binary(max_size=80) | st.binary(max_size=60).map(file_of))
def test_any_bytes_are_read_or_refused(content: bytes) -> None:
    try:
        header = parse_file(content)
    except CheckpointError:
        return
    check_against_reference(content, header)
