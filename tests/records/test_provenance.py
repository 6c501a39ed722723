"""The provenance of an export: its schema field by field, and that no flipped bit escapes it."""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from merge import load_recipe, run_recipe
from merge.errors import CheckpointError
from merge.json_files import json_bytes
from merge.records.folder import LOCK_NAME, MANIFEST_NAME
from merge.records.provenance import PROVENANCE_NAME, build_provenance, check_provenance

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OTHER_COMMIT = "f" * 40
RECIPE: dict[str, Any] = {
    "name": "small",
    "method": "add_difference",
    "weight": 0.5,
    "models": {
        "base": {"repo": "org/base", "revision": COMMIT, "sha256": {}},
        "distilled": [{"path": "few-step", "sha256": {}, "weight": 1.0}],
        "target": {"path": "edit.safetensors", "config": f"org/edit@{OTHER_COMMIT}"},
    },
}


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def lock_bytes(recipe: Any = RECIPE) -> bytes:
    lock = {"lock_version": 1, "tool_version": "1.2.3", "recipe": recipe, "models": {}}
    return yaml.safe_dump(lock, sort_keys=False).encode()


def record(text: str) -> dict[str, Any]:
    return {"size": len(text), "sha256": digest(text)}


def manifest_tree() -> dict[str, Any]:
    return {
        "schema_version": 1,
        "tool": {"name": "instruct-merge", "version": "1.2.3"},
        "recipe": "small",
        "inputs": {
            "base": {
                "repo": "org/base",
                "commit": COMMIT,
                "files": {"unet/a b.safetensors": record("base")},
            },
            "distilled": {"name": "few-step", "files": {"unet/x.safetensors": record("few")}},
            "target": {
                "name": "edit.safetensors",
                "files": {
                    "edit.safetensors": record("edit"),
                    "tokenizer/vocab.json": record("vocab"),
                },
            },
        },
        "files": {
            "unet/x.safetensors": record("merged"),
            LOCK_NAME: {"size": len(lock_bytes()), "sha256": digest(lock_bytes().decode())},
        },
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    manifest, lock = json_bytes(manifest_tree()), lock_bytes()
    (tmp_path / MANIFEST_NAME).write_bytes(manifest)
    (tmp_path / LOCK_NAME).write_bytes(lock)
    (tmp_path / PROVENANCE_NAME).write_bytes(build_provenance(manifest, lock))
    return tmp_path


def statement(folder: Path) -> dict[str, Any]:
    tree: dict[str, Any] = json.loads((folder / PROVENANCE_NAME).read_text())
    return tree


def test_the_statement_has_the_fields_of_in_toto_v1(folder: Path) -> None:
    tree = statement(folder)
    assert set(tree) == {"_type", "subject", "predicateType", "predicate"}
    assert tree["_type"] == "https://in-toto.io/Statement/v1"
    assert tree["predicateType"] == "https://slsa.dev/provenance/v1"
    assert tree["subject"] == [
        {
            "name": MANIFEST_NAME,
            "digest": {"sha256": hashlib.sha256((folder / MANIFEST_NAME).read_bytes()).hexdigest()},
        },
        {"name": LOCK_NAME, "digest": {"sha256": digest(lock_bytes().decode())}},
        {"name": "unet/x.safetensors", "digest": {"sha256": digest("merged")}},
    ]


def test_the_predicate_has_the_fields_of_slsa_v1(folder: Path) -> None:
    predicate = statement(folder)["predicate"]
    assert set(predicate) == {"buildDefinition", "runDetails"}
    build = predicate["buildDefinition"]
    assert set(build) == {
        "buildType",
        "externalParameters",
        "internalParameters",
        "resolvedDependencies",
    }
    assert build["buildType"].startswith("https://")
    assert build["externalParameters"] == {"recipe": RECIPE}
    assert build["internalParameters"] == {"tool": {"name": "instruct-merge", "version": "1.2.3"}}
    builder = predicate["runDetails"]["builder"]
    assert set(predicate["runDetails"]) == {"builder"}
    assert builder["id"].startswith("https://")
    assert builder["version"] == {"instruct-merge": "1.2.3"}


def test_dependencies_say_where_each_input_is_from(folder: Path) -> None:
    hub = "https://huggingface.co"
    assert statement(folder)["predicate"]["buildDefinition"]["resolvedDependencies"] == [
        {
            "uri": f"git+{hub}/org/base@{COMMIT}",
            "digest": {"gitCommit": COMMIT},
            "annotations": {"role": "base"},
        },
        {
            "name": "unet/a b.safetensors",
            "uri": f"{hub}/org/base/resolve/{COMMIT}/unet/a%20b.safetensors",
            "digest": {"sha256": digest("base")},
            "annotations": {"role": "base"},
        },
        {
            "name": "few-step/unet/x.safetensors",
            "digest": {"sha256": digest("few")},
            "annotations": {"role": "distilled"},
        },
        # The tokenizer of a single file is from the repository that gave its configs.
        {
            "uri": f"git+{hub}/org/edit@{OTHER_COMMIT}",
            "digest": {"gitCommit": OTHER_COMMIT},
            "annotations": {"role": "target"},
        },
        {
            "name": "edit.safetensors",
            "digest": {"sha256": digest("edit")},
            "annotations": {"role": "target"},
        },
        {
            "name": "tokenizer/vocab.json",
            "uri": f"{hub}/org/edit/resolve/{OTHER_COMMIT}/tokenizer/vocab.json",
            "digest": {"sha256": digest("vocab")},
            "annotations": {"role": "target"},
        },
    ]


def test_an_untouched_folder_agrees_and_the_bytes_repeat(folder: Path) -> None:
    assert check_provenance(folder) == []
    manifest, lock = json_bytes(manifest_tree()), lock_bytes()
    first = build_provenance(manifest, lock)
    assert first == build_provenance(manifest, lock)
    assert first == json_bytes(json.loads(first))
    assert str(folder).encode() not in first


@pytest.fixture
def smallest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with so little in its records that each of their bits can be flipped."""
    recipe = {"models": {"target": {}}}
    files = {"a": {"size": 1, "sha256": digest("a")}}
    tree = {"tool": {"name": "t", "version": "1"}, "inputs": {"t": {"files": files}}}
    lock = lock_bytes(recipe)
    tree["files"] = {LOCK_NAME: {"size": len(lock), "sha256": hashlib.sha256(lock).hexdigest()}}
    manifest = json.dumps(tree).encode()
    statement = build_provenance(manifest, lock)
    for name, data in ((MANIFEST_NAME, manifest), (LOCK_NAME, lock), (PROVENANCE_NAME, statement)):
        (tmp_path / name).write_bytes(data)
    # Parsing the lock is slow, and not what is tested.
    monkeypatch.setattr("merge.records.provenance._parse_lock", lambda data: recipe)
    return tmp_path


def flips(data: bytes) -> Iterator[bytes]:
    """Yield the data with each of its bits flipped, one at a time."""
    for index in range(len(data)):
        for bit in range(8):
            changed = bytearray(data)
            changed[index] ^= 1 << bit
            yield bytes(changed)


@pytest.mark.parametrize("name", [MANIFEST_NAME, LOCK_NAME])
def test_every_flipped_bit_of_a_record_is_named(smallest: Path, name: str) -> None:
    path = smallest / name
    whole = path.read_bytes()
    right = hashlib.sha256(whole).hexdigest()
    for changed in flips(whole):
        path.write_bytes(changed)
        wrong = hashlib.sha256(changed).hexdigest()
        assert check_provenance(smallest)[0] == f"{name} has SHA-256 {wrong}, not {right}"


def test_every_flipped_bit_of_the_statement_is_named(smallest: Path) -> None:
    path = smallest / PROVENANCE_NAME
    for changed in flips(path.read_bytes()):
        path.write_bytes(changed)
        assert f"{PROVENANCE_NAME} is not what manifest and lock give" in check_provenance(smallest)


def test_a_manifest_and_statement_of_another_export_are_named(folder: Path) -> None:
    tree = manifest_tree()
    tree["recipe"] = "another"
    (folder / MANIFEST_NAME).write_bytes(json_bytes(tree))
    lines = check_provenance(folder)
    assert [line.split()[0] for line in lines] == [MANIFEST_NAME, PROVENANCE_NAME]


@pytest.mark.parametrize("name", [PROVENANCE_NAME, MANIFEST_NAME, LOCK_NAME])
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    assert check_provenance(folder) == [f"{name} is missing"]


@pytest.mark.parametrize(
    ("manifest", "lock"),
    [
        (b"", lock_bytes()),
        (b"[]", lock_bytes()),
        (b"{}", lock_bytes()),
        (b"[" * 100_000, lock_bytes()),
        (b"\xff", lock_bytes()),
        (b'{"files": {"a": 1}, "tool": {}, "inputs": {}}', lock_bytes()),
        (json_bytes(manifest_tree()), b""),
        (json_bytes(manifest_tree()), b"\xff"),
        (json_bytes(manifest_tree()), b"recipe: text"),
        (json_bytes(manifest_tree()), b"recipe: {models: 3}"),
        (json_bytes(manifest_tree()), lock_bytes({**RECIPE, "since": datetime.date(2024, 1, 1)})),
        (json_bytes(manifest_tree()), b"recipe: &a {models: {target: *a}}"),
        (json_bytes(manifest_tree()), b"recipe: !!python/name:os.system {}"),
    ],
)  # fmt: skip
def test_broken_records_are_refused(manifest: bytes, lock: bytes) -> None:
    with pytest.raises(CheckpointError, match=r"merge_manifest\.json|recipe\.lock\.yaml"):
        build_provenance(manifest, lock)


def test_a_real_export_names_every_file_and_agrees(tiny_sd15: Path, tmp_path: Path) -> None:
    tree = {
        "name": "proven",
        "models": {role: str(tiny_sd15 / role) for role in ("base", "distilled", "target")},
        "out_dtype": "float32",
    }
    (tmp_path / "proven.yaml").write_text(yaml.safe_dump(tree))
    recipe = load_recipe(tmp_path / "proven.yaml")
    folder = run_recipe(recipe, tmp_path / "out", device="cpu", verify=False).folder
    manifest = (folder / MANIFEST_NAME).read_bytes()
    data = build_provenance(manifest, (folder / LOCK_NAME).read_bytes())
    (folder / PROVENANCE_NAME).write_bytes(data)
    assert check_provenance(folder) == []
    for subject in json.loads(data)["subject"]:
        content = (folder / subject["name"]).read_bytes()
        assert hashlib.sha256(content).hexdigest() == subject["digest"]["sha256"]
    assert str(tmp_path).encode() not in data
