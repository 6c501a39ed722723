"""JSON that we write, and JSON that anybody may have written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from merge.errors import CheckpointError, PublishError
from merge.json_files import (
    canonical_bytes,
    json_bytes,
    parse_json,
    read_json,
    read_json_if_any,
)

BROKEN = {"nothing": b"", "cut": b'{"a"', "deep": b"[" * 100_000, "not UTF-8": b'"\xff"'}


def test_what_we_write_is_sorted_and_has_one_end() -> None:
    assert json_bytes({"b": [1], "a": "ü"}) == '{\n  "a": "ü",\n  "b": [\n    1\n  ]\n}\n'.encode()
    assert canonical_bytes({"b": [1, 2], "a": "ü"}) == '{"a":"ü","b":[1,2]}'.encode()


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_no_json_is_named(tmp_path: Path, case: str) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(BROKEN[case])
    with pytest.raises(CheckpointError, match=r"x\.json cannot be read"):
        read_json(path)
    with pytest.raises(PublishError, match="the record cannot be read"):
        parse_json(BROKEN[case], "the record", PublishError)
    assert read_json_if_any(path) == {}


@pytest.mark.parametrize("value", [[], [1], "text", 3, None])
def test_only_objects_are_taken(tmp_path: Path, value: object) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps(value))
    with pytest.raises(CheckpointError, match=r"x\.json is not a JSON object"):
        read_json(path)
    assert read_json_if_any(path) == {}


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read.*No such file"):
        read_json(tmp_path / "x.json")
    assert read_json_if_any(tmp_path / "x.json") == {}
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_json(tmp_path)
