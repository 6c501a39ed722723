"""Reading checkpoints: which file is at fault, and files that change while they are in use."""

from __future__ import annotations

import errno
import os
import struct
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save, save_file

from merge.errors import CheckpointError, IntegrityError, SourceError, SourceNotFoundError
from merge.header.model import TensorSpec
from merge.reader.checkpoint import (
    CheckpointFile,
    FileReader,
    read_checkpoint,
    read_header,
    read_scalar,
)

TENSORS = {
    "a.weight": torch.arange(12, dtype=torch.float16).reshape(3, 4),
    "b.bias": torch.arange(5, dtype=torch.float32),
    "n": torch.tensor(7, dtype=torch.int64),
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "model.safetensors"
    save_file(TENSORS, file, {"format": "pt", "title": "small"})
    return file


def spec_of(file: CheckpointFile, name: str) -> TensorSpec:
    return next(spec for spec in file.header.tensors if spec.name == name)


def open_files() -> int:
    return len(list(Path("/dev/fd").iterdir()))


# Headers ---------------------------------------------------------------------------------------


def test_every_tensor_is_found_with_its_bytes(path: Path) -> None:
    checkpoint = read_checkpoint([path])
    assert checkpoint.metadata == {"format": "pt", "title": "small"}
    assert checkpoint.shapes == {"a.weight": (3, 4), "b.bias": (5,), "n": ()}
    file = checkpoint.files[0]
    assert file.stamp.size_bytes == path.stat().st_size
    with FileReader(path, file.stamp) as reader:
        for name, tensor in TENSORS.items():
            index, spec = checkpoint.tensors[name]
            assert index == 0
            data = reader.read(spec.start, spec.size_bytes)
            assert data == tensor.numpy().tobytes()


def test_shards_are_one_table(tmp_path: Path) -> None:
    paths = [tmp_path / f"model-{part}.safetensors" for part in (1, 2)]
    save_file({"a": torch.zeros(2)}, paths[0], {"title": "first"})
    save_file({"b": torch.zeros(3), "c": torch.zeros(4)}, paths[1], {"title": "second"})
    checkpoint = read_checkpoint(paths)
    assert {key: index for key, (index, _) in checkpoint.tensors.items()} == {
        "a": 0,
        "b": 1,
        "c": 1,
    }
    assert checkpoint.metadata == {"title": "first"}
    assert [file.path for file in checkpoint.files] == paths


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    paths = [tmp_path / f"model-{part}.safetensors" for part in (1, 2)]
    for file in paths:
        save_file({"a.weight": torch.zeros(2), file.stem: torch.zeros(1)}, file)
    message = r"a\.weight is in two shards: model-1\.safetensors, model-2\.safetensors"
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(paths)


BROKEN: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda data: b"", "the file has only 0 bytes"),
    "cut in its length": (lambda data: data[:5], "the file has only 5 bytes"),
    "cut in its header": (lambda data: data[:40], r"the header claims \d+ bytes and the file has"),
    "cut in its data": (lambda data: data[:-1], "the file is truncated"),
    "longer": (lambda data: data + b"xy", "2 bytes follow the last tensor"),
    "pointer": (lambda data: b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
    "zeros": (lambda data: bytes(len(data)), "all zeros, probably an unfinished download"),
    "no json": (lambda data: data.replace(b'{"', b"{,", 1), "the header is no JSON"),
}


@pytest.mark.parametrize("case", BROKEN)
@pytest.mark.parametrize("read", [read_header, lambda path: read_checkpoint([path])])
def test_errors_name_the_file_and_the_rule(
    path: Path, case: str, read: Callable[[Path], object]
) -> None:
    change, message = BROKEN[case]
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(CheckpointError, match=message) as caught:
        read(path)
    assert caught.value.message.startswith(f"{path}: ")
    assert caught.value.hint == "download the file again, or convert it to safetensors"


# What is no regular file ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["folder", "pipe", "link to a pipe", "device"])
def test_what_is_no_regular_file_is_refused_at_once(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "thing.safetensors"
    if kind == "folder":
        path.mkdir()
    elif kind == "device":
        path = Path(os.devnull)
    else:
        os.mkfifo(tmp_path / "pipe")
        path.symlink_to("pipe")
        path = path if kind.startswith("link") else tmp_path / "pipe"
    before = open_files()
    found: list[BaseException] = []

    def read() -> None:
        try:
            read_header(path)
        except SourceNotFoundError as error:
            found.append(error)

    # In a thread, since a pipe without a writer would block for ever.
    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    thread.join(10)
    assert not thread.is_alive()
    assert [str(error).split("\n")[0] for error in found] == [f"{path} is no regular file"]
    assert open_files() == before


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SourceNotFoundError, match=r"cannot open .*gone\.safetensors: No such file"):
        read_header(tmp_path / "gone.safetensors")
    (tmp_path / "link.safetensors").symlink_to("gone.safetensors")
    with pytest.raises(SourceNotFoundError, match=r"cannot open .*link\.safetensors: No such file"):
        FileReader(tmp_path / "link.safetensors")


# Files that change ------------------------------------------------------------------------------


def truncate(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 1)


def grow(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"x")


def replace(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(path.read_bytes())
    status = path.stat()
    os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
    other.rename(path)


def rewrite(path: Path) -> None:
    status = path.stat()
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"x")
    # Clocks of file systems may be too coarse to show so quick a change by themselves.
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1_000_000))


CHANGES = [truncate, grow, replace, rewrite, Path.unlink]


@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_changes_while_it_is_open(path: Path, change: Callable[[Path], None]) -> None:
    stamp = read_header(path).stamp
    with FileReader(path, stamp) as reader:
        reader.check_unchanged(stamp)
        change(path)
        with pytest.raises(IntegrityError, match="changed while it was in use") as caught:
            reader.check_unchanged(stamp)
    assert str(path) in caught.value.message
    assert "run again" in caught.value.hint


@pytest.mark.parametrize("change", CHANGES[:-1])
def test_a_file_that_changed_since_it_was_planned(
    path: Path, change: Callable[[Path], None]
) -> None:
    file = read_header(path)
    change(path)
    before = open_files()
    with pytest.raises(IntegrityError, match="changed while it was in use"):
        FileReader(path, file.stamp)
    assert open_files() == before
    with pytest.raises(IntegrityError, match="changed while it was in use"):
        read_scalar(file, spec_of(file, "n"))


def test_reading_alone_does_not_count_as_a_change(path: Path) -> None:
    stamp = read_header(path).stamp
    path.chmod(0o400)
    path.with_name("second name").hardlink_to(path)
    os.utime(path, ns=(0, stamp.modified_ns))
    with FileReader(path, stamp) as reader:
        reader.check_unchanged(stamp)


def test_a_file_that_ends_early_says_where(path: Path) -> None:
    size = path.stat().st_size
    with FileReader(path) as reader:
        truncate(path)
        with pytest.raises(IntegrityError, match=f"ends at byte {size - 1}: it was cut short"):
            reader.read(0, size)


# Reads ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("most", [1, 3, 7])
def test_short_reads_are_continued(path: Path, monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    data = path.read_bytes()
    expected = read_header(path)
    real = os.preadv
    calls = 0

    def preadv(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        nonlocal calls
        calls += 1
        return real(descriptor, [buffers[0][:most]], offset)

    monkeypatch.setattr(os, "preadv", preadv)
    assert read_header(path) == expected
    with FileReader(path) as reader:
        calls = 0
        assert reader.read(2, 50) == data[2:52]
        assert calls == -(-50 // most)
        buffer = bytearray(b"-" * 20)
        reader.read_into(memoryview(buffer)[5:15], 8)
        assert buffer == b"-" * 5 + data[8:18] + b"-" * 5
    assert read_scalar(expected, spec_of(expected, "n")) == 7.0


def test_a_disk_that_fails_is_no_surprise(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def preadv(*arguments: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", preadv)
    message = r"cannot read .*model\.safetensors: Input/output error"
    with FileReader(path) as reader, pytest.raises(SourceError, match=message):
        reader.read(0, 8)
    with pytest.raises(SourceError, match=message):
        read_header(path)


def test_closing_twice_leaves_other_files_alone(path: Path) -> None:
    reader = FileReader(path)
    reader.close()
    with path.open("rb") as other:
        reader.close()
        assert other.read(1)


# Scalars ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "value"),
    [
        (torch.float16, 0.333251953125),
        (torch.bfloat16, -3.015625),
        (torch.float32, 1.2345678806304932),
        (torch.float64, 0.1),
        (torch.int32, -5.0),
        (torch.int64, 8.0),
    ],
)
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_scalars_are_read_exactly(
    tmp_path: Path, dtype: torch.dtype, value: float, shape: tuple[int, ...]
) -> None:
    path = tmp_path / "lora.safetensors"
    tensors = {"pad": torch.zeros(3), "x.alpha": torch.full(shape, value, dtype=dtype)}
    path.write_bytes(save(tensors))
    file = read_header(path)
    assert read_scalar(file, spec_of(file, "x.alpha")) == value


@pytest.mark.parametrize(
    "tensor",
    [
        *(torch.zeros(2), torch.zeros(0), torch.tensor(True)),
        torch.tensor(1.0).to(torch.float8_e4m3fn),
    ],
    ids=["two", "none", "bool", "float8"],
)
def test_what_is_no_single_number_is_refused(tmp_path: Path, tensor: torch.Tensor) -> None:
    path = tmp_path / "lora.safetensors"
    path.write_bytes(save({"x.alpha": tensor}))
    file = read_header(path)
    with pytest.raises(CheckpointError, match=r"lora\.safetensors: x\.alpha is no single number"):
        read_scalar(file, spec_of(file, "x.alpha"))


def test_special_values_of_scalars_come_through(tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    bits = torch.tensor([0x7F80], dtype=torch.uint16).view(torch.bfloat16)
    smallest = torch.tensor([1], dtype=torch.uint16).view(torch.bfloat16)
    path.write_bytes(save({"inf": bits, "tiny": smallest}))
    file = read_header(path)
    assert read_scalar(file, spec_of(file, "inf")) == float("inf")
    assert read_scalar(file, spec_of(file, "tiny")) == struct.unpack("<f", b"\0\0\1\0")[0] > 0
