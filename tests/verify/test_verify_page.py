"""The page of a verification: complete, safe, and one file that asks for nothing."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from merge.verify.checks import CHECKS, make_check
from merge.verify.model import Edit, EditRow, Picture
from merge.verify.page import render_page
from merge.verify.report import Report, write_report
from tests.reports import BLOCKS, SETTINGS, make_report, plain_picture, recipe_models

VOID = {"meta", "link", "img", "input", "br"}
EVIL = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    "</script></style></pre><h1>",
    "{{ 7 * 7 }}{% raw %}",
    "javascript:alert(1)&amp;\u202e",
)


class Page(HTMLParser):
    """The elements of a page and its text; unbalanced tags are an error."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID and f"<{tag}" in (self.get_starttag_text() or ""):
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] not in ("style", "script"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split()).replace("\N{NO-BREAK SPACE}", " ")

    def tags(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.elements if tag == name]


def test_a_page_says_what_there_is_to_say() -> None:
    page = Page(render_page(make_report(compared=True)))
    for words in (
        "8 checks passed: files as recorded, finite, not blank, changes pictures",
        "Not judged: whether the edits are what was asked for.",
        "org/target + 0.5 × (org/distilled − base)",
        "make it winter",
        "a house on a green hill on a sunny day",
        "Guidance 2 Image guidance 1",
        "UNet rows 8 per edit",
        "Time 1.2 s per edit",
        "Merged, 4 steps",
        "Target, 50 steps 150 UNet rows, 20.5 s",
        "Target, 4 steps",
        "PSNR to the source, dB ∞ ∞ ∞",
        "CLIP directional similarity −0.500",
        "mid_block 6.00 % 1.0 k",
        "ab" * 32,
        "lock_version: 1",
        "brightest channel, 99th percentile of pixels; worst of 3 edits 0.7 ≥ 0.05 passed",
    ):
        assert words in page.text, words
    assert len(page.tags("input")) == 3
    # Two of the slider and four of the strip.
    assert len(page.tags("img")) == 18
    bars = [float(bar["width"] or 0) for bar in page.tags("rect")]
    assert bars == [0, 20, 40, 60, 80, 100]
    assert len(bars) == len(BLOCKS)


def test_the_expected_picture_is_shown_beside_the_result() -> None:
    for compared, names in (
        (False, ["Source", "Merged, 4 steps", "Expected"]),
        (True, ["Source", "Merged, 4 steps", "Expected", "Target, 50 steps", "Target, 4 steps"]),
    ):
        report = make_report(compared=compared)
        row = dataclasses.replace(report.rows[0], expected=report.rows[1].source)
        page = Page(render_page(dataclasses.replace(report, rows=(row, *report.rows[1:]))))
        assert [image["alt"] for image in page.tags("img")][2 : 2 + len(names)] == names
        classes = [attributes.get("class") for attributes in page.tags("div")]
        assert ("strip five" in classes) == compared


def test_a_page_leaves_out_what_there_is_not() -> None:
    report = make_report(recipe={}, recipe_text="", recipe_digest="", notes=("A note.",))
    page = Page(render_page(report))
    for words in ("How far each block", "recipe.lock.yaml", "Weight 0", "Target", " × ("):
        assert words not in page.text, words
    assert "A note." in page.text
    assert len(page.tags("img")) == 6
    assert not any(word in page.text for word in ("None", "nan", "Undefined"))


@pytest.mark.parametrize(
    "recipe",
    [
        {"weight": "much", "models": {"target": "x", "distilled": "y"}},
        {"weight": float("nan"), "models": ["x"]},
        {"weight": None, "models": {"target": {"repo": "a/b"}, "distilled": [None]}},
    ],
)
def test_a_lock_that_somebody_changed_is_still_shown(recipe: dict[str, Any]) -> None:
    page = Page(render_page(make_report(recipe=recipe)))
    assert f"Weight {recipe['weight']} Steps" in page.text


def test_a_failed_page_names_every_failure() -> None:
    report = make_report()
    digest = "0123456789abcdef" * 4
    many = [make_check("not_constant", 0, edit=0) for _ in range(9)]
    long = Page(render_page(dataclasses.replace(report, checks=tuple(many))))
    assert "9 of 9 checks failed" in long.text
    assert "and 3 more" in long.text
    failed = [
        make_check("files_as_recorded", 7, detail=[f"file{i} {digest}" for i in range(7)]),
        make_check("not_black", 0.001, edit=1),
    ]
    page = Page(render_page(dataclasses.replace(report, checks=(*report.checks, *failed))))
    assert "2 of 10 checks failed" in page.text
    assert "passed:" not in page.text
    assert "Files are as recorded: measured 7, limit 0. file0 0123456789ab…" in page.text
    assert "file4" in page.text
    assert "and 2 more" in page.text
    # At the top, and beside the edit.
    assert "make it sunset – Not black: measured 0.001, limit ≥ 0.05." in page.text
    assert page.text.count("Not black: measured 0.001, limit ≥ 0.05.") == 2
    # The table shows the worst of all edits.
    assert "worst of 4 edits 0.001 ≥ 0.05 failed" in page.text


def test_a_page_with_a_warning_is_not_green() -> None:
    good = make_report()
    style = '<p class="verdict passed"'
    assert style in render_page(good)
    noise = make_check("noise_left", 0.97)
    text = render_page(dataclasses.replace(good, checks=(*good.checks, noise)))
    page = Page(text)
    assert style not in text
    assert 'class="verdict warned"' in text
    assert page.text.startswith("tiny – warned ")
    assert "8 of 9 checks passed, with a warning: pictures look like noise" in page.text
    line = "Pictures look like noise. Removes noise: measured 0.97, limit ≤ 0.5."
    assert page.text.count(line) == 1
    assert "leaves in its own pictures 0.97 ≤ 0.5 warned" in page.text
    # What fails is said first, and decides the colour.
    failed = make_check("not_black", 0.001, edit=1)
    text = render_page(dataclasses.replace(good, checks=(*good.checks, noise, failed)))
    assert 'class="verdict failed"' in text
    page = Page(text)
    assert "1 of 10 checks failed" in page.text
    assert page.text.index("Not black: measured") < page.text.index(line)


def test_a_page_says_which_edits_were_not_judged() -> None:
    good = make_report()
    known = [make_check("as_expected", 0.01, edit=index, limit=0.1) for index in range(3)]
    some = Page(render_page(dataclasses.replace(good, checks=(*good.checks, *known[:1]))))
    assert "Not judged: whether 2 of 3 edits are what was asked for." in some.text
    every = Page(render_page(dataclasses.replace(good, checks=(*good.checks, *known))))
    assert "as expected" in every.text
    assert "Not judged" not in every.text


def report_of(word: str) -> Report:
    """Return a report that says one word wherever somebody else's words stand."""
    good = make_report(compared=True)
    edit = Edit(Path("/x") / word.replace("/", "_"), word, 0, word, word)
    models = {**recipe_models(), "target": {"repo": word}}
    return dataclasses.replace(
        good,
        name=word,
        recipe={"weight": 1.0, "models": models},
        recipe_text=word,
        recipe_digest=word,
        device=f"cpu {word}",
        checks=(
            make_check("files_as_recorded", 1, detail=[word]),
            make_check("not_black", 0.0, edit=0),
        ),
        rows=(dataclasses.replace(good.rows[0], edit=edit), *good.rows[1:]),
        blocks=(dataclasses.replace(good.blocks[0], name=word), *good.blocks[1:]),
        notes=(word,),
    )


@pytest.mark.parametrize("evil", EVIL)
def test_nothing_of_a_user_becomes_markup(evil: str) -> None:
    page = Page(render_page(report_of(evil)))
    assert shape(page) == shape(Page(render_page(report_of("word"))))
    said = " ".join(evil.split())
    # Title, heading, formula, failure, device, instruction, two captions, block, digest, recipe and
    # note; the picture's name has no slash.
    assert page.text.count(said) >= 12
    assert " 49" not in page.text


def shape(page: Page) -> list[tuple[str, tuple[str, ...]]]:
    return [(tag, tuple(sorted(attributes))) for tag, attributes in page.elements]


@pytest.mark.parametrize("compared", [False, True])
def test_a_page_is_one_file(compared: bool) -> None:
    text = render_page(make_report(compared=compared))
    page = Page(text)
    for tag, attributes in page.elements:
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            assert name != "style", tag
            if name in ("src", "href", "srcset", "poster", "action", "data"):
                assert (value or "").startswith("data:"), (tag, name)
    assert not re.search(r"https?://|@import|url\(|//[a-z]+\.", text.split("base64")[0])
    assert not {"iframe", "object", "embed", "form", "base"} & {tag for tag, _ in page.elements}


def test_the_policy_allows_this_script_and_this_style_only() -> None:
    text = render_page(make_report())
    (policy,) = [
        meta["content"]
        for meta in Page(text).tags("meta")
        if meta.get("http-equiv") == "Content-Security-Policy"
    ]
    assert policy is not None
    rules = {part.split()[0]: part.split()[1:] for part in policy.split(";")}
    assert rules["default-src"] == ["'none'"]
    assert rules["img-src"] == ["data:"]
    for tag in ("style", "script"):
        (body,) = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()
        assert rules[f"{tag}-src"] == [f"'sha256-{digest}'"]


def with_pictures(source: Image.Image, count: int) -> Any:
    merged = Picture(source, SETTINGS, "lcm", 8, 1.0)
    rows = tuple(EditRow(Edit(None, "x"), i, source, {"merged": merged}) for i in range(count))
    return make_report(rows=rows, checks=())


def embedded(text: str) -> list[Image.Image]:
    found = re.findall(r'src="data:image/[a-z]+;base64,([^"]+)"', text)
    return [Image.open(io.BytesIO(base64.b64decode(data))) for data in found]


def test_small_pictures_are_embedded_without_loss() -> None:
    source = plain_picture(40, 24)
    text = render_page(with_pictures(source, 30))
    for image in embedded(text):
        assert image.format == "PNG"
        assert image.tobytes() == source.tobytes()
    assert text.count('class="compare tiny"') == 30
    assert 'class="compare"' in render_page(make_report(size=160))


def test_a_page_stays_small() -> None:
    text = render_page(with_pictures(plain_picture(512, 512), 6))
    assert {(image.format, image.size) for image in embedded(text)} == {("JPEG", (512, 512))}
    text = render_page(with_pictures(plain_picture(1600, 1200), 1))
    assert {(image.format, image.size) for image in embedded(text)} == {("JPEG", (1024, 768))}
    # A few lossless ones are within the budget.
    text = render_page(with_pictures(plain_picture(512, 512), 1))
    assert {image.format for image in embedded(text)} == {"PNG"}


def test_every_check_says_what_it_measures() -> None:
    assert list(CHECKS) == [
        *("files_as_recorded", "weights_finite", "weight_not_negative", "base_is_nearer"),
        *("deterministic", "latents_finite", "picture_finite", "not_black", "not_constant"),
        *("not_the_source", "noise_left", "noise_left_by_target", "as_expected"),
    ]
    for kind in CHECKS.values():
        assert kind.title[0].isupper()
        assert kind.meaning
        # A check says what it proves, unless it only warns of a sign.
        assert kind.proof or kind.doubt


def test_a_report_is_written_whole(tmp_path: Path) -> None:
    report = make_report(compared=True)
    write_report(tmp_path, report, render_page(report))
    tree = json.loads((tmp_path / "report.json").read_text())
    names = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.*"))
    listed = [name for edit in tree["edits"] for name in edit["files"]]
    assert names == sorted(["report.html", "report.json", *listed])
    assert len(listed) == 12
    assert tree["compared_with"]["commit"] == "c" * 40
    assert tree["block_norms"][3] == {"name": "mid_block", "relative": 0.06, "parameters": 1000}
    assert tree["edits"][0]["pictures"]["target"]["settings"]["steps"] == 50
    assert tree["edits"][0]["pictures"]["merged"]["metrics"]["psnr"] is None
