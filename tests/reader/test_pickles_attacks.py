"""Pickles that attack: nothing of them ever runs, wherever the payload sits.

Each payload would create a file, the canary, or import a module that does. A test at the end shows
that Python's own pickle does run them, so that a canary that is absent means something.
"""

from __future__ import annotations

import os
import pickle
import struct
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from merge.errors import CheckpointError
from merge.reader.checkpoint import CheckpointFile, read_header
from merge.reader.pickles.machine import MAX_PICKLE_BYTES, MAX_STEPS, unpickle
from tests.archives import (
    ORDERED,
    checkpoint,
    mapping,
    name,
    number,
    program,
    sequence,
    storage,
    tensor,
    text,
)

MODULE = "canary_of_a_pickle"


@pytest.fixture
def canary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Give the file that payloads would create, and watch that nothing does."""
    path = tmp_path / "canary"
    (tmp_path / f"{MODULE}.py").write_text(
        f"open({str(path)!r}, 'w').close()\n"
        "class Thing:\n    def __setstate__(self, state):\n        pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield path
    assert not path.exists()
    assert MODULE not in sys.modules


def touch(canary: Path) -> bytes:
    return text(f"touch {canary}")


def code(canary: Path) -> bytes:
    return text(f"open({str(canary)!r}, 'w').close()")


def by_stack(module: str, attribute: str) -> bytes:
    return text(module) + text(attribute) + b"\x93"


def short(value: str) -> bytes:
    return b"\x8c" + bytes([len(value)]) + value.encode()


THING = name(MODULE, "Thing")
PAYLOADS: dict[str, Callable[[Path], bytes]] = {
    "os.system": lambda c: name("os", "system") + touch(c) + b"\x85R",
    "posix.system": lambda c: name("posix", "system") + touch(c) + b"\x85R",
    "nt.system": lambda c: name("nt", "system") + touch(c) + b"\x85R",
    "subprocess": lambda c: name("subprocess", "getoutput") + touch(c) + b"\x85R",
    "eval": lambda c: name("builtins", "eval") + code(c) + b"\x85R",
    "exec of Python 2": lambda c: name("__builtin__", "exec") + code(c) + b"\x85R",
    "stack global": lambda c: by_stack("os", "system") + touch(c) + b"\x85R",
    "short stack global": lambda c: short("os") + short("system") + b"\x93" + touch(c) + b"\x85R",
    "names from the memo": lambda c: (
        sequence(text("os") + b"q\x05", text("system") + b"r\0\1\0\0")
        + b"q\x06"
        + sequence(b"h\x05j\0\1\0\0\x93" + touch(c) + b"\x85R")
        + b"\x86"
    ),
    "a dotted name": lambda c: by_stack("torch", "os.system") + touch(c) + b"\x85R",
    "torch's own os": lambda c: name("torch.serialization", "os.system") + touch(c) + b"\x85R",
    "torch.load": lambda c: name("torch", "load") + touch(c) + b"\x85R",
    "a chain of getattr": lambda c: (
        name("builtins", "getattr")
        + sequence(name("torch._utils", "_rebuild_tensor_v2"), text("__globals__"))
        + b"R"
        + touch(c)
        + b"\x85R"
    ),
    "import": lambda c: name("builtins", "__import__") + text(MODULE) + b"\x85R",
    "import by name": lambda c: name("importlib", "import_module") + text(MODULE) + b"\x85R",
    "partial": lambda c: (
        name("functools", "partial") + name("os", "system") + touch(c) + b"\x86R)R"
    ),
    "a class": lambda c: THING,
    "an object": lambda c: THING + b")R",
    "an object by NEWOBJ": lambda c: THING + b")\x81",
    "an object by NEWOBJ_EX": lambda c: THING + b")}\x92",
    "an object by INST": lambda c: b"(" + touch(c) + b"ios\nsystem\n",
    "an object by OBJ": lambda c: b"(" + THING + b"o",
    "a state for __setstate__": lambda c: THING + b")R}b",
    "a state for a dictionary": lambda c: b"}" + THING + b"b",
    "an extension": lambda c: b"\x82\x01",
    "a wide extension": lambda c: b"\x84\1\0\0\0",
    "a persistent id in text": lambda c: b"Pos.system\n",
    "a persistent id of a class": lambda c: sequence(text("storage"), THING) + b"Q",
    "a pickle in a pickle": lambda c: (
        name("_pickle", "loads")
        + b"B"
        + struct.pack("<I", len(inner := program(name("os", "system") + touch(c) + b"\x85R")))
        + inner
        + b"\x85R"
    ),
    "numpy's runstring": lambda c: (
        name("numpy.testing._private.utils", "runstring") + code(c) + b"}\x86R"
    ),
    "pydoc": lambda c: name("pydoc", "pipepager") + text("x") + touch(c) + b"\x86R",
    "torch's importer": lambda c: (
        name("torch._utils", "_import_dotted_name") + text(MODULE) + b"\x85R"
    ),
    "cProfile": lambda c: name("cProfile", "run") + code(c) + b"\x85R",
    "protocol 0": lambda c: b"cos\nsystem\n(S'touch " + str(c).encode() + b"'\ntR",
}
# Where a payload is put, and whether what is left may still be a model.
PLACES: dict[str, tuple[Callable[[bytes], bytes], bool]] = {
    "instead of all": (lambda p: p, False),
    "as a tensor": (lambda p: mapping(w=tensor(), x=p), False),
    "as a parameter's data": (
        lambda p: mapping(
            w=name("torch._utils", "_rebuild_parameter") + sequence(p, b"\x88", ORDERED) + b"R"
        ),
        False,
    ),
    "as the state dict": (lambda p: mapping(state_dict=p), False),
    "beside the state dict": (lambda p: mapping(a=p, state_dict=mapping(w=tensor())), True),
    "as a key": (lambda p: b"}(" + text("w") + tensor() + p + b"Nu", False),
    "as hooks": (lambda p: mapping(w=tensor(hooks=p)), False),
    "as a storage": (lambda p: mapping(w=tensor(p)), False),
    "as a storage's class": (lambda p: mapping(w=tensor(storage(p))), False),
    "as a shape": (lambda p: mapping(w=tensor(shape=p)), False),
    "as a function": (lambda p: mapping(w=p + b")R", v=tensor()), False),
    "as metadata": (
        lambda p: ORDERED + b"(" + text("w") + tensor() + b"u" + mapping(_metadata=p) + b"b",
        True,
    ),
    "thrown away": (lambda p: p + b"0" + mapping(w=tensor()), False),
    "behind a mark": (lambda p: b"(" + p + b"1" + mapping(w=tensor()), False),
    "kept in the memo": (lambda p: p + b"\x940" + mapping(w=tensor()), False),
    "after the end": (lambda p: mapping(w=tensor()) + b"." + p, False),
}
# Not even harmless beside a state dict: known from attacks, or an opcode that no model has.
ALWAYS_REFUSED = {
    *("os.system", "posix.system", "nt.system", "subprocess", "eval", "exec of Python 2"),
    *("stack global", "short stack global", "names from the memo", "import", "import by name"),
    *("partial", "an object by INST", "an object by OBJ", "a state for a dictionary"),
    *("an extension", "a wide extension", "a persistent id in text"),
    *("a persistent id of a class", "a pickle in a pickle", "protocol 0"),
}


def read(folder: Path, data: bytes) -> CheckpointFile:
    path = folder / "model.bin"
    path.write_bytes(data)
    return read_header(path, allow_pickle=True)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("payload", PAYLOADS)
def test_no_payload_runs(tmp_path: Path, canary: Path, payload: str, place: str) -> None:
    wrap, may_remain = PLACES[place]
    data = checkpoint(program(wrap(PAYLOADS[payload](canary)), 4))
    if may_remain and payload not in ALWAYS_REFUSED:
        file = read(tmp_path, data)
        assert [spec.name for spec in file.header.tensors] == ["w"]
        # What is not taken is said.
        assert any("(not imported)" in reason for _, reason in file.left_out)
    else:
        with pytest.raises(CheckpointError, match=r"model\.bin: ") as caught:
            read(tmp_path, data)
        assert "hint: " in str(caught.value)


@pytest.mark.parametrize("payload", ["os.system", "eval", "names from the memo", "partial"])
def test_a_known_attack_is_called_one(tmp_path: Path, canary: Path, payload: str) -> None:
    state = mapping(callbacks=PAYLOADS[payload](canary), state_dict=mapping(w=tensor()))
    with pytest.raises(CheckpointError, match=r"names (os|builtins)\.\w+, .*may be an attack"):
        read(tmp_path, checkpoint(program(state)))


def test_the_state_dict_names_an_unknown_class(tmp_path: Path, canary: Path) -> None:
    data = checkpoint(program(mapping(w=tensor(), evil=THING + b")R")))
    with pytest.raises(CheckpointError, match=rf"evil is an object of {MODULE}\.Thing"):
        read(tmp_path, data)


@pytest.mark.parametrize("kind", ["legacy", "protocol 0", "protocol 4", "torch"])
def test_bare_pickles_are_not_run(tmp_path: Path, canary: Path, kind: str) -> None:
    payload = PAYLOADS["os.system"](canary)
    magic = b"\x8a\x0a" + 0x1950A86A20F9469CFC6C.to_bytes(10, "little")
    data = {
        "legacy": program(magic) + program(number(1001)) + program(payload),
        "protocol 0": PAYLOADS["protocol 0"](canary) + b".",
        "protocol 4": program(payload, 4),
        "torch": program(magic) + program(payload),
    }[kind]
    with pytest.raises(CheckpointError, match="not read"):
        read(tmp_path, data)


@pytest.mark.parametrize(
    "payload",
    ["os.system", "eval", "names from the memo", "import", "an object", "a pickle in a pickle"],
)
def test_python_would_have_run_it(tmp_path: Path, payload: str) -> None:
    path = tmp_path / "canary"
    (tmp_path / f"{MODULE}.py").write_text(f"open({str(path)!r}, 'w').close()\nclass Thing: pass\n")
    data = program(PAYLOADS[payload](path), 4)
    script = "import pickle, sys; pickle.loads(sys.stdin.buffer.read())"
    subprocess.run([sys.executable, "-c", script], input=data, cwd=tmp_path, check=False)
    assert path.exists()


@pytest.mark.parametrize("command", ["show", "run"])
def test_the_command_line_runs_nothing(tmp_path: Path, command: str) -> None:
    path = tmp_path / "canary"
    (tmp_path / f"{MODULE}.py").write_text(f"open({str(path)!r}, 'w').close()\n")
    payload = sequence(PAYLOADS["an object"](path), PAYLOADS["torch's own os"](path))
    model = tmp_path / "model.ckpt"
    model.write_bytes(checkpoint(program(mapping(a=payload, state_dict=mapping(w=tensor())))))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "name: x\nallow_pickle: true\n"
        "models: {base: ./model.ckpt, distilled: ./model.ckpt, target: ./model.ckpt}\n"
    )
    words = {"show": ["show", str(model)], "run": ["run", str(recipe)]}[command]
    child = subprocess.run(
        [sys.executable, "-m", "merge", *words],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={
            **os.environ,
            "PYTHONPATH": f"{tmp_path}:{Path(__file__).parents[2]}",
            "OMP_NUM_THREADS": "1",
        },
    )
    assert not path.exists()
    # The tensors can be read, and are no UNet.
    assert child.returncode == {"show": 0, "run": 6}[command], child.stderr
    assert "Traceback" not in child.stderr
    if command == "show":
        assert "without running anything of it" in child.stdout
        assert MODULE in child.stdout


def test_the_command_line_refuses_an_attack(tmp_path: Path) -> None:
    path = tmp_path / "canary"
    model = tmp_path / "model.ckpt"
    model.write_bytes(checkpoint(program(PAYLOADS["os.system"](path))))
    child = subprocess.run(
        [sys.executable, "-m", "merge", "show", str(model)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert not path.exists()
    assert child.returncode == 5
    assert "names os.system" in child.stderr
    assert "nothing of it was run" in child.stderr
    assert child.stderr.splitlines()[-1].startswith("hint: ")


# Bombs -----------------------------------------------------------------------------------------

BOMBS = {
    "a text that is not there": (b"X" + struct.pack("<I", 2**32 - 1), "cut short"),
    "a wide text": (b"\x8d" + struct.pack("<Q", 2**63), "cut short"),
    "wide bytes": (b"\x8e" + struct.pack("<Q", 2**64 - 1), "cut short"),
    "a wide bytearray": (b"\x96" + struct.pack("<Q", 2**40), "cut short"),
    "a frame": (b"\x95" + struct.pack("<Q", 2**60), "cut short"),
    "a long integer": (b"\x8b" + struct.pack("<I", 2**31 - 1), "an integer of 2,147,483,647 bytes"),
    "a long name": (b"c" + b"a" * 600 + b"\nb\n", "a name without an end"),
    "a name without an end": (b"cos", "a name without an end"),
    "a wide memo": (b"Nr\xff\xff\xff\xff", "not a state dict"),
    "deep lists": (b"]" * 20_000 + b"a" * 19_999, "holds a list"),
    "deep tuples": (b")" + b"\x85" * 20_000, "holds a tuple"),
    "deep marks": (b"(" * 20_000 + b"N", "unfinished"),
    "deep dictionaries": (b"}" + (b"K\1}" * 20_000) + b"s" * 20_000, "no tensors"),
    "an unknown value": (b"h\x07", "value 7, which was not kept"),
    "no value": (b"\x85", "more values than there are"),
    "a value behind a mark": (b"N(\x85", "more values than there are"),
    "no mark": (b"t", "needs a mark"),
    "a key without a value": (b"}(Nu", "key without a value"),
    "keys for a list": (b"]NNs", "keys for a list"),
    "keys for a tensor": (tensor() + b"NNs", "keys for a tensor"),
    "items for a dictionary": (b"}Na", "items for a dictionary"),
    "items for a text": (text("x") + b"Na", "items for a text"),
    "a call of a text": (text("x") + b")R", "a call of a text"),
    "a call without a tuple": (name("collections", "OrderedDict") + b"NR", "a call of"),
    "attributes for a tensor": (tensor() + b"}b", "attributes for a tensor"),
    "a second PROTO": (b"N\x80\x02", "PROTO"),
    "two values": (b"NN", "unfinished value"),
    "bad UTF-8": (b"X\1\0\0\0\xff", "not UTF-8"),
    "an unknown opcode": (b"\xff", "opcode 0xff"),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_bombs_fail_fast_and_small(bomb: str) -> None:
    body, message = BOMBS[bomb]
    data = program(body)
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=message):
            _state_dict(data)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 64 * 1024 * 1024


def _state_dict(data: bytes) -> None:
    from merge.reader.pickles.table import _choose_state_dict

    state, _ = _choose_state_dict(unpickle(data).value)
    if not any(isinstance(key, str) for key, _ in state.items):
        raise CheckpointError("no tensors")


def test_the_number_of_steps_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    assert MAX_STEPS < MAX_PICKLE_BYTES
    monkeypatch.setattr("merge.reader.pickles.machine.MAX_STEPS", 1000)
    assert unpickle(program(b"]" + b"Na" * 499)).value == [None] * 499
    with pytest.raises(CheckpointError, match=r"takes more than 1,000 steps"):
        unpickle(program(b"]" + b"Na" * 500))


def test_shared_values_are_not_visited_again(tmp_path: Path) -> None:
    # Ten references to ten references ...: 10^60 values for whoever walks them.
    levels = b"".join(
        b"(" + (b"h" + bytes([level])) * 10 + b"t" + b"q" + bytes([level + 1])
        for level in range(60)
    )
    body = b"(]q\0" + levels + b"t"
    data = checkpoint(program(mapping(laughs=body, state_dict=mapping(w=tensor()))))
    file = read(tmp_path, data)
    assert ("laughs", "a tuple of 61, outside of state_dict") in file.left_out


def test_cycles_end(tmp_path: Path) -> None:
    cyclic = b"}q\0(" + text("self") + b"h\0" + text("w") + tensor() + b"u"
    file = read(tmp_path, checkpoint(program(cyclic)))
    assert [spec.name for spec in file.header.tensors] == ["w"]
    assert file.left_out == (("self", "a dictionary of 2, no tensor"),)
    itself = b"}q\0(" + text("state_dict") + b"h\0" + text("w") + tensor() + b"u"
    assert [spec.name for spec in read(tmp_path, checkpoint(program(itself))).header.tensors] == [
        "w"
    ]


def test_a_pickle_that_is_too_large() -> None:
    with pytest.raises(CheckpointError, match="16,777,217 bytes, more than the 16,777,216 allowed"):
        unpickle(b"\0" * (MAX_PICKLE_BYTES + 1))


@pytest.mark.parametrize("start", [b"", b"\x80", b"\x80\x01", b"\x80\x06", b"(lp0\n.", b"}."])
def test_what_is_no_pickle(start: bytes) -> None:
    with pytest.raises(CheckpointError, match="no pickle of protocol 2 to 5"):
        unpickle(start)


def test_every_opcode_is_known_or_refused_by_name() -> None:
    import pickletools

    from merge.reader.pickles.machine import _STEPS

    names = {ord(op.code): op.name for op in pickletools.opcodes}
    assert set(_STEPS) < set(names)
    for code in set(range(256)) - set(_STEPS) - {ord(".")}:
        with pytest.raises(CheckpointError) as error:
            unpickle(b"\x80\x02" + bytes([code]))
        name = names.get(code, f"{code:#04x}")
        assert error.value.message.startswith(f"data.pkl has the opcode {name}")


def test_the_package_uses_no_unpickler() -> None:
    import ast

    import merge.reader.pickles

    for path in Path(merge.reader.pickles.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            assert not {name.split(".")[0] for name in names} & {
                *("pickle", "_pickle", "importlib", "torch", "zipfile", "subprocess", "os"),
            }
            if isinstance(node, ast.Name):
                assert node.id not in ("eval", "exec", "getattr", "__import__", "compile")


def test_the_oracle_of_the_assembler() -> None:
    value = pickle.loads(program(mapping(a=numbers_of(1, -5, 2**40), b=text("x"))))
    assert value == {"a": (1, -5, 2**40), "b": "x"}


def numbers_of(*values: int) -> bytes:
    return sequence(*map(number, values))
