"""Large values that many jobs name, and that no worker is sent twice."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any, Protocol

# In an actor: number of a value to what fetches its bytes, and what was fetched already.
_fetchers: dict[int, Callable[[], bytes]] = {}
_fetched: dict[int, Any] = {}
_KEPT = 8


class Shared(Protocol):
    """What a job holds in place of a large value."""

    def get(self) -> Any:
        """Return the value; it is not to be changed."""


class Kept:
    """A value of this process."""

    def __init__(self, value: Any) -> None:
        self._value = value

    def get(self) -> Any:
        """Return the value."""
        return self._value


class Numbered:
    """A value that lies in a cluster, and that a worker fetches when it first needs it."""

    def __init__(self, number: int) -> None:
        self._number = number

    def get(self) -> Any:
        """Return the value; in the process of a worker only."""
        number = self._number
        if number not in _fetched:
            _fetched[number] = pickle.loads(_fetchers[number]())
            while len(_fetched) > _KEPT:
                _fetched.pop(next(iter(_fetched)))
        return _fetched[number]


def register(number: int, fetch: Callable[[], bytes]) -> None:
    """Say how the bytes of a value are fetched."""
    _fetchers[number] = fetch
