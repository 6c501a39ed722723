"""The table of public reports names tests that are there."""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).parents[1]
ROWS = re.findall(
    r"^\| (\S+/\S+#\d+) \| .+ \| `(test_\w+\.py)::(test_\w+)` \|$",
    (TESTS / "README.md").read_text(encoding="utf-8"),
    re.MULTILINE,
)


def test_every_report_has_a_test() -> None:
    assert len(ROWS) >= 50
    for report, file, name in ROWS:
        (path,) = TESTS.rglob(file)
        text = path.read_text(encoding="utf-8")
        assert f"\ndef {name}(" in text, f"{report}: {file}::{name}"


def test_no_report_is_counted_twice() -> None:
    reports = [report for report, _, _ in ROWS]
    assert sorted(reports) == sorted(set(reports))
