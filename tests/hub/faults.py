"""Failures on demand: which requests go wrong, in what way and how often."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field


@dataclass
class Fault:
    """One way to fail, for the next requests that match.

    Attributes:
        method: The method, as a pattern: `GET`, or `GET|HEAD`.
        path: A pattern that is searched for in the unquoted path, without the query.
        times: How many requests it strikes.
        after: How many matching requests pass unharmed before.
        status: The status of the answer instead of the true answer.
        headers: Headers of that answer; without a status, headers that replace the true ones.
        body: The body of that answer.
        cut: The share of the body after which the connection breaks off: of the answer's body for
            GET, of the request's body for everything else.
        lost: The request is carried out, and the connection breaks off before any answer.
        then: What happens before the request is looked at, such as a branch that moves.
    """

    method: str
    path: str
    times: int = 1
    after: int = 0
    status: int = 0
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""
    cut: float | None = None
    lost: bool = False
    then: Callable[[], object] | None = None

    def __post_init__(self) -> None:
        self._left = self.times
        self._passing = self.after

    @property
    def left(self) -> int:
        """How many requests it would still strike."""
        return self._left

    def strikes(self, method: str, path: str) -> bool:
        """Return whether this request is struck, and count it if so."""
        if not self._left or not re.fullmatch(self.method, method):
            return False
        if not re.search(self.path, path):
            return False
        if self._passing:
            self._passing -= 1
            return False
        self._left -= 1
        return True
