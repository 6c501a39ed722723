"""Every error that the tool raises on purpose, one exit code per family.

    MergeError                     1
    ├─ RecipeError                 3   unknown key, bad value, unknown method
    ├─ SourceError                 4   a model or a picture cannot be had
    │  ├─ SourceNotFoundError          no such folder, file, repository or revision
    │  ├─ OfflineError                 not in the cache, and the Hub may not be asked
    │  │  └─ NoRangesError             it sends files only as a whole
    │  ├─ IntegrityError               SHA-256 differs from the recipe, or the input changed
    │  └─ ImageError                   not a picture that can be edited
    ├─ CheckpointError             5   a weight file breaks its format
    ├─ PlanError                   6   the models do not fit together
    ├─ EngineError                 7   the merge itself failed
    │  ├─ NonFiniteError               NaN or Inf, or a value too large for out_dtype
    │  ├─ DeviceError                  no such device, or it failed
    │  │  └─ DeviceMemoryError         it is out of memory
    │  └─ ExecutorError                the workers of a sweep are gone, or there are none
    ├─ OutputError                 8   the output cannot be written
    │  ├─ OutputExistsError
    │  ├─ NoSpaceError
    │  └─ ResumeError                  an unfinished output is of another run, or in use
    ├─ VerificationError           9   the merged model failed a check, or is not reproduced
    └─ PublishError               10   the model must not, or cannot, be published

An error's text says what is wrong and names the key, file or number; its hint says what to do.
Click answers 2 for wrong usage; an interrupted run answers 130 (Ctrl-C) or 143 (SIGTERM).
"""

from __future__ import annotations

from collections.abc import Sequence

SHOWN_PROBLEMS = 10


def list_first(items: Sequence[object], count: int = 5) -> str:
    """Return the first few of some names as text, and how many more there are."""
    more = f" and {len(items) - count} more" if items[count:] else ""
    return ", ".join(map(str, items[:count])) + more


def first_lines(items: Sequence[object]) -> list[str]:
    """Return the first few of some lines, indented, and one that counts the others."""
    hidden = len(items) - SHOWN_PROBLEMS
    more = [f"... and {hidden} more"] if hidden > 0 else []
    return [f"  {line}" for line in (*items[:SHOWN_PROBLEMS], *more)]


class MergeError(Exception):
    """Base of all errors raised on purpose.

    Attributes:
        hint: What the user can do about it; the last line of the message.
        exit_code: The exit status of the command line.
        default_hint: The hint of a family, for errors that have no better one.
    """

    exit_code = 1
    default_hint = "run it again with --debug and report what it prints"

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint or self.default_hint

    def __str__(self) -> str:
        """Return the message followed by its hint line."""
        return f"{self.message}\nhint: {self.hint}"


class ProblemsError(MergeError):
    """Several problems found in one pass and shown together.

    Attributes:
        problems: One line each, in the order found.
    """

    def __init__(self, summary: str, problems: Sequence[str], *, hint: str = "") -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join([summary, *first_lines(self.problems)]), hint=hint)


class RecipeError(ProblemsError):
    """The recipe is not valid."""

    exit_code = 3
    default_hint = "`instruct-merge recipes NAME` prints a recipe to start from"


class SourceError(MergeError):
    """A model or a picture cannot be had."""

    exit_code = 4
    default_hint = "check the path or the Hub id, in the recipe or on the command line"


class SourceNotFoundError(SourceError):
    """A folder, file, repository or revision does not exist."""


class OfflineError(SourceError):
    """A file is not in the local cache and the Hub may not be asked."""


class NoRangesError(OfflineError):
    """The Hub, or a proxy before it, sends files only as a whole and not by ranges."""


class IntegrityError(SourceError):
    """An input's bytes are not the expected ones."""


class ImageError(SourceError):
    """A picture cannot be read or edited."""


class CheckpointError(MergeError):
    """A weight file breaks its format."""

    exit_code = 5
    default_hint = "download the file again, or convert it to safetensors"


class PlanError(ProblemsError):
    """The models of the recipe do not fit together."""

    exit_code = 6
    default_hint = (
        "base and distilled must be of the target's architecture, with the same keys and shapes"
    )


class EngineError(MergeError):
    """The merge itself failed."""

    exit_code = 7
    default_hint = "try another --device, and `instruct-merge env` to see what is there"


class NonFiniteError(EngineError):
    """A tensor holds NaN or Inf, or a value that its output dtype cannot hold."""


class DeviceError(EngineError):
    """The device is not there or cannot do the work."""


class DeviceMemoryError(DeviceError):
    """The device, or the machine, has too little memory."""


class ExecutorError(EngineError):
    """The workers of a sweep are gone, or there are none."""

    default_hint = "`--executor local` needs no cluster, and `--resume` keeps what is done"


class OutputError(MergeError):
    """The output cannot be written."""

    exit_code = 8
    default_hint = "choose another place for the output"


class OutputExistsError(OutputError):
    """The output exists already."""


class NoSpaceError(OutputError):
    """The disk is too small for the output."""


class ResumeError(OutputError):
    """An unfinished output cannot be gone on with; it stays as it is."""


class VerificationError(MergeError):
    """The merged model failed a check."""

    exit_code = 9
    default_hint = "report.json and images/ in the folder show what was measured"


class PublishError(MergeError):
    """The merged model must not be published as it is, or the Hub refuses it."""

    exit_code = 10
    default_hint = "`instruct-merge publish --dry-run` shows what would be uploaded"
