"""Tokens and home folders in text: found by kind and line, replaced, never repeated.

Patterns are those that the services document or that secret scanners agree on. They are anchored
on a fixed prefix and have no nested repetition, so that megabytes are searched in linear time.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

_TOKENS = {
    "Hugging Face token": r"(?<![A-Za-z0-9])(?:hf|api_org)_[A-Za-z0-9]{30,}",
    "GitHub token": r"(?<![A-Za-z0-9])(?:gh[pousr]_[A-Za-z0-9]{30,}|github_pat_[A-Za-z0-9_]{40,})",
    "AWS key": r"(?<![A-Za-z0-9+/])(?:AKIA|ASIA)[A-Z0-9]{16}(?![A-Za-z0-9+/=])",
    "API key": r"(?<![A-Za-z0-9])sk-[A-Za-z0-9_-]{20,}",
    "Slack token": r"(?<![A-Za-z0-9])xox[abeoprs]-[A-Za-z0-9-]{10,}",
    "private key": r"-----BEGIN [A-Z ]{0,40}PRIVATE KEY-----",
    "authorization header": r"(?i:bearer) [A-Za-z0-9._~+/=-]{20,}",
    "password in a URL": r"://[^\s/:@'\"]{1,100}:[^\s/:@'\"]{1,100}@",
}
_HOME = (
    r"(?<![\w.])/(?:home|Users)/[A-Za-z0-9._-]+"
    r"|(?<![\w.])/root(?=/)"
    r"|[A-Za-z]:\\{1,2}Users\\{1,2}[A-Za-z0-9._ -]+"
)
_TOKEN_PATTERN = re.compile("|".join(f"(?:{pattern})" for pattern in _TOKENS.values()))
_MIN_KNOWN = 8
_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")


@dataclass(frozen=True, slots=True)
class Finding:
    """Where something secret is.

    Attributes:
        kind: What it looks like, in words.
        line: Counted from 1.
    """

    kind: str
    line: int


def find_secrets(text: str, known: Collection[str] = ()) -> list[Finding]:
    """Return the tokens and home folders in a text, by line.

    Args:
        text: Of any size.
        known: Tokens that are to be found whatever they look like; see `known_tokens`.
    """
    homes = _HOME
    own = str(Path.home())
    if len(own) > 1:
        homes += rf"|(?<![\w.]){re.escape(own)}(?![\w.-])"
    return _find(text, {**_TOKENS, "home folder": homes}, known)


def find_tokens(text: str, known: Collection[str] = ()) -> list[Finding]:
    """Return the tokens in a text, by line; home folders are none."""
    return _find(text, _TOKENS, known)


def redact(text: str, known: Collection[str] = ()) -> str:
    """Return a text without its tokens; what is left shows their kind at most.

    Args:
        text: Of any size.
        known: Tokens that are replaced whatever they look like.
    """
    for value in sorted(known, key=len, reverse=True):
        if len(value) >= _MIN_KNOWN:
            text = text.replace(value, "***")
    # What stood beside a token may be one by itself once that is gone.
    while (left := _TOKEN_PATTERN.sub(_mask, text)) != text:
        text = left
    return text


def known_tokens() -> tuple[str, ...]:
    """Return the tokens that this process can send: of the environment, and of the Hub's client.

    The client is asked only when it is loaded already: without it nothing was sent.
    """
    values = {os.environ.get(name, "").strip() for name in _VARIABLES}
    hub = sys.modules.get("huggingface_hub")
    if hub is not None and hasattr(hub, "get_token"):
        values.add(hub.get_token() or "")
    return tuple(sorted(value for value in values if len(value) >= _MIN_KNOWN))


def _find(text: str, patterns: Mapping[str, str], known: Collection[str]) -> list[Finding]:
    places = [
        (kind, match.start())
        for kind, pattern in patterns.items()
        for match in re.finditer(pattern, text)
    ]
    places += [
        ("access token", text.index(value))
        for value in known
        if len(value) >= _MIN_KNOWN and value in text
    ]
    found = {Finding(kind, text.count("\n", 0, start) + 1) for kind, start in places}
    return sorted(found, key=lambda finding: (finding.line, finding.kind))


def _mask(match: re.Match[str]) -> str:
    text = match[0]
    for prefix in ("hf_", "api_org_", "github_pat_", "ghp_", "sk-", "://"):
        if text.startswith(prefix):
            return f"{prefix}***" + ("@" if prefix == "://" else "")
    return "***"
