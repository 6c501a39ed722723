"""Checkpoints of torch.save as tables of tensors; torch.load(weights_only=True) is the oracle."""

from __future__ import annotations

import collections
import fractions
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from merge.errors import CheckpointError, MergeError
from merge.reader.checkpoint import (
    Checkpoint,
    CheckpointFile,
    FileReader,
    read_checkpoint,
    read_header,
    read_scalar,
    verify_records,
)
from tests.archives import (
    ORDERED,
    checkpoint,
    mapping,
    name,
    number,
    numbers,
    program,
    sequence,
    storage,
    tensor,
    text,
)

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.uint16: "U16",
    torch.uint32: "U32",
    torch.uint64: "U64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}


def save(folder: Path, tree: Any, suffix: str = ".bin", **options: Any) -> Path:
    path = folder / f"model{suffix}"
    torch.save(tree, path, **options)
    return path


def read(path: Path) -> CheckpointFile:
    return read_header(path, allow_pickle=True)


def raw(value: torch.Tensor) -> bytes:
    """Return a tensor's bytes in row order, by torch alone."""
    flat = value.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def assert_same(file: CheckpointFile, expected: dict[str, torch.Tensor]) -> None:
    """Compare every tensor with torch's, bit for bit."""
    assert {spec.name for spec in file.header.tensors} == set(expected)
    with FileReader(file.path, file.stamp) as reader:
        for spec in file.header.tensors:
            value = expected[spec.name]
            assert (spec.dtype, spec.shape) == (DTYPES[value.dtype], tuple(value.shape))
            assert reader.read(spec.start, spec.size_bytes) == raw(value)


# What is read ----------------------------------------------------------------------------------


@st.composite
def state_dicts(draw: st.DrawFn) -> dict[str, torch.Tensor]:
    """Draw tensors of any dtype and shape; some share storages, some are views into one."""
    seed = draw(st.integers(0, 2**32 - 1))
    generator = np.random.default_rng(seed)
    tree: dict[str, torch.Tensor] = {}
    for index in range(draw(st.integers(1, 5))):
        dtype = draw(st.sampled_from(list(DTYPES)))
        shape = tuple(draw(st.lists(st.integers(0, 4), max_size=4)))
        rows = draw(st.integers(0, 3))
        whole = (shape[0] + rows, *shape[1:]) if shape else shape
        data = generator.integers(0, 2, int(np.prod(whole)) * dtype.itemsize, dtype=np.uint8)
        if dtype != torch.bool:
            data = data * generator.integers(1, 128, data.shape, dtype=np.uint8)
        value = torch.from_numpy(data).view(dtype) if data.size else torch.empty(0, dtype=dtype)
        value = value.reshape(whole)
        first = draw(st.integers(0, rows)) if shape else 0
        view = value[first : first + shape[0]] if shape else value
        tree[f"block.{index}.weight"] = view
        kind = draw(st.sampled_from(["alone", "tied", "parameter", "rest"]))
        if kind == "tied":
            tree[f"tied.{index}"] = view
        elif kind == "rest" and shape:
            tree[f"whole.{index}"] = value
        elif kind == "parameter" and dtype.is_floating_point:
            tree[f"parameter.{index}"] = torch.nn.Parameter(view, draw(st.booleans()))
    return tree


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@given(
    state_dicts(),
    st.sampled_from([2, 3, 4, 5]),
    st.booleans(),
    st.booleans(),
)
def test_every_tensor_is_the_one_that_torch_loads(
    tmp_path_factory: pytest.TempPathFactory,
    tree: dict[str, torch.Tensor],
    protocol: int,
    is_ordered: bool,
    is_nested: bool,
) -> None:
    state: Any = collections.OrderedDict(tree) if is_ordered else tree
    if is_ordered:
        state._metadata = {"": {"version": 1}}
    whole = {"epoch": 3, "state_dict": state, "loss": 0.5} if is_nested else state
    path = save(tmp_path_factory.mktemp("state"), whole, pickle_protocol=protocol)
    file = read(path)
    verify_records(path, file.stamp)
    # torch's own restricted reader stops at protocol 3; these files are our own.
    loaded = torch.load(path, weights_only=protocol <= 3)
    assert_same(file, loaded["state_dict"] if is_nested else loaded)
    assert [key for key, _ in file.left_out] == (["epoch", "loss"] if is_nested else [])
    assert (file.is_pickle, file.header.metadata) == (True, {})


def test_a_training_checkpoint(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(4, 8, 3), torch.nn.BatchNorm2d(8))
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 4, 5, 5)).sum().backward()
    optimizer.step()
    tree = {
        "epoch": 168,
        "global_step": 2**40,
        "pytorch-lightning_version": "1.4.2",
        "state_dict": model.state_dict(),
        "optimizer_states": [optimizer.state_dict()],
        "lr": np.float64(0.1),
        "callbacks": {"best": fractions.Fraction(1, 3), "kinds": {1, 2}, "frozen": frozenset("a")},
        "hyper_parameters": collections.defaultdict(list, a=[1, (2.5, None)]),
        "bytes": b"\0\xff",
        "buffer": bytearray(b"abc"),
        "dtype": torch.float16,
        "size": torch.Size([2, 3]),
        "device": torch.device("cuda:0"),
        "date": complex(1, 2),
        "class": fractions.Fraction,
        7: "seven",
    }
    for protocol in (2, 4):
        file = read(save(tmp_path, tree, ".ckpt", pickle_protocol=protocol))
        assert_same(file, model.state_dict())
        left_out = dict(file.left_out)
        assert list(left_out) == [
            *(str(key) for key in tree if key not in ("state_dict", 7)),
            *("an integer", "data.pkl"),
        ]
        assert left_out["optimizer_states"] == "a list of 1, outside of state_dict"
        assert left_out["class"] == (
            "a reference to fractions.Fraction (not imported), outside of state_dict"
        )
        assert "fractions.Fraction" in left_out["data.pkl"]
        assert left_out["an integer"] == "a text, outside of state_dict"


def test_plain_values_in_a_state_dict_are_named(tmp_path: Path) -> None:
    tree = {"a": torch.ones(2), "step": 7, "names": ["x"], "more": {"b": torch.ones(3)}, "no": None}
    assert read(save(tmp_path, tree)).left_out == (
        ("step", "an integer, no tensor"),
        ("names", "a list of 1, no tensor"),
        ("more", "a dictionary of 1, no tensor"),
        ("no", "None, no tensor"),
    )


def test_records_that_nothing_refers_to_are_named(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    data = {"0": bytes(24), "spare": b"code"}
    path.write_bytes(checkpoint(program(mapping(w=tensor())), data))
    assert read(path).left_out == (("data/spare", "a record that nothing refers to"),)


def test_many_unknown_names_are_counted(tmp_path: Path) -> None:
    classes = [name("lightning", f"Class{index}") for index in range(11)]
    tree = mapping(a=sequence(*classes), state_dict=mapping(w=tensor()))
    path = tmp_path / "model.bin"
    path.write_bytes(checkpoint(program(tree)))
    assert read(path).left_out[-1][1].endswith("lightning.Class7 and 3 more (not imported)")


def test_old_rebuilding_and_tensors_of_cuda(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    old = tensor(storage(place="cuda:0"), function="_rebuild_tensor")
    more = tensor(more=[b"}"])
    size = tensor(shape=name("torch", "Size") + sequence(numbers(2, 3)) + b"R")
    parameter = name("torch._utils", "_rebuild_parameter_with_state") + sequence(
        tensor(), b"\x88", ORDERED, b"}"
    )
    tree = mapping(old=old, more=more, size=size, parameter=parameter + b"R")
    path.write_bytes(checkpoint(program(tree)))
    loaded = torch.load(path, weights_only=True, map_location="cpu")
    assert_same(read(path), {key: value.detach() for key, value in loaded.items()})


def test_layouts_that_are_row_order_in_the_end(tmp_path: Path) -> None:
    tree = {
        # A 1x1 convolution in channels_last: the strides differ, the order does not.
        "conv": torch.arange(12.0).reshape(3, 4, 1, 1).to(memory_format=torch.channels_last),
        "row": torch.arange(12.0).reshape(3, 4)[:, :1][:1],
        "empty": torch.empty(0, 3).t(),
        "scalar": torch.tensor(5.0).expand(()),
        "one": torch.tensor([5.0]).expand(1),
    }
    path = save(tmp_path, tree)
    assert_same(read(path), torch.load(path, weights_only=True))


def test_scalars_of_pickles(tmp_path: Path) -> None:
    path = save(tmp_path, {"x.alpha": torch.tensor(16.5), "b": torch.tensor([2.5]).bfloat16()})
    file = read(path)
    values = {spec.name: read_scalar(file, spec) for spec in file.header.tensors}
    assert values == {"x.alpha": 16.5, "b": 2.5}


def test_shards_of_pickles(tmp_path: Path) -> None:
    for part, key in ((1, "a"), (2, "b")):
        torch.save({key: torch.full((3,), float(part)), "n": part}, tmp_path / f"{part}.bin")
    found: Checkpoint = read_checkpoint([tmp_path / "1.bin", tmp_path / "2.bin"], allow_pickle=True)
    assert found.shapes == {"a": (3,), "b": (3,)}
    assert found.left_out == (("n", "an integer, no tensor"),) * 2
    torch.save({"a": torch.ones(3)}, tmp_path / "2.bin")
    with pytest.raises(CheckpointError, match=r"a is in two shards: 1\.bin, 2\.bin"):
        read_checkpoint([tmp_path / "1.bin", tmp_path / "2.bin"], allow_pickle=True)


# What is refused -------------------------------------------------------------------------------

KIND = name("torch", "FloatStorage")
UNTYPED = name("torch.storage", "UntypedStorage")


def v3(kind: bytes, dtype: bytes) -> bytes:
    return tensor(storage(kind, count=24), function="_rebuild_tensor_v3", more=[dtype])


TENSORS: dict[str, tuple[bytes, str]] = {
    "a stride of 0": (
        tensor(shape=numbers(2**20, 2**20), stride=numbers(0, 0)),
        r"repeats elements \(shape \[1048576, 1048576\], strides \[0, 0\]\)",
    ),
    "one stride of 0": (tensor(stride=numbers(0, 1)), "repeats elements"),
    "negative strides": (tensor(stride=numbers(-3, -1)), "no tuples of integers"),
    "overlapping rows": (tensor(stride=numbers(1, 1)), "is not in row order"),
    "transposed": (tensor(stride=numbers(1, 2)), "is not in row order"),
    "gaps": (tensor(stride=numbers(6, 2)), "is not in row order"),
    "a negative offset": (tensor(offset=number(-1)), r"outside of its record data/0"),
    "an offset past the end": (tensor(offset=number(1)), "outside of its record"),
    "a huge offset": (tensor(offset=number(2**62)), "outside of its record"),
    "an offset of True": (tensor(offset=b"\x88"), "its parts are not those of a tensor"),
    "an offset in text": (tensor(offset=text("0")), "its parts are not those of a tensor"),
    "a shape past the end": (tensor(shape=numbers(3, 3)), "outside of its record"),
    "a huge shape": (tensor(shape=numbers(2**62, 3)), "is impossible"),
    "a shape that overflows": (
        tensor(shape=numbers(2**40, 2**40), stride=numbers(2**40, 1)),
        "is impossible",
    ),
    "a shape of thousands of digits": (
        tensor(shape=sequence(b"\x8a\xff" + b"\x7f" * 255, number(3))),
        r"shape \['huge', 3\] is impossible",
    ),
    "a negative shape": (tensor(shape=numbers(-2, -3)), "no tuples of integers"),
    "a shape of True": (tensor(shape=sequence(b"\x88", number(6))), "no tuples of integers"),
    "a shape of numbers with a point": (
        tensor(shape=sequence(b"G@\0\0\0\0\0\0\0", number(3))),
        "no tuples of integers",
    ),
    "a shape in a list": (tensor(shape=b"]"), "no tuples of integers"),
    "a shape without strides": (tensor(stride=numbers(1)), "no tuples of integers"),
    "17 dimensions": (
        tensor(shape=numbers(*[1] * 17), stride=numbers(*[1] * 17)),
        "no tuples of integers",
    ),
    "no storage": (tensor(number(0)), "its parts are not those of a tensor"),
    "a tensor as a storage": (tensor(tensor()), "its parts are not those of a tensor"),
    "a storage that is stated smaller": (
        tensor(storage(count=5)),
        "data/0 has 24 bytes, and 20 are stated",
    ),
    "a storage that is stated larger": (
        tensor(storage(count=2**60)),
        "data/0 has 24 bytes, and 4,611,686,018,427,387,904 are stated",
    ),
    "a storage of another width": (
        tensor(storage(name("torch", "DoubleStorage"))),
        "data/0 has 24 bytes, and 48 are stated",
    ),
    "no such record": (tensor(storage(key="7")), "its record data/7 is missing"),
    "a record elsewhere": (tensor(storage(key="../version")), r"data/\.\./version is missing"),
    "a record with a control character": (
        tensor(storage(key="\x1b[2J")),
        r"data/'\\x1b\[2J' is missing",
    ),
    "complex numbers": (
        tensor(storage(name("torch", "ComplexFloatStorage"))),
        "ComplexFloatStorage cannot be read",
    ),
    "quantised numbers": (
        tensor(storage(name("torch", "QInt8Storage"))),
        r"torch\.QInt8Storage cannot be read",
    ),
    "an unknown storage": (tensor(storage(name("torch", "Tensor"))), r"torch\.Tensor cannot"),
    "somebody's storage": (tensor(storage(name("x", "FloatStorage"))), r"x\.FloatStorage cannot"),
    "a storage without a dtype": (tensor(storage(UNTYPED, count=24)), "UntypedStorage cannot"),
    "an untyped complex tensor": (v3(UNTYPED, name("torch", "complex64")), r"torch\.complex64 can"),
    "an unknown dtype": (v3(UNTYPED, name("torch", "float4")), r"torch\.float4 cannot be read"),
    "somebody's dtype": (v3(UNTYPED, name("x", "float32")), r"x\.float32 cannot be read"),
    "a dtype that is a number": (v3(UNTYPED, number(3)), "UntypedStorage cannot be read"),
    "a typed storage with a dtype": (v3(KIND, name("torch", "float32")), "FloatStorage cannot"),
    "hooks": (tensor(hooks=mapping(a=number(1))), "it has hooks, which are code"),
    "hooks that are no dictionary": (tensor(hooks=b"N"), "it has hooks, which are code"),
    "too few arguments": (
        name("torch._utils", "_rebuild_tensor_v2") + sequence(storage()) + b"R",
        r"is an object of torch\._utils\._rebuild_tensor_v2",
    ),
    "too many arguments": (
        tensor(more=[b"N", b"N", b"N"]),
        r"is an object of torch\._utils\._rebuild_tensor_v2",
    ),
    "a parameter of nothing": (
        name("torch._utils", "_rebuild_parameter") + sequence(b"N", b"\x88", ORDERED) + b"R",
        r"is an object of torch\._utils\._rebuild_parameter",
    ),
    "a parameter with hooks": (
        name("torch._utils", "_rebuild_parameter") + sequence(tensor(), b"\x88", b"N") + b"R",
        "it has hooks",
    ),
    "a parameter with attributes": (
        name("torch._utils", "_rebuild_parameter_with_state")
        + sequence(tensor(), b"\x88", ORDERED, mapping(data=tensor()))
        + b"R",
        r"is an object of torch\._utils\._rebuild_parameter_with_state",
    ),
    "negated": (tensor(more=[mapping(neg=b"\x88")]), "it is negated or conjugated"),
    "negated, with a dtype": (
        tensor(
            storage(UNTYPED, count=24),
            function="_rebuild_tensor_v3",
            more=[name("torch", "float32"), mapping(neg=b"\x88")],
        ),
        "it is negated or conjugated",
    ),
    "metadata that is no dictionary": (tensor(more=[b"N"]), "it is negated or conjugated"),
    "a storage alone": (mapping(x=storage()), "no tensors"),
}


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_that_are_refused_by_name(tmp_path: Path, case: str) -> None:
    value, message = TENSORS[case]
    path = tmp_path / "model.bin"
    whole = value if case == "a storage alone" else mapping(**{"unet.w": value})
    path.write_bytes(checkpoint(program(whole)))
    with pytest.raises(CheckpointError, match=message) as caught:
        read(path)
    if case != "a storage alone":
        assert f"{path}: unet.w" in caught.value.message
    assert "\x1b" not in str(caught.value)


REAL: dict[str, Any] = {
    "transposed": lambda: torch.ones(3, 4).t(),
    "channels_last": lambda: torch.ones(2, 3, 4, 4).to(memory_format=torch.channels_last),
    "expanded": lambda: torch.ones(1, 4).expand(1000, 4),
    "strided": lambda: torch.ones(10)[::2],
    "complex": lambda: torch.ones(2, dtype=torch.complex64),
    "conjugated": lambda: torch.ones(2, dtype=torch.complex64).conj(),
    "meta": lambda: torch.ones(10**12, device="meta"),
    "sparse": lambda: torch.eye(3).to_sparse(),
    "quantised": lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
    "a module": lambda: torch.nn.Linear(2, 2),
}


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", REAL)
def test_what_torch_itself_writes_and_no_merge_can_use(tmp_path: Path, kind: str) -> None:
    path = save(tmp_path, {"good": torch.ones(2), "unet.w": REAL[kind]()})
    with pytest.raises(CheckpointError, match=rf"{path}: unet\.w\b") as caught:
        read(path)
    assert "weights_only=True" in caught.value.hint


WHOLES: dict[str, tuple[bytes, str]] = {
    "a list": (b"]", "it holds a list of 0, not a state dict"),
    "a tensor": (tensor(), "it holds a tensor, not a state dict"),
    "a module": (name("my", "Net") + b")R", r"it holds an object of my\.Net \(not imported\)"),
    "nothing": (b"}", "it has no tensors"),
    "no tensors": (mapping(a=number(1)), r"no tensors, .* \(there is a\)"),
    "tensors under another name": (
        mapping(model=mapping(w=tensor()), epoch=number(1)),
        r"neither in its outermost dictionary nor under state_dict \(there is model, epoch\)",
    ),
    "a state dict in a state dict": (
        mapping(state_dict=mapping(state_dict=mapping(w=tensor()))),
        "no tensors",
    ),
    "a state dict that is a list": (mapping(state_dict=b"]"), "not one dictionary of tensors"),
    "two state dicts": (
        b"}("
        + text("state_dict")
        + mapping(w=tensor())
        + text("state_dict")
        + mapping(v=tensor())
        + b"u",
        "not one dictionary of tensors",
    ),
    "one name twice": (
        b"}(" + text("w") + tensor() + text("w") + tensor(storage(key="0")) + b"u",
        "w is there twice",
    ),
    "an integer as a key": (b"}(" + number(3) + tensor() + b"u", "has an integer as a key"),
    "a nested tuple as a key": (
        b"}(" + b")" + b"\x85" * 1000 + tensor() + b"u",
        "has a tuple of 1 as a key",
    ),
    "an empty name": (b"}(" + text("") + tensor() + b"u", "tensor name '' has 0 bytes"),
    "a control character": (mapping(**{"a\x1b[2J": tensor()}), "has a control character"),
    "a lone surrogate": (
        b"}(X\3\0\0\0\xed\xa0\x80" + tensor() + b"u",
        "has a lone surrogate",
    ),
    "a way out": (mapping(**{"../x": tensor()}), "climbs out of its folder"),
}


@pytest.mark.parametrize("case", WHOLES)
def test_checkpoints_that_are_no_state_dict(tmp_path: Path, case: str) -> None:
    value, message = WHOLES[case]
    path = tmp_path / "model.ckpt"
    path.write_bytes(checkpoint(program(value)))
    with pytest.raises(CheckpointError, match=message):
        read(path)


def test_one_storage_of_two_kinds(tmp_path: Path) -> None:
    """torch gives the second tensor the first one's dtype; no other reader would."""
    other = tensor(storage(name("torch", "IntStorage")))
    path = tmp_path / "model.bin"
    path.write_bytes(checkpoint(program(mapping(a=tensor(), b=other))))
    assert torch.load(path, weights_only=True)["b"].dtype == torch.float32
    with pytest.raises(CheckpointError, match="two kinds of the storage 0"):
        read(path)


def test_negated_numbers_are_not_read_as_they_lie(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(checkpoint(program(mapping(w=tensor(more=[mapping(neg=b"\x88")])))))
    plain = tmp_path / "plain.bin"
    plain.write_bytes(checkpoint(program(mapping(w=tensor()))))
    loaded, other = (torch.load(file, weights_only=True)["w"] for file in (path, plain))
    assert torch.equal(loaded, -other)
    with pytest.raises(CheckpointError, match="w: it is negated"):
        read(path)


# Other files -----------------------------------------------------------------------------------


def test_pickles_are_refused_unless_allowed(tmp_path: Path) -> None:
    path = save(tmp_path, {"w": torch.ones(2)})
    renamed = path.rename(tmp_path / "model.safetensors")
    for file in (renamed, save(tmp_path, {"w": torch.ones(2)})):
        with pytest.raises(CheckpointError, match="this is no safetensors file") as caught:
            read_header(file)
        assert "allow_pickle: true" in caught.value.hint
    # The bytes decide, not the name.
    assert read(renamed).is_pickle


def test_legacy_files_name_the_safe_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = {"state_dict": {"a": torch.ones(3), "t": torch.ones(2, 3).t()}}
    path = save(tmp_path, tree, ".ckpt", _use_new_zipfile_serialization=False)
    with pytest.raises(
        CheckpointError, match=r"pickle of PyTorch before 1\.6.* not read"
    ) as caught:
        read(path)
    # The hint's line does what it says.
    program_text = caught.value.hint.split(' -c "')[1].rstrip('"')
    monkeypatch.chdir(tmp_path)
    exec(program_text)
    assert read_checkpoint([tmp_path / "model.safetensors"]).shapes == {"a": (3,), "t": (3, 2)}


FOREIGN: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "no zip archive"),
    "a tar": (b"\0" * 257 + b"ustar\x0000" + b"\0" * 600, r"a tar file of PyTorch 0\.1"),
    "an HTML page": (b"<!DOCTYPE html><html>", "an HTML page, probably a failed download"),
    "a Git LFS pointer": (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
    "zeros": (b"\0" * 4096, "all zeros, probably an unfinished download"),
    "a GGUF": (b"GGUF" + b"\1" * 60, "a GGUF file"),
    "a pickle": (b"\x80\x04}.", "a bare Python pickle"),
    "a pickle of protocol 0": (b"(dp0\nS'a'\np1\nI1\ns.", "a bare Python pickle"),
    "an empty zip": (b"PK\5\6" + b"\0" * 18, "an empty zip archive"),
    "noise": (bytes(range(97, 123)), "no zip archive, as torch.save writes them"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_files_that_are_something_else(tmp_path: Path, kind: str) -> None:
    data, message = FOREIGN[kind]
    for suffix in (".bin", ".ckpt", ".pt", ".pth"):
        path = tmp_path / f"model{suffix}"
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match=message):
            read(path)


def test_a_safetensors_file_with_a_wrong_name(tmp_path: Path) -> None:
    path = tmp_path / "model.ckpt"
    save_file({"w": torch.ones(2)}, path)
    with pytest.raises(
        CheckpointError, match=r"it is a safetensors file\s*hint: give it the suffix"
    ):
        read(path)


# Mutations -------------------------------------------------------------------------------------


def test_mutated_pickles_are_refused_or_read_as_torch_reads_them(tmp_path: Path) -> None:
    """Changed pickles with a right checksum: an error of ours, or what torch loads too."""
    generator = random.Random(0)
    flat = tensor(storage(place="cuda:12345"), shape=numbers(6), stride=numbers(1))
    state = {"down_blocks.0.resnets.0.conv1.weight": tensor(), "up_blocks.0.bias": flat}
    good = program(mapping(state_dict=mapping(**state), hyper_parameters=text("any" * 30)))
    path = tmp_path / "model.bin"
    read_count = 0
    for _ in range(1500):
        data = bytearray(good)
        for _ in range(generator.choice([1, 1, 1, 2, 3])):
            position = generator.randrange(len(data))
            match generator.randrange(3):
                case 0:
                    data[position] = generator.randrange(256)
                case 1:
                    del data[position]
                case 2:
                    data.insert(position, data[generator.randrange(len(data))])
        path.write_bytes(checkpoint(bytes(data)))
        try:
            file = read(path)
        except MergeError:
            continue
        read_count += 1
        size = path.stat().st_size
        assert all(s.start > 0 and s.start + s.size_bytes <= size for s in file.header.tensors)
        try:
            loaded = torch.load(path, weights_only=True)
        except Exception:
            # torch refuses values beside the state dict that are only named here.
            continue
        state = loaded.get("state_dict", loaded)
        values = {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}
        assert_same(file, values)
    assert read_count > 50
