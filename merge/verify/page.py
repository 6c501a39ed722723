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
from merge.verify.checks import CHECKS, CheckKind
from merge.verify.model import BlockNorm, Check, EditRow, Picture
from merge.verify.report import Report, mean
from merge.verify.verdict import not_judged, verdict

_FOLDER = Path(__file__).parent
_TINY_PIXELS = 128  # of the longer side: enlarged without smoothing up to here
_LARGE_PIXELS = 1024  # of the longer side: made smaller and compressed from here on
_PNG_BUDGET_BYTES = 3_000_000  # of all pictures; above it only tiny ones stay lossless
_QUALITY = 90
_SHOWN_DETAILS = 5
_SHOWN_FAILURES = 6
_RESULTS = {"judged": "failed", "warned": "warned"}
# Between a number and its unit.
_GAP = "\N{NO-BREAK SPACE}"

_DIGEST = re.compile(r"\b([0-9a-f]{12})[0-9a-f]{52}\b")

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
    return template.render(view=_view(report), style=style, script=script, policy=policy)


@functools.cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(_FOLDER),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


@functools.cache
def _read(name: str) -> str:
    return (_FOLDER / name).read_text(encoding="utf-8")


def _source(text: str) -> str:
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return f"'sha256-{digest}'"


def _view(report: Report) -> dict[str, Any]:
    embed = _Embedder(report.rows)
    return {
        "name": report.name,
        "version": __version__,
        "formula": _formula(report),
        "outcome": _outcome(report),
        "verdict": verdict(report.checks),
        "not_judged": not_judged(report.checks),
        "failures": _lines(report, report.failed),
        "warnings": _lines(report, report.warned),
        "facts": _facts(report),
        "edits": [_edit(report, index, row, embed) for index, row in enumerate(report.rows)],
        "checks": _checks(report.checks),
        "blocks": _blocks(report.blocks),
        "recipe_text": report.recipe_text,
        "digest": report.recipe_digest,
        "notes": report.notes,
    }


def _outcome(report: Report) -> str:
    """Return `failed`, `warned` or `passed`, which is also the class of the style."""
    if report.failed:
        return "failed"
    return "warned" if report.warned else "passed"


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


def _facts(report: Report) -> list[dict[str, str]]:
    settings = report.settings
    merged = [row.pictures["merged"] for row in report.rows]
    facts = [
        ("Weight", _number(report.recipe["weight"]), "") if "weight" in report.recipe else None,
        ("Steps", ", ".join(dict.fromkeys(str(_count_steps(p)) for p in merged)), ""),
        ("Guidance", _number(settings.guidance_scale), ""),
        ("Image guidance", _number(settings.image_guidance_scale), ""),
        ("UNet rows", _number(mean([p.unet_rows for p in merged])), "per edit"),
        ("Time", _seconds(mean([p.seconds for p in merged])), "per edit"),
        ("Device", report.device.split()[0], " ".join(report.device.split()[1:])),
    ]
    return [
        {"label": fact[0], "value": fact[1], "unit": fact[2]} for fact in facts if fact is not None
    ]


def _edit(report: Report, index: int, row: EditRow, embed: _Embedder) -> dict[str, Any]:
    merged = row.pictures["merged"]
    width, height = row.source.size
    source = embed(row.source)
    captions = (row.edit.before_caption, row.edit.after_caption)
    uris = {kind: embed(picture.image) for kind, picture in row.pictures.items()}
    return {
        "image": row.edit.image_name,
        "instruction": row.edit.instruction,
        "meta": [
            row.edit.image_name,
            f"{width}{_GAP}×{_GAP}{height}{_GAP}px",
            f"seed{_GAP}{row.seed}",
            f"{merged.unet_rows}{_GAP}UNet{_GAP}rows",
            _seconds(merged.seconds),
        ],
        "captions": captions if all(captions) else None,
        "failures": [_failure(check) for check in report.failed if check.edit == index],
        "source": {"uri": source, "width": width, "height": height},
        "merged": {"uri": uris["merged"]},
        "tiny": max(width, height) <= _TINY_PIXELS,
        "columns": [
            {"name": _kind_name(kind), "steps": _steps(picture)}
            for kind, picture in row.pictures.items()
        ],
        "measures": _measures(row),
        "strip": _strip(row, source, uris, embed),
    }


def _strip(
    row: EditRow, source: str, uris: Mapping[str, str], embed: _Embedder
) -> list[dict[str, str]]:
    """Return the pictures to see side by side; none where there are but source and result."""
    if len(row.pictures) == 1 and row.expected is None:
        return []
    figures = {"source": {"uri": source, "name": "Source", "note": ""}}
    for kind, picture in row.pictures.items():
        name = f"{_kind_name(kind)}, {_steps(picture)}"
        note = f"{picture.unet_rows}{_GAP}UNet{_GAP}rows, {_seconds(picture.seconds)}"
        figures[kind] = {"uri": uris[kind], "name": name, "note": note}
    if row.expected is not None:
        figures["expected"] = {"uri": embed(row.expected), "name": "Expected", "note": ""}
    order = ("source", "merged", "expected", "target", "target_few")
    return [figures[kind] for kind in order if kind in figures]


def _measures(row: EditRow) -> list[dict[str, Any]]:
    rows = []
    for name, title in _MEASURES:
        if any(name in row.metrics.get(kind, {}) for kind in row.pictures):
            columns = [_measure(name, row.metrics.get(kind, {})) for kind in row.pictures]
            rows.append({"name": title, "columns": columns})
    return rows


def _measure(name: str, metrics: Any) -> str:
    if name not in metrics:
        return "–"
    value = metrics[name]
    if name.startswith("psnr"):
        return "∞" if value is None else f"{value:.1f}"
    return "–" if value is None else f"{value:.3f}".replace("-", "−")


def _kind_name(kind: str) -> str:
    return "Merged" if kind == "merged" else "Target"


def _steps(picture: Picture) -> str:
    count = _count_steps(picture)
    return f"{count} step{'s' * (count != 1)}"


def _count_steps(picture: Picture) -> int:
    settings = picture.settings
    return len(settings.timesteps) if settings.timesteps else settings.steps


def _checks(checks: Iterable[Check]) -> list[dict[str, Any]]:
    """Return one row per kind with the value that is nearest to its limit, or furthest beyond."""
    groups: dict[str, list[Check]] = {}
    for check in checks:
        groups.setdefault(check.name, []).append(check)
    rows = []
    for name, kind in CHECKS.items():
        if name not in groups:
            continue
        group = groups[name]
        sign = -1 if kind.at_least else 1
        worst = max(group, key=lambda check: (not check.passed, sign * (check.value - check.limit)))
        count = f"; worst of {len(group)} edits" if len(group) > 1 else ""
        rows.append(
            {
                "title": kind.title,
                "meaning": f"{kind.meaning}{count}",
                "value": _number(worst.value),
                "limit": _limit(kind, worst),
                "result": "passed" if worst.passed else _RESULTS[kind.severity],
            }
        )
    return rows


def _limit(kind: CheckKind, check: Check) -> str:
    if check.limit == 0 and not kind.at_least:
        return "0"
    return f"{'≥' if kind.at_least else '≤'} {_number(check.limit)}"


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
    text = f"{doubt}{kind.title}: measured {_number(check.value)}, limit {_limit(kind, check)}."
    shown = "; ".join(check.detail[:_SHOWN_DETAILS])
    hidden = len(check.detail) - _SHOWN_DETAILS
    more = f"; and {hidden} more" if hidden > 0 else ""
    return _DIGEST.sub(r"\1…", f"{text} {shown}{more}".rstrip())


def _blocks(blocks: Sequence[BlockNorm]) -> list[dict[str, Any]]:
    largest = max((block.relative for block in blocks), default=0) or 1
    return [
        {
            "name": block.name,
            "text": f"{block.relative * 100:.2f}{_GAP}%",
            "width": f"{block.relative / largest * 100:.2f}",
            "parameters": _count(block.parameters),
        }
        for block in blocks
    ]


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


class _Embedder:
    """Turns pictures into data: addresses, smaller where all of them would be too much."""

    def __init__(self, rows: Sequence[EditRow]) -> None:
        pictures = [
            image
            for row in rows
            for image in (
                row.source,
                *(picture.image for picture in row.pictures.values()),
                *([row.expected] if row.expected is not None else []),
            )
        ]
        self._lossless = sum(map(_png_size_bytes, pictures)) <= _PNG_BUDGET_BYTES

    def __call__(self, image: Image.Image) -> str:
        longer = max(image.size)
        if longer <= _TINY_PIXELS or (self._lossless and longer <= _LARGE_PIXELS):
            return _address("png", _encode(image, "PNG", optimize=True))
        if longer > _LARGE_PIXELS:
            image = image.copy()
            image.thumbnail((_LARGE_PIXELS, _LARGE_PIXELS), Image.Resampling.LANCZOS)
        return _address("jpeg", _encode(image, "JPEG", quality=_QUALITY, subsampling=0))


def _png_size_bytes(image: Image.Image) -> int:
    return len(_encode(image, "PNG", compress_level=1))


def _encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def _address(kind: str, data: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
