"""An exception of another process: what travels, and what is raised at home.

Not the exception itself: pickle calls its class with `args`, which a constructor that takes more
than a message does not fit, and a class of a third party may be missing here.
"""

from __future__ import annotations

import importlib
import pickle
import traceback
from dataclasses import dataclass
from typing import Any

from merge.errors import MergeError


class WorkerError(RuntimeError):
    """A worker raised what is none of this tool's errors; the note is its traceback."""


@dataclass(frozen=True)
class Failure:
    """An exception as data.

    Attributes:
        classes: Module and name of its class, then of those it inherits from, up to MergeError;
            empty if it is none.
        kind: The name of its class.
        text: Its message.
        state: Its attributes, pickled; those that cannot be are left out.
        trace: Its traceback.
    """

    classes: tuple[tuple[str, str], ...]
    kind: str
    text: str
    state: bytes
    trace: str


def failure_of(error: Exception) -> Failure:
    """Return an exception as data that any process can read."""
    own = [cls for cls in type(error).__mro__ if issubclass(cls, MergeError)]
    return Failure(
        classes=tuple((cls.__module__, cls.__qualname__) for cls in own),
        kind=type(error).__qualname__,
        text=error.message if isinstance(error, MergeError) else _text(error),
        state=pickle.dumps({k: v for k, v in vars(error).items() if _is_picklable(v)}),
        trace="".join(traceback.format_exception(error)).rstrip(),
    )


def exception_of(failure: Failure, job: str = "") -> Exception:
    """Return the exception to raise at home.

    Args:
        failure: What came from the worker.
        job: The key of the job that it belongs to, if any.
    """
    where = f"job {job!r}" if job else "a worker"
    if failure.classes:
        error: Exception = _merge_error(failure)
    else:
        error = WorkerError(f"{where}: {failure.kind}: {failure.text}")
    error.add_note(f"In the process of {where}:\n{failure.trace}")
    return error


def _merge_error(failure: Failure) -> MergeError:
    cls = next(filter(None, (_class(*names) for names in failure.classes)), MergeError)
    # Its constructor may want other words than a message.
    error: MergeError = BaseException.__new__(cls, failure.text)
    error.message, error.hint = failure.text, cls.default_hint
    vars(error).update(pickle.loads(failure.state))
    return error


def _class(module: str, name: str) -> type[MergeError] | None:
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError):
        return None
    return found if isinstance(found, type) and issubclass(found, MergeError) else None


def _text(error: Exception) -> str:
    try:
        return str(error)
    except Exception:
        return "(no message)"


def _is_picklable(value: Any) -> bool:
    # A value whose class only the worker has would come home as another error.
    return isinstance(value, (str, int, float, bool, bytes, type(None))) or (
        isinstance(value, (tuple, list)) and all(map(_is_picklable, value))
    )
