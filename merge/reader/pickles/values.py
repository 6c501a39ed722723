"""What a pickle is made of, as data: a name is a name here, and a call is a note of one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from merge.header.dtypes import DTYPE_CODES

_SHOWN_CHARACTERS = 120

# Classes of torch's storages to codes of a safetensors header; None for those that have none that
# can be merged.
STORAGE_DTYPES: dict[str, str | None] = {
    "DoubleStorage": "F64",
    "FloatStorage": "F32",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "LongStorage": "I64",
    "IntStorage": "I32",
    "ShortStorage": "I16",
    "CharStorage": "I8",
    "ByteStorage": "U8",
    "BoolStorage": "BOOL",
    "ComplexFloatStorage": None,
    "ComplexDoubleStorage": None,
    "QInt8Storage": None,
    "QInt32Storage": None,
    "QUInt8Storage": None,
    "QUInt4x2Storage": None,
    "QUInt2x4Storage": None,
}
# torch's dtypes, which are named beside storages without a type.
DTYPES: dict[str, str | None] = {
    **DTYPE_CODES,
    "complex32": None,
    "complex64": None,
    "complex128": None,
}


@dataclass(frozen=True, slots=True, eq=False)
class Global:
    """The name of a class or function; it is never looked up."""

    module: str
    attribute: str

    @property
    def name(self) -> str:
        """Return `module.attribute`, fit to be shown."""
        return shown(f"{self.module}.{self.attribute}")


@dataclass(slots=True, eq=False)
class Pairs:
    """A dictionary as the list of its assignments.

    Keys are kept as they come: a real dictionary would hash them, which recurses without a limit
    for nested tuples, and would let a second value silently take the place of a first one.

    Attributes:
        items: Keys and values in the order written.
        is_ordered: True for an `OrderedDict`, which may carry attributes such as `_metadata`.
    """

    items: list[tuple[Any, Any]] = field(default_factory=list)
    is_ordered: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Opaque:
    """An object of a class that is not known here: its name, and nothing behind it."""

    name: str


@dataclass(frozen=True, slots=True, eq=False)
class Storage:
    """A reference to a record of the archive.

    Attributes:
        kind: Class of the storage, e.g. `torch.FloatStorage`.
        key: Record `data/<key>`.
        element_count: Elements that the pickle says it has; bytes for an untyped storage.
    """

    kind: Global
    key: str
    element_count: int


@dataclass(frozen=True, slots=True, eq=False)
class Tensor:
    """A tensor as it was written, not checked yet.

    Attributes:
        storage: What should be a `Storage`.
        offset: First element; should be an integer.
        shape: Should be a tuple of integers.
        stride: Should be a tuple of integers.
        dtype: None when the storage tells it, else what should be a `Global` such as
            `torch.uint16`.
        hooks: What should be an empty `Pairs`.
        metadata: What should be an empty `Pairs`.
    """

    storage: Any
    offset: Any
    shape: Any
    stride: Any
    dtype: Any
    hooks: Any
    metadata: Any


def describe(value: Any) -> str:
    """Say in a few words what a value is; nothing inside of it is visited."""
    match value:
        case Tensor():
            return "a tensor"
        case Pairs():
            return f"a dictionary of {len(value.items)}"
        case list():
            return f"a list of {len(value)}"
        case tuple():
            return f"a tuple of {len(value)}"
        case Opaque():
            return f"an object of {value.name} (not imported)"
        case Global():
            return f"a reference to {value.name} (not imported)"
        case Storage():
            return "a storage"
        case None:
            return "None"
    name = {"str": "a text", "int": "an integer"}.get(type(value).__name__)
    return name or f"a {type(value).__name__}"


def shown(text: str) -> str:
    """Return untrusted text fit for a terminal: no control characters, not too long."""
    if not text.isprintable():
        text = ascii(text)
    if len(text) > _SHOWN_CHARACTERS:
        text = f"{text[:_SHOWN_CHARACTERS]}..."
    return text
