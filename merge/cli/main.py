"""The command group, and how failures leave it."""

from __future__ import annotations

import logging
import os
import shlex
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

import click

from merge._version import __version__
from merge.cli.options import examples, wants_debug
from merge.cli.output import TOKEN_HINT, configure_logging, say
from merge.cli.signals import Terminated, UnwindingSignals
from merge.errors import MergeError

# Command to the module that has it, so that `--help` loads none of the heavy ones.
_COMMANDS = {
    "run": "merge",
    "plan": "merge",
    "validate": "recipes",
    "recipes": "recipes",
    "edit": "edit",
    "sweep": "sweep",
    "tune": "tune",
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
    context_settings={
        "help_option_names": ["-h", "--help"],
        "max_content_width": 100,
        "show_default": True,
    },
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
    configure_logging(logging.WARNING)
    with UnwindingSignals() as signals:
        code = _run(words, signals)
    sys.exit(code)


def _run(words: list[str], signals: UnwindingSignals) -> int:
    try:
        code = cli.main(args=words, prog_name="instruct-merge", standalone_mode=False)
        signals.end()
        return code if isinstance(code, int) else 0
    except BaseException as error:
        signals.end()
        # Whatever it has become: an import that a signal cut short may fail with an ImportError.
        if signals.received or isinstance(error, (KeyboardInterrupt, click.Abort)):
            return _say_interrupted(error, words, is_terminated=signals.received is Terminated)
        if not isinstance(error, Exception):
            raise
        return _say_failure(error)


def _say_failure(error: Exception) -> int:
    match error:
        case MergeError():
            say(traceback.format_exc() if wants_debug() else f"error: {error}")
            return error.exit_code
        case click.exceptions.Exit():
            return error.exit_code
        case click.exceptions.NoArgsIsHelpError():
            error.show()
            return error.exit_code
        case click.ClickException():
            context = getattr(error, "ctx", None)
            command = context.command_path if context is not None else "instruct-merge"
            say(f"error: {error.format_message()}")
            is_token = "token" in str(getattr(error, "option_name", ""))
            say(f"hint: {TOKEN_HINT}" if is_token else f"hint: see `{command} --help`")
            return error.exit_code
        case BrokenPipeError():
            # The reader of our output went away, as `head` does; Python would complain at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
    if wants_debug():
        say(traceback.format_exc())
        return 1
    say(f"error: unexpected {type(error).__name__}: {error}")
    say("hint: run it again with --debug and report what it prints")
    return 1


def _say_interrupted(error: BaseException, words: list[str], *, is_terminated: bool) -> int:
    what = "terminated" if is_terminated else "interrupted"
    # Click raises an error of its own from a Ctrl-C.
    errors = [error, *([error.__cause__] if error.__cause__ else [])]
    notes = [note for each in errors for note in getattr(each, "__notes__", [])]
    if notes:
        again = [word for word in words if word != "--resume"]
        hint = f"`instruct-merge {shlex.join([*again, '--resume'])}` goes on with it"
        say(f"{what}: {notes[0]}")
        say(f"hint: {notes[1] if len(notes) > 1 else hint}")
    else:
        say(f"{what}: nothing half-written is left")
    return EXIT_TERMINATED if is_terminated else EXIT_INTERRUPTED
