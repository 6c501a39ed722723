"""Values of a config with the library's defaults, and the layers that tables are made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from merge.errors import CheckpointError
from merge.header.parse import MAX_DIMENSION

Shape = tuple[int, ...]
Table = dict[str, Shape]
# More layers than any model has; a config must not make a table of millions.
_MOST = 1024


@dataclass(frozen=True, slots=True)
class ConfigFields:
    """A component's config.

    Attributes:
        config: Parsed JSON.
        where: Name of the class, for messages.
    """

    config: Mapping[str, Any]
    where: str

    def number(self, name: str) -> int | None:
        """Return a whole number above 0, or None where the config says null or nothing."""
        value = self.config.get(name)
        return None if value is None else self._checked(name, value)

    def required(self, name: str, default: int) -> int:
        """Return a whole number above 0; null and nothing mean the default."""
        return self.number(name) or default

    def numbers(self, name: str, default: Sequence[int]) -> list[int]:
        """Return a list of whole numbers above 0."""
        value = self.config.get(name, default)
        if not isinstance(value, list | tuple) or not 0 < len(value) <= _MOST:
            raise self.problem(name, value)
        return [self._checked(name, item) for item in value]

    def words(self, name: str, default: Sequence[str]) -> list[str]:
        """Return a list of names."""
        value = self.config.get(name, default)
        if not isinstance(value, list | tuple) or not all(isinstance(v, str) for v in value):
            raise self.problem(name, value)
        return list(value)

    def is_on(self, name: str, default: bool) -> bool:
        """Return a switch."""
        value = self.config.get(name, default)
        return default if value is None else bool(value)

    def per_block(self, name: str, default: int, blocks: int) -> list[int]:
        """Return a number for each block, where one may stand for all."""
        value = self.config.get(name, default)
        if not isinstance(value, list | tuple):
            return [self._checked(name, default if value is None else value)] * blocks
        if len(value) != blocks:
            raise self.problem(name, value)
        return [self._checked(name, item) for item in value]

    def problem(self, name: str, value: Any) -> CheckpointError:
        """Return the error for a value that no model has."""
        return CheckpointError(
            f"the config of {self.where} has {name}: {repr(value)[:60]}, which no model can have",
            hint="download the config again",
        )

    def _checked(self, name: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < MAX_DIMENSION:
            raise self.problem(name, value)
        return value


@dataclass(slots=True)
class Layers:
    """A table under construction; each method adds the tensors of one layer."""

    table: Table = field(default_factory=dict)

    def linear(self, name: str, inputs: int, outputs: int, *, bias: bool = True) -> None:
        """Add a linear layer."""
        self.table[f"{name}.weight"] = (outputs, inputs)
        if bias:
            self.table[f"{name}.bias"] = (outputs,)

    def conv(self, name: str, inputs: int, outputs: int, kernel: int, *, bias: bool = True) -> None:
        """Add a convolution with a square kernel."""
        self.table[f"{name}.weight"] = (outputs, inputs, kernel, kernel)
        if bias:
            self.table[f"{name}.bias"] = (outputs,)

    def norm(self, name: str, channels: int) -> None:
        """Add a group or layer norm."""
        self.table[f"{name}.weight"] = self.table[f"{name}.bias"] = (channels,)

    def resnet(self, name: str, inputs: int, outputs: int, time: int = 0) -> None:
        """Add a residual block; `time` is the width of the embedding that it takes, 0 for none."""
        self.norm(f"{name}.norm1", inputs)
        self.conv(f"{name}.conv1", inputs, outputs, 3)
        if time:
            self.linear(f"{name}.time_emb_proj", time, outputs)
        self.norm(f"{name}.norm2", outputs)
        self.conv(f"{name}.conv2", outputs, outputs, 3)
        if inputs != outputs:
            self.conv(f"{name}.conv_shortcut", inputs, outputs, 1)
