"""A stack machine for the pickles of `torch.save` that builds descriptions, never objects.

It knows the opcodes that Python's pickler writes at protocols 2 to 5 and no other. There is no
import, no attribute lookup and no call behind any of them: a class or function is its name, a call
of one of torch's few rebuilding functions becomes a `Tensor`, a call of anything else an `Opaque`.
Nothing recurses, and limits on size, steps and memory come before the work.

Source: Python 3.13, Lib/pickletools.py, for the opcodes; torch/serialization.py and
torch/_utils.py of torch 2.13 for what the calls mean.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from merge.errors import CheckpointError
from merge.reader.pickles.calls import describe_call, is_known, looks_like_attack
from merge.reader.pickles.values import Global, Opaque, Pairs, Storage, describe, shown

# SDXL's UNet, 1,680 tensors: 238 kB and 50,000 steps; with an optimizer's state 665 kB and 205,000.
MAX_PICKLE_BYTES = 16 * 1024 * 1024
MAX_STEPS = 2_000_000
_MAX_LINE_BYTES = 512
_MAX_INTEGER_BYTES = 255


@dataclass(frozen=True, slots=True)
class Unpickled:
    """What a pickle describes.

    Attributes:
        value: The outermost value.
        unknown: Names of classes and functions that are not torch's rebuilding, in order.
        storage_keys: Keys of all storages that it refers to.
    """

    value: Any
    unknown: tuple[str, ...]
    storage_keys: frozenset[str]


def unpickle(data: bytes) -> Unpickled:
    """Read a pickle as a description.

    Raises:
        CheckpointError: it is damaged, too large, uses an opcode that no state dict needs, or
            names a function that is known from attacks.
    """
    if len(data) > MAX_PICKLE_BYTES:
        raise CheckpointError(
            f"data.pkl has {len(data):,} bytes, more than the {MAX_PICKLE_BYTES:,} allowed"
        )
    machine = _Machine(data)
    value = machine.run()
    return Unpickled(value, tuple(machine.unknown), frozenset(machine.storages))


class _Machine:
    """The state of one run: a stack with marks, a memo, and a position in the bytes."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.position = 0
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.unknown: dict[str, None] = {}
        self.storages: dict[str, tuple[str, int]] = {}

    def run(self) -> Any:
        if len(self.data) < 2 or self.data[0] != 0x80 or not 2 <= self.data[1] <= 5:
            raise CheckpointError("data.pkl is no pickle of protocol 2 to 5")
        self.position = 2
        for _ in range(MAX_STEPS):
            code = self.take(1)[0]
            if code == ord("."):
                return self.stop()
            step = _STEPS.get(code)
            if step is None:
                raise self.error(f"the opcode {_opcode(code)}, which no state dict needs")
            step(self)
        raise CheckpointError(f"data.pkl takes more than {MAX_STEPS:,} steps")

    def stop(self) -> Any:
        if len(self.stack) != 1 or self.marks:
            raise self.error("STOP with an unfinished value")
        if self.position != len(self.data):
            raise self.error(f"{len(self.data) - self.position} bytes after its end")
        return self.stack[0]

    def error(self, what: str) -> CheckpointError:
        return CheckpointError(f"data.pkl has {what} (before byte {self.position})")

    # Bytes.

    def take(self, size: int) -> bytes:
        end = self.position + size
        if end > len(self.data):
            raise CheckpointError("data.pkl is cut short")
        part = self.data[self.position : end]
        self.position = end
        return part

    def number(self, layout: str) -> int:
        size = struct.calcsize(layout)
        return int(struct.unpack(layout, self.take(size))[0])

    def line(self) -> str:
        end = self.data.find(b"\n", self.position, self.position + _MAX_LINE_BYTES)
        if end < 0:
            raise self.error("a name without an end")
        text = self.data[self.position : end]
        self.position = end + 1
        return self.decode(text)

    def decode(self, text: bytes) -> str:
        try:
            # Python's own pickler writes lone surrogates this way.
            return text.decode("utf-8", "surrogatepass")
        except UnicodeDecodeError:
            raise self.error("a text that is not UTF-8") from None

    # Stack.

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self) -> Any:
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise self.error("an opcode that takes more values than there are")
        return self.stack.pop()

    def top(self) -> Any:
        value = self.pop()
        self.stack.append(value)
        return value

    def pop_to_mark(self) -> list[Any]:
        if not self.marks:
            raise self.error("an opcode that needs a mark")
        start = self.marks.pop()
        values = self.stack[start:]
        del self.stack[start:]
        return values

    def remember(self, index: int) -> None:
        self.memo[index] = self.top()

    def recall(self, index: int) -> None:
        if index not in self.memo:
            raise self.error(f"a reference to value {index}, which was not kept")
        self.push(self.memo[index])

    # Containers.

    def tuple_of(self, count: int) -> None:
        values = [self.pop() for _ in range(count)]
        self.push(tuple(reversed(values)))

    def append(self, values: list[Any]) -> None:
        target = self.top()
        if isinstance(target, list):
            target.extend(values)
        elif not isinstance(target, Opaque):
            raise self.error(f"items for {describe(target)}")

    def assign(self, values: list[Any]) -> None:
        target = self.top()
        if len(values) % 2:
            raise self.error("a key without a value")
        if isinstance(target, Pairs):
            target.items.extend(zip(values[::2], values[1::2], strict=True))
        elif not isinstance(target, Opaque):
            # torch 2.9 and older corrupted memory here (CVE-2026-24747).
            raise self.error(f"keys for {describe(target)}")

    # Names, calls and references.

    def name(self, module: Any, attribute: Any) -> None:
        if not (isinstance(module, str) and isinstance(attribute, str)):
            raise self.error("a class whose name is no text")
        name = Global(module, attribute)
        if looks_like_attack(name):
            raise CheckpointError(
                f"data.pkl names {name.name}, which a model has no use for: this may be an "
                "attack (nothing of it was run)",
                hint="do not load this file with anything else, and report it where it is from",
            )
        if not is_known(name):
            self.unknown[name.name] = None
        self.push(name)

    def call(self, function: Any, arguments: Any) -> None:
        if isinstance(function, Opaque):
            self.push(function)
            return
        if not isinstance(function, Global) or not isinstance(arguments, tuple):
            raise self.error(f"a call of {describe(function)}")
        self.push(describe_call(function, arguments))

    def build(self) -> None:
        state = self.pop()
        target = self.top()
        # A state dict's `_metadata` (versions of modules) says nothing of its tensors.
        is_metadata = isinstance(target, Pairs) and target.is_ordered and isinstance(state, Pairs)
        if not is_metadata and not isinstance(target, Opaque):
            raise self.error(f"attributes for {describe(target)}")

    def reference(self) -> None:
        match self.pop():
            case ("storage", Global() as kind, str(key), str(), int(count)) if count >= 0:
                known = (kind.name, count)
                # torch gives every later reference the first one's dtype.
                if self.storages.setdefault(key, known) != known:
                    raise self.error(f"two kinds of the storage {shown(key)}")
                self.push(Storage(kind, key, count))
            case _:
                raise self.error("a reference that is no storage")


def _opcode(code: int) -> str:
    """Return the name of an opcode that is refused.

    Those are of protocols 0 and 1, of Python 2, for cyclic tuples, or for registries of the reading
    process.
    """
    # Here: only the message needs it.
    import pickletools

    names = {ord(opcode.code): opcode.name for opcode in pickletools.opcodes}
    names[0x80] = "PROTO in the middle"
    return names.get(code, f"{code:#04x}")


def _integer(machine: _Machine, size: int) -> None:
    if size > _MAX_INTEGER_BYTES:
        raise machine.error(f"an integer of {size:,} bytes")
    machine.push(int.from_bytes(machine.take(size), "little", signed=True))


def _text(machine: _Machine, layout: str) -> None:
    machine.push(machine.decode(machine.take(machine.number(layout))))


def _data(machine: _Machine, layout: str) -> None:
    machine.push(machine.take(machine.number(layout)))


def _float(machine: _Machine) -> None:
    machine.push(struct.unpack(">d", machine.take(8))[0])


def _frame(machine: _Machine) -> None:
    # Only a hint of how much to read at once; what it claims must be there all the same.
    if machine.number("<Q") > len(machine.data) - machine.position:
        raise CheckpointError("data.pkl is cut short")


def _named_by_lines(machine: _Machine) -> None:
    module = machine.line()
    machine.name(module, machine.line())


def _named_by_stack(machine: _Machine) -> None:
    attribute = machine.pop()
    machine.name(machine.pop(), attribute)


def _append_one(machine: _Machine) -> None:
    machine.append([machine.pop()])


def _assign_one(machine: _Machine) -> None:
    value = machine.pop()
    machine.assign([machine.pop(), value])


def _call(machine: _Machine) -> None:
    arguments = machine.pop()
    machine.call(machine.pop(), arguments)


def _make_with_keywords(machine: _Machine) -> None:
    machine.pop()
    _call(machine)


def _add_to_set(machine: _Machine) -> None:
    machine.pop_to_mark()
    if not isinstance(machine.top(), Opaque):
        raise machine.error("items for what is no set")


def _frozen_set(machine: _Machine) -> None:
    machine.pop_to_mark()
    machine.push(Opaque("frozenset"))


_STEPS: dict[int, Callable[[_Machine], None]] = {
    0x95: _frame,
    ord("("): lambda machine: machine.marks.append(len(machine.stack)),
    ord("N"): lambda machine: machine.push(None),
    0x88: lambda machine: machine.push(True),
    0x89: lambda machine: machine.push(False),
    ord("J"): lambda machine: machine.push(machine.number("<i")),
    ord("K"): lambda machine: machine.push(machine.number("<B")),
    ord("M"): lambda machine: machine.push(machine.number("<H")),
    0x8A: lambda machine: _integer(machine, machine.number("<B")),
    0x8B: lambda machine: _integer(machine, machine.number("<I")),
    ord("G"): _float,
    ord("X"): lambda machine: _text(machine, "<I"),
    0x8C: lambda machine: _text(machine, "<B"),
    0x8D: lambda machine: _text(machine, "<Q"),
    ord("B"): lambda machine: _data(machine, "<I"),
    ord("C"): lambda machine: _data(machine, "<B"),
    0x8E: lambda machine: _data(machine, "<Q"),
    0x96: lambda machine: _data(machine, "<Q"),
    ord(")"): lambda machine: machine.push(()),
    ord("t"): lambda machine: machine.push(tuple(machine.pop_to_mark())),
    0x85: lambda machine: machine.tuple_of(1),
    0x86: lambda machine: machine.tuple_of(2),
    0x87: lambda machine: machine.tuple_of(3),
    ord("]"): lambda machine: machine.push([]),
    ord("a"): _append_one,
    ord("e"): lambda machine: machine.append(machine.pop_to_mark()),
    ord("}"): lambda machine: machine.push(Pairs()),
    ord("s"): _assign_one,
    ord("u"): lambda machine: machine.assign(machine.pop_to_mark()),
    0x8F: lambda machine: machine.push(Opaque("set")),
    0x90: _add_to_set,
    0x91: _frozen_set,
    ord("q"): lambda machine: machine.remember(machine.number("<B")),
    ord("r"): lambda machine: machine.remember(machine.number("<I")),
    0x94: lambda machine: machine.remember(len(machine.memo)),
    ord("h"): lambda machine: machine.recall(machine.number("<B")),
    ord("j"): lambda machine: machine.recall(machine.number("<I")),
    ord("c"): _named_by_lines,
    0x93: _named_by_stack,
    ord("R"): _call,
    0x81: _call,
    0x92: _make_with_keywords,
    ord("b"): _Machine.build,
    ord("Q"): _Machine.reference,
}
