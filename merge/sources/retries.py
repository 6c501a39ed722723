"""Asking the Hub again when it is busy or breaks off, where its client does not."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

_ATTEMPTS = 5
_FIRST_WAIT_S = 1.0
_LONGEST_WAIT_S = 60.0
_BUSY = (408, 429, 500, 502, 503, 504)


def retried(ask: Callable[[], T]) -> T:
    """Return what a call to the Hub's client gives, repeating it while the Hub is busy.

    The client repeats some requests and not others: not the one that finds a revision's commit,
    and not the one for a file after an answer of 500. Retry-After is honoured up to a minute.
    """
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    for attempt in range(_ATTEMPTS):
        try:
            return ask()
        except (HfHubHTTPError, LocalEntryNotFoundError) as error:
            # The client looks into the cache when the Hub fails, and then says it is not there.
            cause = error if isinstance(error, HfHubHTTPError) else error.__cause__
            response = getattr(cause, "response", None)
            if response is None or response.status_code not in _BUSY or attempt == _ATTEMPTS - 1:
                raise
            stated = response.headers.get("Retry-After", "")
            wait_s = float(stated) if stated.isdecimal() else _FIRST_WAIT_S * 2**attempt
            time.sleep(min(wait_s, _LONGEST_WAIT_S))
    raise AssertionError("the loop returns or raises")
