"""The command group, and how failures leave it."""

from __future__ import annotations

import os
import shlex
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

import click

from merge._version import __version__
from merge.cli.output import (
    TOKEN_HINT,
    Verbosity,
    configure_logging,
    examples,
    say,
    wants_debug,
)
from merge.errors import MergeError

# Command to the module that has it, so that `--help` loads none of the heavy ones.
_COMMANDS = {
    "run": "merge",
    "plan": "merge",
    "validate": "recipes",
    "recipes": "recipes",
    "edit": "edit",
    "verify": "verify",
    "reproduce": "merge",
    "publish": "publish",
    "convert": "convert",
    "extract-lora": "extract",
    "show": "inspect",
    "env": "inspect",
}
EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143


class _Terminated(BaseException):
    """SIGTERM arrived; unwinds like Ctrl-C, so that nothing half-written stays."""


class _LazyGroup(click.Group):
    """A group whose commands are imported when they are named."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        import importlib

        if name not in _COMMANDS:
            return None
        module = importlib.import_module(f"merge.cli.{_COMMANDS[name]}_commands")
        command: click.Command = getattr(module, f"{name.replace('-', '_')}_command")
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        import difflib

        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            close = difflib.get_close_matches(args[0], _COMMANDS, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise click.UsageError(f"{error.message}{hint}", ctx) from None


@click.group(
    cls=_LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=examples(
        "recipes",
        "plan sd15-lcm-lora",
        "run sd15-lcm-lora weight=0.8 --out outputs/mine",
        'edit outputs/mine cat.png "turn the cat into a dog"',
    ),
)
@click.version_option(__version__, "--version", prog_name="instruct-merge")
def cli() -> None:
    """Give an InstructPix2Pix model 4-step editing by adding a distilled model's weights.

    W = W_target + weight * (W_distilled - W_base), one tensor at a time, from a YAML recipe to a
    standalone checkpoint whose bytes anyone can reproduce.
    """


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit.

    Exit codes: 0 ok, 2 usage, 130 Ctrl-C, 143 SIGTERM, else the family of the error
    (`merge.errors`), 1 for anything unexpected.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    configure_logging(Verbosity.NORMAL)
    sys.exit(_run(words))


def _run(words: list[str]) -> int:
    try:
        with _signals():
            code = cli.main(args=words, prog_name="instruct-merge", standalone_mode=False)
            return code if isinstance(code, int) else 0
    except MergeError as error:
        say(traceback.format_exc() if wants_debug() else f"error: {error}")
        return error.exit_code
    except click.exceptions.Exit as error:
        return error.exit_code
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return error.exit_code
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        command = context.command_path if context is not None else "instruct-merge"
        say(f"error: {error.format_message()}")
        is_token = "token" in str(getattr(error, "option_name", ""))
        say(f"hint: {TOKEN_HINT}" if is_token else f"hint: see `{command} --help`")
        return error.exit_code
    except (KeyboardInterrupt, click.Abort) as error:
        _say_interrupted("interrupted", error, words)
        return EXIT_INTERRUPTED
    except _Terminated as error:
        _say_interrupted("terminated", error, words)
        return EXIT_TERMINATED
    except BrokenPipeError:
        # The reader of our output went away, as `head` does; Python would complain at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if wants_debug():
            say(traceback.format_exc())
            return 1
        say(f"error: unexpected {type(error).__name__}: {error}")
        say("hint: run it again with --debug and report what it prints")
        return 1


def _say_interrupted(what: str, error: BaseException, words: list[str]) -> None:
    # Click raises an error of its own from a Ctrl-C.
    errors = [error, *([error.__cause__] if error.__cause__ else [])]
    notes = [note for each in errors for note in getattr(each, "__notes__", [])]
    if not notes:
        say(f"{what}: nothing half-written is left")
        return
    again = [word for word in words if word != "--resume"]
    say(f"{what}: {notes[0]}")
    say(f"hint: `instruct-merge {shlex.join([*again, '--resume'])}` goes on with it")


@contextmanager
def _signals() -> Iterator[None]:
    """Let SIGINT and SIGTERM unwind the run once; a second one waits for the clean-up."""

    def handler(number: int, frame: FrameType | None) -> None:
        for other in before:
            signal.signal(other, signal.SIG_IGN)
        raise KeyboardInterrupt if number == signal.SIGINT else _Terminated

    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)
