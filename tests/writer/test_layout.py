"""Tensors moved into a new file: every byte, its digest, and what goes wrong."""

from __future__ import annotations

import hashlib
import os
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from merge.errors import CheckpointError, IntegrityError, OutputError
from merge.reader.checkpoint import read_checkpoint
from merge.writer.copies.model import TensorCopy, copies_of, piece_of
from merge.writer.copies.write import CHUNK_BYTES, StoppedError, write_tensor_copies

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64, torch.uint8]


def random_values(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(0, 200, shape, generator=generator)
    return values.to(dtype)


@settings(max_examples=40, deadline=None)
@given(
    shapes=st.lists(
        st.tuples(st.lists(st.integers(0, 5), max_size=4), st.sampled_from(DTYPES)),
        min_size=1,
        max_size=6,
    )
)
def test_a_plain_copy_is_what_the_reference_library_writes(
    tmp_path_factory: pytest.TempPathFactory, shapes: list[tuple[list[int], torch.dtype]]
) -> None:
    folder = tmp_path_factory.mktemp("copy")
    tensors = {
        f"t{i}": random_values(tuple(shape), dtype, i) for i, (shape, dtype) in enumerate(shapes)
    }
    save_file(tensors, folder / "in.safetensors", {"format": "pt"})
    checkpoint = read_checkpoint([folder / "in.safetensors"])
    out = folder / "out.safetensors"
    size, sha256 = write_tensor_copies(out, copies_of(checkpoint), {"format": "pt"})
    assert out.read_bytes() == (folder / "in.safetensors").read_bytes()
    assert (size, sha256) == (
        out.stat().st_size,
        hashlib.sha256(out.read_bytes()).hexdigest(),
    )


def test_rows_fuse_split_and_turn(tmp_path: Path) -> None:
    tensors = {
        "q": random_values((4, 6), torch.float16, 1),
        "k": random_values((4, 6), torch.float16, 2),
        "projection": random_values((5, 7), torch.bfloat16, 3),
        "conv": random_values((8, 3, 1, 1), torch.float32, 4),
    }
    save_file(tensors, tmp_path / "in.safetensors")
    source = read_checkpoint([tmp_path / "in.safetensors"])
    copies = [
        TensorCopy("qk", "F16", (8, 6), (piece_of(source, "q"), piece_of(source, "k"))),
        TensorCopy("k_end", "F16", (2, 6), (piece_of(source, "k", 2, 2),)),
        TensorCopy("turned", "BF16", (7, 5), (piece_of(source, "projection"),), transposed=True),
        TensorCopy("linear", "F32", (8, 3), (piece_of(source, "conv"),)),
    ]
    write_tensor_copies(tmp_path / "out.safetensors", copies, {})
    moved = load_file(tmp_path / "out.safetensors")
    assert torch.equal(moved["qk"], torch.cat([tensors["q"], tensors["k"]]))
    assert torch.equal(moved["k_end"], tensors["k"][2:])
    assert torch.equal(moved["turned"], tensors["projection"].T)
    assert torch.equal(moved["linear"], tensors["conv"][:, :, 0, 0])


def test_large_tensors_cross_chunks_and_progress_is_told(tmp_path: Path) -> None:
    tensors = {"big": random_values((3, CHUNK_BYTES // 2 + 77), torch.float16, 5)}
    save_file(tensors, tmp_path / "in.safetensors")
    seen: list[int] = []
    source = read_checkpoint([tmp_path / "in.safetensors"])
    write_tensor_copies(tmp_path / "out.safetensors", copies_of(source), {}, on_bytes=seen.append)
    assert len(seen) == 4
    assert sum(seen) == tensors["big"].numel() * 2
    assert torch.equal(load_file(tmp_path / "out.safetensors")["big"], tensors["big"])


def test_two_tensors_of_one_name_are_an_error(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / "in.safetensors")
    copies = copies_of(read_checkpoint([tmp_path / "in.safetensors"]))
    with pytest.raises(CheckpointError, match="a: two tensors would get this name"):
        write_tensor_copies(tmp_path / "out.safetensors", copies * 2, {})
    assert not (tmp_path / "out.safetensors").exists()


def test_a_piece_must_fill_its_tensor(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2, 3)}, tmp_path / "in.safetensors")
    source = read_checkpoint([tmp_path / "in.safetensors"])
    with pytest.raises(ValueError, match="a: its pieces have 24 bytes, not those of its shape"):
        TensorCopy("a", "F32", (2, 4), (piece_of(source, "a"),))
    with pytest.raises(ValueError, match="only a matrix in one piece can be transposed"):
        TensorCopy("a", "F32", (6,), (piece_of(source, "a"),), transposed=True)


@pytest.mark.parametrize("change", ["cut", "grown", "touched", "replaced"])
def test_an_input_that_changes_is_caught(tmp_path: Path, change: str) -> None:
    path = tmp_path / "in.safetensors"
    save_file({"a": torch.zeros(1000)}, path)
    copies = copies_of(read_checkpoint([path]))
    if change == "cut":
        os.truncate(path, 500)
    elif change == "grown":
        with path.open("ab") as file:
            file.write(b"more")
    elif change == "touched":
        os.utime(path, ns=(1, 1))
    else:
        path.rename(tmp_path / "old.safetensors")
        save_file({"a": torch.ones(1000)}, path)
    with pytest.raises(IntegrityError, match=r"in\.safetensors changed while it was in use"):
        write_tensor_copies(tmp_path / "out.safetensors", copies, {})


def test_a_stopped_copy_never_opens(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1000), "b": torch.ones(1000)}, tmp_path / "in.safetensors")
    copies = copies_of(read_checkpoint([tmp_path / "in.safetensors"]))
    stop = threading.Event()
    with pytest.raises(StoppedError):
        write_tensor_copies(
            tmp_path / "out.safetensors",
            copies,
            {},
            on_bytes=lambda count: stop.set(),
            stop=stop,
        )
    with pytest.raises(CheckpointError):
        read_checkpoint([tmp_path / "out.safetensors"])


def test_an_existing_output_is_not_touched(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(10)}, tmp_path / "in.safetensors")
    copies = copies_of(read_checkpoint([tmp_path / "in.safetensors"]))
    (tmp_path / "out.safetensors").write_bytes(b"mine")
    with pytest.raises(OutputError, match="File exists"):
        write_tensor_copies(tmp_path / "out.safetensors", copies, {})
    assert (tmp_path / "out.safetensors").read_bytes() == b"mine"
