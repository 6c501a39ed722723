"""What checks prove, in words that claim no more than was measured."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from merge.verify.checks import CHECKS
from merge.verify.model import Check

_SHOWN_DETAILS = 3


def failures(checks: Iterable[Check]) -> tuple[Check, ...]:
    """Return the checks that fail the model."""
    return tuple(c for c in checks if not c.passed and CHECKS[c.name].severity == "judged")


def warnings(checks: Iterable[Check]) -> tuple[Check, ...]:
    """Return the checks that only warn, and do."""
    return tuple(c for c in checks if not c.passed and CHECKS[c.name].severity == "warned")


def verdict(checks: Sequence[Check]) -> str:
    """Return the outcome in one line, e.g. `8 checks passed: files as recorded, finite`."""
    failed, warned, total = len(failures(checks)), warnings(checks), len(checks)
    if failed:
        return f"{failed} of {total} checks failed"
    if warned:
        doubts = list(dict.fromkeys(CHECKS[check.name].doubt for check in warned))
        what = "a warning" if len(doubts) == 1 else "warnings"
        passed = total - len(warned)
        return f"{passed} of {total} checks passed, with {what}: {', '.join(doubts)}"
    proofs = dict.fromkeys(CHECKS[check.name].proof for check in checks)
    proven = ", ".join(proof for proof in proofs if proof)
    return f"{total} check{'s' * (total != 1)} passed: {proven}"


def not_judged(checks: Iterable[Check]) -> str:
    """Return what nothing was measured of; empty where every edit has an expected picture."""
    edits, known = set(), set()
    for check in checks:
        if check.edit is not None:
            edits.add(check.edit)
            if check.name == "as_expected":
                known.add(check.edit)
    if edits and edits == known:
        return ""
    what = f"{len(edits - known)} of {len(edits)} edits" if known else "the edits"
    return f"Not judged: whether {what} are what was asked for."


def describe(checks: Iterable[Check]) -> list[str]:
    """Return each check with value and limit, one line each."""
    lines = []
    for check in checks:
        where = "" if check.edit is None else f" of edit {check.edit}"
        kind = CHECKS[check.name]
        shown = ", ".join(check.detail[:_SHOWN_DETAILS])
        more = ", ..." if len(check.detail) > _SHOWN_DETAILS else ""
        lines.append(
            f"{check.name}{where} is {check.value:g} and must be {kind.rule} {check.limit:g}"
            f"{f' ({shown}{more})' if shown else ''}{f': {kind.doubt}' if kind.doubt else ''}"
        )
    return lines
