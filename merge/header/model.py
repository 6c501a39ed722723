"""What a header says: where each tensor is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from merge.header.dtypes import element_count

LENGTH_BYTES = 8
ALIGNMENT_BYTES = 8


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of a file.

    Attributes:
        name: Key in the state dict.
        dtype: Header code such as `F16`.
        shape: Dimensions, e.g. `(out, in, kh, kw)`; `()` for a scalar.
        start: First byte, counted from the start of the file.
        size_bytes: Length of its data.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    size_bytes: int

    @property
    def element_count(self) -> int:
        """Return the number of elements; 1 for a scalar."""
        return element_count(self.shape)


@dataclass(frozen=True, slots=True)
class Header:
    """A parsed header.

    Attributes:
        tensors: In file order.
        metadata: The `__metadata__` strings, empty when there are none.
        data_start: Offset of the first tensor byte in the file.
        file_bytes: Size of the whole file.
    """

    tensors: tuple[TensorSpec, ...]
    metadata: Mapping[str, str]
    data_start: int
    file_bytes: int
