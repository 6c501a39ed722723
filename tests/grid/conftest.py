"""What all tests of grids share."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module", autouse=True)
def _thawed() -> Iterator[None]:
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _small_heap() -> None:
    """Keep what is there already out of the collections that each sweep makes."""
    gc.freeze()
