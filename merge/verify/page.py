"""`report.html`: one file that asks for nothing from anywhere."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jinja2

from merge._version import __version__
from merge.verify.checks import CHECKS
from merge.verify.document import (
    FOLDER,
    GAP,
    TINY_PIXELS,
    address,
    fit_without_loss,
    make_environment,
    number,
    policy,
    read_part,
    seconds,
)
from merge.verify.model import Check, EditRow, Picture
from merge.verify.report import Report, mean
from merge.verify.verdict import not_judged, verdict

_SHOWN_DETAILS = 5
_SHOWN_FAILURES = 6
_DIGEST = re.compile(r"\b([0-9a-f]{12})[0-9a-f]{52}\b")

# Of pictures, in the order in which they are seen side by side.
_TITLES = {
    "source": "Source",
    "merged": "Merged",
    "expected": "Expected",
    "target": "Target",
    "target_few": "Target",
}
_MEASURES = (
    ("l1", "Difference from the source, L1"),
    ("psnr", "PSNR to the source, dB"),
    ("ssim", "SSIM to the source"),
    ("l1_to_target", "Difference from the target, L1"),
    ("psnr_to_target", "PSNR to the target, dB"),
    ("ssim_to_target", "SSIM to the target"),
    ("clip_image", "CLIP image similarity"),
    ("clip_text", "CLIP similarity to the caption"),
    ("clip_direction", "CLIP directional similarity"),
)


def render_page(report: Report) -> str:
    """Return the report as one HTML document.

    Everything that comes from a recipe, a file's name or a user is escaped, and the document's own
    policy forbids every script, style and address but those that are in it.
    """
    style, script = (read_part(FOLDER / name) for name in ("page.css", "page.js"))
    template = _environment().get_template("page.html")
    return template.render(
        report=report,
        version=__version__,
        formula=_formula(report),
        verdict=verdict(report.checks),
        not_judged=not_judged(report.checks),
        failures=_lines(report, report.failed),
        warnings=_lines(report, report.warned),
        checks=_worst(report.checks),
        kinds=CHECKS,
        titles=_TITLES,
        addresses=_addresses(report.rows),
        tiny_pixels=TINY_PIXELS,
        style=style,
        script=script,
        policy=policy(style, script),
    )


@functools.cache
def _environment() -> jinja2.Environment:
    filters: dict[str, Callable[..., Any]] = {
        "count": _count,
        "failure": _failure,
        "limit": _limit,
        "mean": mean,
        "measures": _measures,
        "number": number,
        "seconds": seconds,
        "steps": _steps,
    }
    return make_environment((FOLDER,), filters)


def _formula(report: Report) -> str:
    """Return the merge in one line, e.g. `target + 0.5 × (distilled − base)`."""
    models = report.recipe.get("models")
    if not isinstance(models, dict) or not isinstance(models.get("distilled"), list):
        return ""
    target, base = _model_name(models.get("target")), _model_name(models.get("base"))
    names = [_model_name(model) for model in models["distilled"]]
    if not target or not all(names) or not names:
        return ""
    distilled = names[0] if len(names) == 1 else f"({' + '.join(names)})"
    delta = f"({distilled} − {base})" if base else distilled
    return f"{target} + {number(report.recipe.get('weight', 1))} × {delta}"


def _model_name(model: Any) -> str:
    if not isinstance(model, dict):
        return ""
    return str(model.get("repo") or model.get("path") or "")


def _measures(row: EditRow) -> list[tuple[str, list[str]]]:
    """Return the title of each measure that was taken, and its value for every picture."""
    metrics = [row.metrics.get(kind, {}) for kind in row.pictures]
    return [
        (title, [_measure(name, values) for values in metrics])
        for name, title in _MEASURES
        if any(name in values for values in metrics)
    ]


def _measure(name: str, metrics: Mapping[str, float | None]) -> str:
    if name not in metrics:
        return "–"
    value = metrics[name]
    if name.startswith("psnr"):
        return "∞" if value is None else f"{value:.1f}"
    return "–" if value is None else f"{value:.3f}".replace("-", "−")


def _steps(picture: Picture) -> str:
    count = picture.settings.steps
    return f"{count} step{'s' * (count != 1)}"


def _worst(checks: Iterable[Check]) -> list[tuple[Check, int]]:
    """Return one check per kind and how many there are.

    It is the one with the value that is nearest to its limit, or furthest beyond.
    """
    groups: dict[str, list[Check]] = {name: [] for name in CHECKS}
    for check in checks:
        groups[check.name].append(check)

    def badness(check: Check) -> tuple[bool, float]:
        beyond = check.value - check.limit
        return not check.passed, -beyond if CHECKS[check.name].at_least else beyond

    return [(max(group, key=badness), len(group)) for group in groups.values() if group]


def _limit(check: Check) -> str:
    at_least = CHECKS[check.name].at_least
    if check.limit == 0 and not at_least:
        return "0"
    return f"{'≥' if at_least else '≤'} {number(check.limit)}"


def _lines(report: Report, checks: Sequence[Check]) -> list[str]:
    lines = []
    for check in checks:
        instruction = "" if check.edit is None else report.rows[check.edit].edit.instruction
        lines.append(f"{instruction + ' – ' if instruction else ''}{_failure(check)}")
    hidden = len(lines) - _SHOWN_FAILURES
    return [*lines[:_SHOWN_FAILURES], *([f"and {hidden} more"] if hidden > 0 else [])]


def _failure(check: Check) -> str:
    kind = CHECKS[check.name]
    doubt = f"{kind.doubt[0].upper()}{kind.doubt[1:]}. " if kind.doubt else ""
    text = f"{doubt}{kind.title}: measured {number(check.value)}, limit {_limit(check)}."
    shown = "; ".join(check.detail[:_SHOWN_DETAILS])
    hidden = len(check.detail) - _SHOWN_DETAILS
    more = f"; and {hidden} more" if hidden > 0 else ""
    return _DIGEST.sub(r"\1…", f"{text} {shown}{more}".rstrip())


def _count(value: int) -> str:
    for size, word in ((1_000_000, "M"), (1_000, "k")):
        if value >= size:
            return f"{value / size:.1f}{GAP}{word}"
    return str(value)


def _addresses(rows: Sequence[EditRow]) -> list[dict[str, str]]:
    """Return each row's pictures as data: addresses, by their kind.

    They are smaller where all of them would be too much.
    """
    is_small = fit_without_loss(image for row in rows for image in row.images.values())
    return [{kind: address(image, is_small) for kind, image in row.images.items()} for row in rows]
