"""Outputs that are whole or not there: tensor files, folders, full disks, other runs."""

from __future__ import annotations

import errno
import hashlib
import os
import random
import re
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file

import merge.writer.folder as folder_module
import merge.writer.renames as renames_module
from merge.errors import (
    CheckpointError,
    IntegrityError,
    NoSpaceError,
    OutputError,
    OutputExistsError,
    SourceNotFoundError,
)
from merge.header.encode import encode_header
from merge.reader.checkpoint import read_header
from merge.writer.file import OutputFile
from merge.writer.folder import MARKER, OutputFolder
from merge.writer.tensors import TensorFileWriter

VALUES = {
    "a.weight": np.arange(24, dtype=np.float32).reshape(4, 6),
    "b.bias": np.arange(7, dtype=np.float16),
}


def layout() -> tuple[bytes, dict[str, int], int]:
    """Return the header of a file with VALUES, where each tensor starts, and the file's size."""
    codes = {"float32": "F32", "float16": "F16"}
    tensors = {name: (codes[str(v.dtype)], v.shape) for name, v in VALUES.items()}
    header, parsed = encode_header(tensors, {"format": "pt"})
    return header, {spec.name: spec.start for spec in parsed.tensors}, parsed.file_bytes


def pieces() -> list[tuple[memoryview, int]]:
    """Return the data in small pieces, each with its position, in no order."""
    _, starts, _ = layout()
    found = []
    for name, values in VALUES.items():
        data = memoryview(values.tobytes())
        found += [(data[i : i + 5], starts[name] + i) for i in range(0, len(data), 5)]
    random.Random(0).shuffle(found)
    return found


def entries(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def open_files() -> int:
    return len(list(Path("/dev/fd").iterdir()))


def failing(code: int) -> Callable[..., Any]:
    def fail(*arguments: object) -> None:
        raise OSError(code, os.strerror(code))

    return fail


# Tensor files ----------------------------------------------------------------------------------


def test_the_reference_library_reads_what_several_threads_wrote(tmp_path: Path) -> None:
    header, _, size = layout()
    path = tmp_path / "m.safetensors"
    todo = pieces()
    with TensorFileWriter(path, size) as writer:

        def work() -> None:
            while todo:
                try:
                    data, offset = todo.pop()
                except IndexError:
                    return
                writer.write(data, offset)

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        writer.finish(header)
    loaded = load_file(path)
    assert loaded.keys() == VALUES.keys()
    for name, values in VALUES.items():
        assert np.array_equal(loaded[name], values)
        assert loaded[name].dtype == values.dtype
    assert read_header(path).stamp.size_bytes == size == path.stat().st_size


def test_an_unfinished_file_never_loads(tmp_path: Path) -> None:
    header, _, size = layout()
    path = tmp_path / "m.safetensors"

    def is_refused() -> bool:
        with pytest.raises(SafetensorError), safe_open(path, "np"):
            pass
        with pytest.raises(CheckpointError, match="all zeros, probably an unfinished download"):
            read_header(path)
        return True

    with TensorFileWriter(path, size) as writer:
        assert path.stat().st_size == size
        assert is_refused()
        for data, offset in pieces():
            writer.write(data, offset)
            assert offset >= len(header)
        writer.flush()
        assert is_refused()
    assert is_refused()


def test_data_is_durable_before_the_header_and_the_header_before_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    header, _, size = layout()
    calls: list[tuple[str, int]] = []
    pwrite, fsync = os.pwrite, os.fsync

    def record_write(descriptor: int, data: memoryview, offset: int) -> int:
        calls.append(("write", offset))
        return pwrite(descriptor, data, offset)

    def record_sync(descriptor: int) -> None:
        calls.append(("fsync", 0))
        fsync(descriptor)

    monkeypatch.setattr(os, "pwrite", record_write)
    monkeypatch.setattr(os, "fsync", record_sync)
    with TensorFileWriter(tmp_path / "m", size) as writer:
        writer.write(memoryview(bytes(size - len(header))), len(header))
        writer.finish(header)
    assert calls == [("write", len(header)), ("fsync", 0), ("write", 0), ("fsync", 0)]


@pytest.mark.parametrize("most", [1, 3])
def test_short_writes_and_reads_are_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    header, starts, size = layout()
    path = tmp_path / "m.safetensors"
    pwrite, preadv = os.pwrite, os.preadv
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: pwrite(fd, data[:most], at))
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, at: preadv(fd, [buffers[0][:most]], at))
    with TensorFileWriter(path, size) as writer:
        for name, values in VALUES.items():
            writer.write(memoryview(values.tobytes()), starts[name])
        back = bytearray(size - len(header))
        writer.read_into(memoryview(back), len(header))
        writer.finish(header)
    monkeypatch.undo()
    assert path.read_bytes() == header + back
    assert np.array_equal(load_file(path)["a.weight"], VALUES["a.weight"])


FULL = [errno.ENOSPC, errno.EDQUOT, errno.EFBIG]


@pytest.mark.parametrize("call", ["ftruncate", "pwrite", "fsync"])
@pytest.mark.parametrize("code", [*FULL, errno.EIO], ids=errno.errorcode.get)
def test_failures_of_the_disk_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: int
) -> None:
    header, _, size = layout()
    path = tmp_path / "m.safetensors"
    before = open_files()

    def write() -> None:
        with TensorFileWriter(path, size) as writer:
            writer.write(memoryview(b"data"), len(header))
            writer.finish(header)

    monkeypatch.setattr(os, call, failing(code))
    message = re.escape(f"cannot write {path}: {os.strerror(code)}")
    with pytest.raises(OutputError, match=message) as caught:
        write()
    assert isinstance(caught.value, NoSpaceError) == (code in FULL)
    assert caught.value.exit_code == 8
    if code == errno.EFBIG:
        assert "ulimit -f" in caught.value.hint
    assert open_files() == before
    # Whatever was written, the file does not load.
    assert not any(path.read_bytes()[:8])


def test_a_second_fsync_is_not_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    header, _, size = layout()
    path = tmp_path / "m.safetensors"
    results = iter([OSError(errno.EIO, "Input/output error")])
    real = os.fsync

    def fsync(descriptor: int) -> None:
        # The system reports lost pages once; after that it claims success.
        for error in results:
            raise error
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with TensorFileWriter(path, size) as writer, pytest.raises(OutputError, match="Input/output"):
        writer.finish(header)
    with pytest.raises(CheckpointError):
        read_header(path)


def test_a_file_is_never_opened_twice(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(b"mine")
    with pytest.raises(OutputError, match=r"cannot write .*m\.safetensors: File exists"):
        TensorFileWriter(path, 100)
    assert path.read_bytes() == b"mine"
    (tmp_path / "link").symlink_to("elsewhere")
    with pytest.raises(OutputError, match="cannot write .*link: File exists"):
        TensorFileWriter(tmp_path / "link", 100)
    assert not (tmp_path / "elsewhere").exists()


def test_reading_back_reports_what_went_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with TensorFileWriter(tmp_path / "m", 100) as writer:
        with pytest.raises(OutputError, match="was cut short while it was written"):
            writer.read_into(memoryview(bytearray(2)), 99)
        monkeypatch.setattr(os, "preadv", failing(errno.EIO))
        with pytest.raises(OutputError, match="cannot read back .*m: Input/output error"):
            writer.read_into(memoryview(bytearray(2)), 0)


# Folders ---------------------------------------------------------------------------------------


def build(folder: OutputFolder, text: bytes = b"new") -> None:
    with folder:
        folder.write_file(MARKER, b"{}")
        folder.write_file("deep/er/text", text)
        folder.publish()


def our_output(path: Path, text: str = "old") -> Path:
    path.mkdir(parents=True)
    (path / MARKER).write_text("{}")
    (path / "text").write_text(text)
    return path


def test_a_folder_appears_whole_by_one_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    final = tmp_path / "a" / "b" / "out"
    renames: list[tuple[str, str]] = []
    real = os.rename

    def rename(source: Any, destination: Any, **options: Any) -> None:
        assert entries(Path(source)) == ["deep", "deep/er", "deep/er/text", MARKER]
        assert not final.exists()
        renames.append((Path(source).name, Path(destination).name))
        real(source, destination, **options)

    monkeypatch.setattr(os, "rename", rename)
    folder = OutputFolder(final, overwrite=False)
    assert re.fullmatch(r"out\.partial-[0-9a-f]{8}", folder.partial.name)
    assert folder.partial.parent == final.parent
    build(folder)
    assert renames == [(folder.partial.name, "out")]
    assert entries(tmp_path / "a" / "b") == [
        *("out", "out/deep", "out/deep/er", "out/deep/er/text", f"out/{MARKER}"),
    ]
    assert (final / "deep" / "er" / "text").read_bytes() == b"new"


def test_everything_is_synced_before_the_rename_and_the_parent_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    fsync, rename = os.fsync, os.rename

    def record_sync(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").resolve()
        calls.append(re.sub(r"partial-\w+", "partial", path.relative_to(tmp_path).as_posix()))
        fsync(descriptor)

    def record_rename(*arguments: Any) -> None:
        calls.append("rename")
        rename(*arguments)

    if not Path("/proc/self/fd").exists():
        pytest.skip("names of open files come from /proc")
    monkeypatch.setattr(os, "fsync", record_sync)
    monkeypatch.setattr(os, "rename", record_rename)
    build(OutputFolder(tmp_path / "out", overwrite=False))
    assert calls == [
        *(f"out.partial/{MARKER}", "out.partial/deep/er/text"),
        *("out.partial", "out.partial/deep", "out.partial/deep/er"),
        *("rename", "."),
    ]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_error_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    folder = OutputFolder(tmp_path / "a" / "b" / "out", overwrite=False)

    def fail() -> None:
        with folder:
            folder.write_file("deep/text", b"data")
            assert entries(folder.partial) == ["deep", "deep/text"]
            raise error

    with pytest.raises(error):
        fail()
    assert entries(tmp_path) == []


def test_what_was_not_published_takes_nothing_else_along(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    folder = OutputFolder(tmp_path / "a" / "b" / "out", overwrite=False)
    with folder:
        # Somebody else begins to use the folder that was made for us.
        (tmp_path / "a" / "b" / "theirs").write_text("theirs")
    assert entries(tmp_path) == ["a", "a/b", "a/b/theirs"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO], ids=errno.errorcode.get)
@pytest.mark.parametrize("call", ["fsync", "rename", "mkdir"])
def test_failures_of_the_disk_leave_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: int
) -> None:
    final = tmp_path / "a" / "out"
    monkeypatch.setattr(os, call, failing(code))
    with pytest.raises(OutputError, match=re.escape(os.strerror(code))) as caught:
        build(OutputFolder(final, overwrite=False))
    assert isinstance(caught.value, NoSpaceError) == (code == errno.ENOSPC)
    assert entries(tmp_path) == []


def test_an_existing_folder_is_kept(tmp_path: Path) -> None:
    final = our_output(tmp_path / "out")
    with pytest.raises(OutputExistsError, match=r"the output folder .*out exists") as caught:
        build(OutputFolder(final, overwrite=False))
    assert "--overwrite" in caught.value.hint
    assert entries(tmp_path) == ["out", f"out/{MARKER}", "out/text"]


def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    build(OutputFolder(tmp_path / "out", overwrite=False))
    assert (tmp_path / "out" / MARKER).is_file()
    assert len(list(tmp_path.iterdir())) == 1


def test_overwrite_replaces_our_own_output(tmp_path: Path) -> None:
    final = our_output(tmp_path / "out")
    build(OutputFolder(final, overwrite=True))
    assert entries(tmp_path) == [
        *("out", "out/deep", "out/deep/er", "out/deep/er/text", f"out/{MARKER}"),
    ]


@pytest.mark.parametrize("what", ["folder", "file", "link to ours", "dangling link", "marker"])
def test_overwrite_replaces_nothing_else(tmp_path: Path, what: str) -> None:
    final = tmp_path / "out"
    if what == "folder":
        our_output(final).joinpath(MARKER).unlink()
    elif what == "file":
        final.write_text("mine")
    elif what == "link to ours":
        final.symlink_to(our_output(tmp_path / "elsewhere"))
    elif what == "marker":
        # The marker has to be a file.
        (final / MARKER).mkdir(parents=True)
    else:
        final.symlink_to("nothing")
    before = entries(tmp_path)
    with pytest.raises(OutputExistsError, match=f"is not an output of this tool .*no {MARKER}"):
        build(OutputFolder(final, overwrite=True))
    assert entries(tmp_path) == before
    assert final.is_symlink() == ("link" in what)


@pytest.mark.parametrize(
    ("has_exchange", "failing"),
    [*((True, index) for index in range(3)), *((False, index) for index in range(5))],
)
def test_a_replacement_that_fails_gives_the_old_output_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_exchange: bool, failing: int
) -> None:
    final = our_output(tmp_path / "out")
    real, seen = os.rename, [0]

    def count() -> None:
        seen[0] += 1
        if seen[0] == failing + 1:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    def rename(source: Any, destination: Any, **options: Any) -> None:
        count()
        real(source, destination, **options)

    def swap_names(first: Path, second: Path) -> bool:
        count()
        return has_exchange and folder_swap(first, second)

    folder_swap = folder_module.swap_names
    monkeypatch.setattr(folder_module, "swap_names", swap_names)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(OutputError, match="cannot write .*out: Input/output error"):
        build(OutputFolder(final, overwrite=True))
    assert entries(tmp_path) == ["out", f"out/{MARKER}", "out/text"]
    assert (final / "text").read_text() == "old"


@pytest.mark.parametrize("overwrite", [False, True])
def test_another_run_may_take_the_name_meanwhile(tmp_path: Path, overwrite: bool) -> None:
    final = tmp_path / "out"
    folder = OutputFolder(final, overwrite=overwrite)
    with folder:
        folder.write_file(MARKER, b"{}")
        final.mkdir()
        (final / "theirs").write_text("theirs")
        with pytest.raises(OutputExistsError, match="exists already|not an output of this tool"):
            folder.publish()
    assert entries(tmp_path) == ["out", "out/theirs"]


@pytest.mark.parametrize("moment", ["check", "rename"])
def test_a_name_taken_between_check_and_rename_is_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    final = tmp_path / "out"
    folder = OutputFolder(final, overwrite=False)
    rename, check = os.rename, folder.check

    def take_and_rename(source: Any, destination: Any, **options: Any) -> None:
        our_output(final, "theirs")
        rename(source, destination, **options)

    def check_and_take() -> None:
        check()
        if folder.partial.exists():
            our_output(final, "theirs")

    if moment == "check":
        monkeypatch.setattr(folder, "check", check_and_take)
    else:
        monkeypatch.setattr(os, "rename", take_and_rename)
    with pytest.raises(OutputExistsError, match="out exists already\nhint: add --overwrite"):
        build(folder)
    assert entries(tmp_path) == ["out", f"out/{MARKER}", "out/text"]
    assert (final / "text").read_text() == "theirs"


@pytest.fixture(params=["a call", "no call"])
def renaming(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Systems with and without a rename that never replaces."""
    if request.param == "no call":
        monkeypatch.setattr(renames_module, "_rename", lambda *_: False)


@pytest.mark.usefixtures("renaming")
def test_a_file_that_appears_meanwhile_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = OutputFile(tmp_path / "out.safetensors", overwrite=False)
    check = output.check

    def check_and_take() -> None:
        check()
        if output.partial.exists():
            output.final.write_text("theirs")

    monkeypatch.setattr(output, "check", check_and_take)
    with output:
        output.partial.write_text("ours")
        with pytest.raises(OutputExistsError, match="out.safetensors exists already"):
            output.publish()
    assert entries(tmp_path) == ["out.safetensors"]
    assert output.final.read_text() == "theirs"


@pytest.mark.usefixtures("renaming")
def test_a_file_gets_its_name(tmp_path: Path) -> None:
    with OutputFile(tmp_path / "out.safetensors", overwrite=False) as output:
        output.partial.write_text("ours")
        output.publish()
    assert entries(tmp_path) == ["out.safetensors"]


def test_of_many_runs_at_once_one_wins_and_nothing_else_stays(tmp_path: Path) -> None:
    barrier = threading.Barrier(6)
    results: list[str] = []

    def work(index: int) -> None:
        folder = OutputFolder(tmp_path / "a" / "out", overwrite=False)
        barrier.wait()
        try:
            build(folder, str(index).encode())
            results.append(f"won {index}")
        except OutputError:
            results.append("lost")

    threads = [threading.Thread(target=work, args=(index,)) for index in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (winner,) = [result for result in results if result != "lost"]
    assert len(results) == 6
    assert (tmp_path / "a" / "out" / "deep" / "er" / "text").read_text() == winner.split()[1]
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["out"]


def test_names_that_can_hold_no_folder(tmp_path: Path) -> None:
    for name in ("/", ".", "..", "a/.."):
        with pytest.raises(OutputError, match="cannot be an output folder"):
            OutputFolder(Path(name), overwrite=True).check()
    (tmp_path / "file").write_text("mine")
    folder = OutputFolder(tmp_path / "file" / "out", overwrite=False)
    folder.check()
    folder.check_space(1)
    with pytest.raises(OutputError, match="cannot write .*: File exists"), folder:
        pass
    with pytest.raises(OutputError, match="cannot write .*: File name too long"):
        build(OutputFolder(tmp_path / ("x" * 250), overwrite=False))
    assert entries(tmp_path) == ["file"]


def test_leftovers_are_named_and_kept(tmp_path: Path) -> None:
    names = ["out.partial-1234abcd", "out.partial-5678abcd"]
    for name in [*names, "out.partial", "other.partial-1234abcd", "[o]ut.partial-1234abcd"]:
        (tmp_path / name).mkdir()
    folder = OutputFolder(tmp_path / "out", overwrite=True)
    assert [path.name for path in folder.leftovers()] == names
    build(folder)
    assert [path.name for path in folder.leftovers()] == names
    # The folder's own name is no pattern.
    (special,) = OutputFolder(tmp_path / "[o]ut", overwrite=True).leftovers()
    assert special.name == "[o]ut.partial-1234abcd"


def test_space_is_checked_where_the_folder_will_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = OutputFolder(tmp_path / "not" / "there" / "out", overwrite=False)
    real = os.statvfs(tmp_path)
    asked: list[Path] = []

    def statvfs(path: Path) -> os.statvfs_result:
        asked.append(path)
        # 5 fragments of 1000 bytes are free, and 3 of them for us.
        return os.statvfs_result((4096, 1000, 9, 5, 3, *tuple(real)[5:]))

    monkeypatch.setattr(os, "statvfs", statvfs)
    folder.check_space(3000)
    message = f"the output needs 3,001 bytes and {re.escape(str(tmp_path))} has 3,000 free"
    with pytest.raises(NoSpaceError, match=message):
        folder.check_space(3001)
    assert set(asked) == {tmp_path}


WRITE_ALL = """
import sys, threading
from pathlib import Path
from merge.writer.file import OutputFile
from merge.writer.folder import OutputFolder
from merge.writer.tensors import TensorFileWriter

out, source = map(Path, sys.argv[1:])
with OutputFolder(out / "sub" / "out", overwrite=False) as folder:
    folder.write_file("deep/written", b"x")
    folder.copy_file(source, "deep/copied", threading.Event())
    with TensorFileWriter(folder.partial / "tensors", 100) as writer:
        writer.finish(b"header")
    folder.publish()
"""


@pytest.mark.parametrize(("umask", "file", "folder"), [(0o027, 0o640, 0o750), (0, 0o666, 0o777)])
def test_modes_follow_the_umask_and_not_the_source(
    tmp_path: Path, umask: int, file: int, folder: int
) -> None:
    source = tmp_path / "source"
    source.write_text("private, and executable for no reason")
    source.chmod(0o700)
    out = tmp_path / "out"
    out.mkdir()
    command = [sys.executable, "-c", WRITE_ALL, str(out), str(source)]
    subprocess.run(command, check=True, umask=umask)
    modes = {
        path.relative_to(out).as_posix(): stat.S_IMODE(path.stat().st_mode)
        for path in out.rglob("*")
    }
    assert modes == {
        **dict.fromkeys(("sub", "sub/out", "sub/out/deep"), folder),
        **dict.fromkeys(("sub/out/deep/written", "sub/out/deep/copied"), file),
        "sub/out/tensors": file,
    }


# Copies ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 1024 * 1024, 1024 * 1024 + 1, 2_500_000])
def test_a_copy_has_the_bytes_and_their_digest(tmp_path: Path, size: int) -> None:
    data = random.Random(size).randbytes(size)
    (tmp_path / "source").write_bytes(data)
    # A cache of the Hub holds links.
    (tmp_path / "link").symlink_to("source")
    with OutputFolder(tmp_path / "out", overwrite=False) as folder:
        digest = folder.copy_file(tmp_path / "link", "vae/copy", threading.Event())
        copy = folder.partial / "vae" / "copy"
        assert not copy.is_symlink()
        assert copy.read_bytes() == data
    assert digest == hashlib.sha256(data).hexdigest()


def test_short_writes_of_a_copy_are_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = random.Random(0).randbytes(50_000)
    (tmp_path / "source").write_bytes(data)
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, chunk, at: real(fd, chunk[:777], at))
    with OutputFolder(tmp_path / "out", overwrite=False) as folder:
        digest = folder.copy_file(tmp_path / "source", "copy", threading.Event())
        assert (folder.partial / "copy").read_bytes() == data
    assert digest == hashlib.sha256(data).hexdigest()


def test_a_copy_can_be_given_up(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"x" * 100)
    stop = threading.Event()
    stop.set()
    with OutputFolder(tmp_path / "out", overwrite=False) as folder:
        assert folder.copy_file(tmp_path / "source", "copy", stop) == ""
        assert (folder.partial / "copy").stat().st_size == 0


def test_a_source_that_is_not_there_or_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "source"
    with OutputFolder(tmp_path / "out", overwrite=False) as folder:
        with pytest.raises(SourceNotFoundError, match="cannot open .*source: No such file"):
            folder.copy_file(source, "a", threading.Event())
        source.write_bytes(b"x" * 100)
        real = os.fstat

        def fstat(descriptor: int) -> os.stat_result:
            # The file grows right after it was opened.
            status = real(descriptor)
            monkeypatch.setattr(os, "fstat", real)
            with source.open("ab") as file:
                file.write(b"more")
            return status

        monkeypatch.setattr(os, "fstat", fstat)
        with pytest.raises(IntegrityError, match="source changed while it was in use"):
            folder.copy_file(source, "b", threading.Event())


@pytest.mark.parametrize("call", ["pwrite", "fsync"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO], ids=errno.errorcode.get)
def test_a_copy_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: int
) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"x" * 100)
    before = open_files()
    with OutputFolder(tmp_path / "out", overwrite=False) as folder:
        monkeypatch.setattr(os, call, failing(code))
        with pytest.raises(OutputError, match=f"cannot write .*copy: {os.strerror(code)}") as error:
            folder.copy_file(source, "copy", threading.Event())
        assert isinstance(error.value, NoSpaceError) == (code == errno.ENOSPC)
    assert open_files() == before
    assert entries(tmp_path) == ["source"]


def test_files_of_a_folder_are_never_written_twice(tmp_path: Path) -> None:
    (tmp_path / "source").write_text("other")
    with OutputFolder(tmp_path / "out", overwrite=False) as folder:
        folder.write_file("a/file", b"first")
        with pytest.raises(OutputError, match="cannot write .*a/file: File exists"):
            folder.write_file("a/file", b"second")
        with pytest.raises(OutputError, match="cannot write .*a/file: File exists"):
            folder.copy_file(tmp_path / "source", "a/file", threading.Event())
        with pytest.raises(OutputError, match="cannot write .*a/file/b: "):
            folder.write_file("a/file/b", b"below a file")
        assert (folder.partial / "a" / "file").read_bytes() == b"first"


@pytest.mark.parametrize("moment", ["before a file", "before the end"])
def test_a_folder_that_somebody_took_is_not_begun_anew(tmp_path: Path, moment: str) -> None:
    """Were it, a part of the output would get the output's name."""
    folder = OutputFolder(tmp_path / "out", overwrite=False)

    def build_in_spite() -> None:
        with folder:
            folder.write_file("unet/first", b"1")
            folder.partial.rename(tmp_path / "theirs")
            if moment == "before a file":
                folder.write_file("unet/second", b"2")
            folder.partial.mkdir()
            folder.write_file("second", b"2")
            folder.publish()

    with pytest.raises(OutputError):
        build_in_spite()
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "theirs" / "unet" / "first").read_bytes() == b"1"
