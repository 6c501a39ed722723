"""What every command shares: verbosity, progress bars, JSON."""

from __future__ import annotations

import enum
import json
import logging
import os
import sys
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from merge.disclosure.secrets import known_tokens, redact

if TYPE_CHECKING:
    from tqdm import tqdm

TOKEN_HINT = "a token comes from HF_TOKEN or `hf auth login`, and from nowhere else"
_STATE = {"debug": False}
_STAGE_WORDS = {
    "convert": "converting",
    "download": "downloading",
    "extract": "extracting",
    "hash": "hashing",
    "merge": "merging",
    "verify": "editing",
}
# Over in a moment: no bar.
_SILENT_STAGES = ("resolve",)
_BYTE_STAGES = ("convert", "download", "hash", "merge")


class Verbosity(enum.IntEnum):
    """How much goes to stderr."""

    QUIET = logging.ERROR
    NORMAL = logging.WARNING
    VERBOSE = logging.INFO


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        text = redact(record.getMessage(), known_tokens())
        return f"warning: {text}" if record.levelno >= logging.WARNING else text


def configure_logging(level: Verbosity) -> None:
    """Send this package's messages to stderr."""
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


def wants_debug() -> bool:
    """Return True after `--debug`: errors then show their traceback."""
    return _STATE["debug"]


def common_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add -q, -v and --debug, which act before the command runs."""

    def quiet(ctx: click.Context, parameter: click.Parameter, value: bool) -> None:
        if value:
            configure_logging(Verbosity.QUIET)
            ctx.meta["merge.quiet"] = True

    def verbose(ctx: click.Context, parameter: click.Parameter, value: bool) -> None:
        if value:
            configure_logging(Verbosity.VERBOSE)

    def debug(ctx: click.Context, parameter: click.Parameter, value: bool) -> None:
        if value:
            _STATE["debug"] = True

    common: dict[str, Any] = {"is_flag": True, "expose_value": False}
    for option in (
        click.option("--debug", callback=debug, help="Show tracebacks.", **common),
        click.option("-v", "--verbose", callback=verbose, help="Say more.", **common),
        click.option("-q", "--quiet", callback=quiet, help="Only errors, no bars.", **common),
    ):
        command = option(command)
    return command


def json_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add --json."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON.")(command)


def examples(*lines: str) -> str:
    """Return an epilog that shows commands, one a line."""
    # Click rewraps a paragraph unless it starts with this character.
    return "\n".join(["\b", "Examples:", *(f"  instruct-merge {line}" for line in lines)])


def print_json(tree: Any) -> None:
    """Print a value as JSON on stdout."""
    click.echo(json.dumps(tree, indent=2, ensure_ascii=False))


def is_quiet() -> bool:
    """Return True after `-q`."""
    return bool(click.get_current_context().meta.get("merge.quiet"))


class Bars:
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
                    unit="B" if in_bytes else "",
                    unit_scale=in_bytes,
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


def silence_libraries() -> None:
    """Keep the libraries' own bars and advice out of our messages, unless asked for."""
    for name in ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY"):
        os.environ.setdefault(name, "error")
    # Offline by design: an export needs no other file.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("DIFFUSERS_DISABLE_REMOTE_CODE", "1")
