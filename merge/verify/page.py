"""`report.html`: one file that asks for nothing from anywhere."""

from __future__ import annotations

import base64
import functools
import hashlib
import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from PIL import Image

from merge._version import __version__
from merge.verify.checks import CHECKS
from merge.verify.model import Check, EditRow, Picture
from merge.verify.report import Report, mean
from merge.verify.verdict import not_judged, verdict

_FOLDER = Path(__file__).parent
_TINY_PIXELS = 128  # of the longer side: enlarged without smoothing up to here
_LARGE_PIXELS = 1024  # of the longer side: made smaller and compressed from here on
_PNG_BUDGET_BYTES = 3_000_000  # of all pictures; above it only tiny ones stay lossless
_QUALITY = 90
_SHOWN_DETAILS = 5
_SHOWN_FAILURES = 6
# Between a number and its unit.
_GAP = "\N{NO-BREAK SPACE}"

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
    style, script = (_read(name) for name in ("page.css", "page.js"))
    policy = (
        f"default-src 'none'; img-src data:; style-src {_source(style)}; "
        f"script-src {_source(script)}; base-uri 'none'; form-action 'none'"
    )
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
        tiny_pixels=_TINY_PIXELS,
        style=style,
        script=script,
        policy=policy,
    )


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_FOLDER),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "count": _count,
        "failure": _failure,
        "limit": _limit,
        "mean": mean,
        "measures": _measures,
        "number": _number,
        "seconds": _seconds,
        "steps": _steps,
    }
    return environment


@functools.cache
def _read(name: str) -> str:
    return (_FOLDER / name).read_text(encoding="utf-8")


def _source(text: str) -> str:
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return f"'sha256-{digest}'"


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
    return f"{target} + {_number(report.recipe.get('weight', 1))} × {delta}"


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
    return f"{'≥' if at_least else '≤'} {_number(check.limit)}"


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
    text = f"{doubt}{kind.title}: measured {_number(check.value)}, limit {_limit(check)}."
    shown = "; ".join(check.detail[:_SHOWN_DETAILS])
    hidden = len(check.detail) - _SHOWN_DETAILS
    more = f"; and {hidden} more" if hidden > 0 else ""
    return _DIGEST.sub(r"\1…", f"{text} {shown}{more}".rstrip())


def _count(value: int) -> str:
    for size, word in ((1_000_000, "M"), (1_000, "k")):
        if value >= size:
            return f"{value / size:.1f}{_GAP}{word}"
    return str(value)


def _number(value: Any) -> str:
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        # A lock is a file that anybody can write to.
        return str(value)
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}".replace("-", "−")
    return f"{value:.3g}".replace("-", "−")


def _seconds(value: float) -> str:
    return f"{value:.1f}{_GAP}s" if value < 100 else f"{value:.0f}{_GAP}s"


def _addresses(rows: Sequence[EditRow]) -> list[dict[str, str]]:
    """Return each row's pictures as data: addresses, by their kind.

    They are smaller where all of them would be too much.
    """
    images = [image for row in rows for image in row.images.values()]
    size_bytes = sum(len(_encode(image, "PNG", compress_level=1)) for image in images)
    is_small = size_bytes <= _PNG_BUDGET_BYTES
    return [{kind: _address(image, is_small) for kind, image in row.images.items()} for row in rows]


def _address(image: Image.Image, is_lossless: bool) -> str:
    longer = max(image.size)
    if longer <= _TINY_PIXELS or (is_lossless and longer <= _LARGE_PIXELS):
        kind, data = "png", _encode(image, "PNG", optimize=True)
    else:
        if longer > _LARGE_PIXELS:
            image = image.copy()
            image.thumbnail((_LARGE_PIXELS, _LARGE_PIXELS), Image.Resampling.LANCZOS)
        kind, data = "jpeg", _encode(image, "JPEG", quality=_QUALITY, subsampling=0)
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()
