"""What every command shares: messages, progress bars, JSON."""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
from typing import TYPE_CHECKING, Any

import click

from merge.background.closable import Closable
from merge.disclosure.secrets import known_tokens, redact

if TYPE_CHECKING:
    from tqdm import tqdm

TOKEN_HINT = "a token comes from HF_TOKEN or `hf auth login`, and from nowhere else"
_STAGE_WORDS = {
    "convert": "converting",
    "download": "downloading",
    "extract": "extracting",
    "hash": "hashing",
    "merge": "merging",
    "sweep": "measuring",
    "verify": "editing",
}
# Over in a moment: no bar.
_SILENT_STAGES = ("resolve",)
_UNITS = {"sweep": " UNet rows"}
_BYTE_STAGES = ("convert", "download", "hash", "merge")


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        text = redact(record.getMessage(), known_tokens())
        return f"warning: {text}" if record.levelno >= logging.WARNING else text


def configure_logging(level: int) -> None:
    """Send this package's messages from a level of `logging` on to stderr."""
    logger = logging.getLogger("merge")
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(_Formatter())
        logger.addHandler(handler)
        logger.propagate = False
    logger.setLevel(level)


def say(text: str) -> None:
    """Print a message on stderr, without the tokens that an error may quote."""
    click.echo(redact(text, known_tokens()), err=True)


def print_json(tree: Any) -> None:
    """Print a value as JSON on stdout."""
    click.echo(json.dumps(tree, indent=2, ensure_ascii=False))


def is_quiet() -> bool:
    """Return True after `-q`."""
    return bool(click.get_current_context().meta.get("merge.quiet"))


def remark(*lines: str) -> None:
    """Print lines on stderr, unless `-q` was given."""
    for line in lines if not is_quiet() else ():
        click.echo(line, err=True)


class Bars(Closable):
    """One tqdm bar per stage on stderr; none where stderr is no terminal."""

    def __init__(self, *, quiet: bool) -> None:
        self._disable = True if quiet else not sys.stderr.isatty()
        self._bar: tqdm[Any] | None = None
        self._stage = ""
        # Progress comes from worker threads.
        self._lock = threading.Lock()

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Show that `done` of `total` of a stage is finished; some stages count bytes."""
        # Many commands show no bar, and it takes 0.06 s to import.
        from tqdm import tqdm as bar_class

        with self._lock:
            if stage != self._stage:
                self.close()
                self._stage = stage
                in_bytes = stage in _BYTE_STAGES
                self._bar = bar_class(
                    total=total,
                    desc=_STAGE_WORDS.get(stage, stage),
                    unit="B" if in_bytes else _UNITS.get(stage, ""),
                    unit_scale=in_bytes or stage in _UNITS,
                    disable=self._disable or stage in _SILENT_STAGES,
                    leave=in_bytes,
                )
            if self._bar is not None:
                self._bar.update(done - self._bar.n)
                if done >= total:
                    # What is said next must not stand in the middle of a bar.
                    self.close()

    def close(self) -> None:
        """End the bar that is shown."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def silence_libraries(*, is_offline: bool = True) -> None:
    """Keep the libraries' own bars and advice out of our messages, unless asked for.

    Args:
        is_offline: Nothing of the Hub is needed.
    """
    for name in ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY"):
        os.environ.setdefault(name, "error")
    if is_offline:
        # By design: an export needs no other file.
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("DIFFUSERS_DISABLE_REMOTE_CODE", "1")
