"""The page of a sweep: complete, safe, one file, and within its size."""

from __future__ import annotations

import base64
import copy
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from merge.grid.page import render_sweep
from merge.grid.view import embedding
from merge.grid.view.charts import Line, Point, draw_curves, draw_rows
from tests.browser import CHROMIUM, Browser
from tests.grid_trees import LISTS, WEIGHTS, axis, make_sweep
from tests.reports import plain_picture
from tests.verify.test_verify_browser import READABLE
from tests.verify.test_verify_page import EVIL, Page, shape

WEIGHT, TIMESTEPS = axis("weight", WEIGHTS), axis("timesteps", LISTS)
GUIDANCE = axis("guidance_scale", [1.0, 1.5])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sweep")


@pytest.fixture(scope="module")
def whole(folder: Path) -> dict[str, Any]:
    return make_sweep(folder)


@pytest.fixture
def tree(whole: dict[str, Any]) -> dict[str, Any]:
    return copy.deepcopy(whole)


def values_shown(text: str) -> list[str]:
    return re.findall(r'<span class="value shade-\d">([^<]+)</span>\n</td>', text)


def test_a_page_says_what_there_is_to_say(tree: dict[str, Any], folder: Path) -> None:
    text = render_sweep(tree, folder)
    page = Page(text)
    for words in (
        "demo – sweep",
        "Sweep over weight, timesteps",
        "Best of 10 cells: weight 0.75, timesteps 999/659/319/59",
        "instruct-merge run demo weight=0.75 timesteps=999/659/319/59",
        "Cells 10 Samples 3 per cell UNet rows 4 per edit Time 17.0 s of all workers Device cpu",
        "house.png · seed 0",
        "2. make it sunset",
        "timesteps ↓ weight →",
        "Measures over weight",
        "mean over the steps, of latents; lower is better",
        "SSIM to the reference higher is better",
        "Difference from the source shown, not judged",
        "0.75 best 999/659/319/59 0.02 0.86 0.15 4 1.7 s abcdef012345",
        "Reference pictures: guidance 1.5, image guidance 1, 2,688 UNet rows and 10.2 s",
        "A note.",
        "instruct-merge 0.2.0.",
    ):
        assert words in page.text, words
    assert "So far" not in page.text
    assert "would be too large" not in page.text
    assert text.count('class="cell is-best"') == 1
    # Every picture once: three samples of ten cells, their sources and references.
    assert text.count('src="data:image') == 3 * (10 + 2)
    # Without a script only the first sample is seen.
    assert len(re.findall(r'<img[^>]* data-of="\d"(?! hidden)>', text)) == 10
    assert 'class="value shade-5">0.02<' in text
    assert 'class="value shade-0">0.0541<' in text


def test_one_axis_has_a_row_per_sample(folder: Path) -> None:
    text = render_sweep(make_sweep(folder, [WEIGHT]), folder)
    page = Page(text)
    assert 'id="sample"' not in text
    for words in ("make it winter", "make it sunset", "turn the apple into an orange"):
        assert words in page.text
    # Each picture has its own sample's value, each column their mean.
    assert values_shown(text)[3::5] == ["0.02", "0.022", "0.024"]
    assert "0.75 mean 0.02" in page.text
    assert text.count('data-sample="1"') == 5


def test_three_axes_have_a_grid_per_value_of_the_third(folder: Path) -> None:
    text = render_sweep(make_sweep(folder, [WEIGHT, TIMESTEPS, GUIDANCE]), folder)
    page = Page(text)
    assert text.count("data-panel=") == 2
    assert "guidance_scale 1.5" in page.text
    assert text.count('class="shot"') == 20
    # Four lines in each of three charts.
    assert text.count('class="line" d="M') == 4 + 3 * 4
    assert sorted(set(re.findall(r'data-cell="(\d+)"', text)), key=int) == [
        str(index) for index in range(20)
    ]


def test_names_instead_of_numbers_are_shown_as_rows_of_dots(folder: Path) -> None:
    text = render_sweep(make_sweep(folder, [TIMESTEPS, WEIGHT], reference=False), folder)
    page = Page(text)
    assert "Measures over timesteps" in page.text
    assert '<path class="line" d="M' not in text.split('class="charts"')[1]
    assert text.count('class="dot"') == 5 + 3 * 10
    assert text.count("<figure data-given=") == 3


def test_a_sweep_under_way_says_how_far_it_is(tree: dict[str, Any], folder: Path) -> None:
    tree.update(complete=False, cells=tree["cells"][:4], best=None)
    text = render_sweep(tree, folder)
    page = Page(text)
    assert "4 of 10 cells so far" in page.text
    assert "Cells 4 of 10" in page.text
    assert 'class="verdict warned"' in text
    assert page.text.count("not made") == 6
    assert "instruct-merge run" not in page.text
    assert len(Page(render_sweep({**tree, "cells": []}, folder)).tags("table")) == 3


def test_too_few_samples_tell_nothing(tree: dict[str, Any], folder: Path) -> None:
    text = render_sweep({**tree, "best": None}, folder)
    assert "The samples are too few to tell which cell is best" in Page(text).text
    assert 'class="verdict warned"' in text
    assert "is-best" not in text.split("</style>")[1]


def test_a_failed_cell_says_why(tree: dict[str, Any], folder: Path) -> None:
    broken = {"problem": "no room: <8 GB>", "pictures": [], "metrics": {}, "samples": {}}
    tree["cells"][0] |= broken
    page = Page(render_sweep(tree, folder))
    assert "Best of 9 cells" in page.text
    assert "1 cell failed." in page.text
    assert "0 999/659/319/59 no room: <8 GB>" in page.text
    every = {**tree, "best": None, "cells": [cell | broken for cell in tree["cells"]]}
    page = Page(render_sweep(every, folder))
    assert "No cell could be made" in page.text
    assert "Measures over" not in page.text


def test_numbers_that_are_none_are_left_out(tree: dict[str, Any], folder: Path) -> None:
    for cell in tree["cells"]:
        cell["metrics"] = {"path": None, "l1": float("nan"), "ssim": 0.5}
        cell["samples"] = {"path": [None]}
    text = render_sweep({**tree, "best": None}, folder)
    assert "Distance to the target's own path over" not in text
    assert "SSIM to the reference over weight: 10 values from 0.5 to 0.5" in text
    assert "– 0.5 nan 4" in Page(text).text


def hostile(tree: dict[str, Any], word: str) -> dict[str, Any]:
    """Return a tree that says one word wherever a user's words may stand."""
    tree = copy.deepcopy(tree)
    tree.update(recipe=word, device=f"cpu {word}", notes=[word])
    tree["tool"] = {"name": word, "version": word}
    for one in tree["axes"]:
        one["labels"] = [f"{word}{index}" for index, _ in enumerate(one["labels"])]
    for sample in tree["samples"]:
        sample.update(image=word, instruction=word)
    for metric in tree["metrics"]:
        metric.update(title=word, meaning=word)
    for cell in tree["cells"]:
        cell["labels"] = [word, word]
        cell["words"] = [word, word]
        cell["command"] = [word]
        cell["sha256"] = cell["recipe_digest"] = word
    tree["cells"][1].update(problem=word, metrics={}, pictures=[])
    tree["best"]["words"] = [word]
    return tree


@pytest.mark.parametrize("evil", EVIL)
def test_nothing_of_a_user_becomes_markup(whole: dict[str, Any], folder: Path, evil: str) -> None:
    text = render_sweep(hostile(whole, evil), folder)
    page = Page(text)
    assert shape(page) == shape(Page(render_sweep(hostile(whole, "word"), folder)))
    assert page.text.count(" ".join(evil.split())) >= 40
    assert " 49" not in page.text
    # What the script shows is the same words, and cannot end the element that they are in.
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text)
    assert json.loads(data)["samples"][0]["name"] == evil
    assert "<" not in data


def test_a_page_is_one_file(tree: dict[str, Any], folder: Path) -> None:
    text = render_sweep(tree, folder)
    for tag, attributes in Page(text).elements:
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            assert name != "style", tag
            if name in ("src", "href", "srcset", "poster", "action", "data"):
                assert (value or "").startswith("data:"), (tag, name)
    assert not re.search(r"https?://|@import|url\(", re.sub(r"base64,[^\"]+", "", text))


def test_the_policy_allows_this_script_and_this_style_only(
    tree: dict[str, Any], folder: Path
) -> None:
    check_policy(render_sweep(tree, folder))


def check_policy(text: str) -> None:
    (policy,) = [
        meta["content"] or ""
        for meta in Page(text).tags("meta")
        if meta.get("http-equiv") == "Content-Security-Policy"
    ]
    rules = {part.split()[0]: part.split()[1:] for part in policy.split(";")}
    assert rules["default-src"] == ["'none'"]
    assert rules["img-src"] == ["data:"]
    for tag in ("style", "script"):
        (body,) = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()
        assert rules[f"{tag}-src"] == [f"'sha256-{digest}'"]


def test_a_picture_that_cannot_be_shown_is_an_empty_frame(
    tree: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    inside = tmp_path / "sweep"
    inside.mkdir()
    plain_picture(8, 8).save(tmp_path / "outside.png")
    (inside / "text.png").write_text("not a picture")
    (inside / "folder.png").mkdir()
    names = ("../outside.png", str(tmp_path / "outside.png"), "text.png", "folder.png", "a\0b", "")
    for name in names:
        for cell in tree["cells"]:
            cell["pictures"] = [name] * 3
        text = render_sweep(tree, inside)
        assert "data:image" not in text
        assert text.count('<span class="empty"') == 3 * (10 + 2) + 1


def noisy(folder: Path, cells: int, samples: int, side: int) -> tuple[Path, list[list[str]]]:
    """Write pictures that no format compresses, and return their names by sample."""
    noise = plain_picture(side, side)
    groups = [[f"{cell}-{sample}.png" for cell in range(cells)] for sample in range(samples)]
    for name in (name for group in groups for name in group):
        noise.save(folder / name, compress_level=1)
    return folder, groups


def test_pictures_keep_to_the_budget(tmp_path: Path) -> None:
    folder, groups = noisy(tmp_path, cells=4, samples=4, side=300)

    def total(found: embedding.Embedding) -> int:
        return sum(len(picture.address) for picture in found.pictures.values())

    rich = embedding.embed(folder, groups)
    assert (rich.groups, rich.is_whole, len(rich.pictures)) == (4, True, 16)
    # Coarser pictures, then fewer samples, then a part of the first one.
    for share, groups_left, whole in (
        (0.6, 4, True),
        (0.3, 2, True),
        (0.15, 1, True),
        (0.01, 1, False),
    ):
        budget = round(total(rich) * share)
        found = embedding.embed(folder, groups, budget)
        assert total(found) <= budget
        assert (found.groups, found.is_whole) == (groups_left, whole), share
    assert {p.width for p in rich.pictures.values()} == {300}


def test_a_page_says_which_samples_it_left_out(
    tree: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = [
        len(picture.address)
        for picture in embedding.embed(folder, [tree["cells"][0]["pictures"]]).pictures.values()
    ]
    import merge.grid.page as page

    full = page.embed_samples
    monkeypatch.setattr(page, "embed_samples", lambda *a: full(*a, budget=max(sizes) * 27))
    text = render_sweep(tree, folder)
    assert "The pictures of the first 2 of 3 samples are in this page" in Page(text).text
    assert len(re.findall("<option", text)) == 2
    assert text.count('class="empty"') == 1  # of the dialog
    monkeypatch.setattr(page, "embed_samples", lambda *a: full(*a, budget=max(sizes) * 5))
    text = render_sweep(tree, folder)
    assert "Not all pictures are in this page" in Page(text).text


def test_charts_stay_in_their_frame() -> None:
    points = tuple(Point(x, y, "") for x, y in ((0, 5), (0.5, -2e-7), (1, 1e6)))
    flat = (Point(0.3, 7, "", 6, 8),)
    for drawing in (
        draw_curves([Line("a", points)], label="", x_name="weight"),
        draw_curves(
            [Line("a", flat, is_banded=True)],
            label="",
            x_name="weight",
            ticks=4,
            guides=[(0.3, "chosen 0.3")],
            picks=[0.3, 0.3],
        ),
        draw_rows([("a" * 99, Line("a", points)), ("b", Line("a", flat))], label=""),
    ):
        for stroke in drawing.strokes:
            for dot in stroke.dots:
                assert 0 <= dot.x <= drawing.width
                assert 0 <= dot.y <= drawing.height
        for text in drawing.texts:
            assert len(text.text) <= 20
            assert 0 <= text.x <= drawing.width


needs_browser = pytest.mark.skipif(
    CHROMIUM is None, reason="there is no chromium here: apt-get install chromium"
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("profile")) as browser:
        browser.prefer(prefers_reduced_motion="reduce")
        yield browser


WIDER = """
[...document.body.querySelectorAll("*")]
  .filter(e => !e.closest(".grid-box, .scroll, svg, select"))
  .filter(e => e.getBoundingClientRect().right > innerWidth + 0.5)
  .map(e => e.outerHTML.slice(0, 80))
"""


def check_look(browser: Browser, path: Path) -> None:
    """Check that a page is silent, and readable at two widths in light and dark."""
    for width, scheme in ((400, "light"), (1280, "dark"), (1280, "light"), (400, "dark")):
        browser.prefer(prefers_color_scheme=scheme, prefers_reduced_motion="reduce")
        browser.resize(width, 900)
        browser.open(path)
        assert browser.complaints() == []
        assert [url for url in browser.requests() if not url.startswith("data:")] == [path.as_uri()]
        problems = browser.evaluate(READABLE)
        # What a box of its own scrolls may be out of sight.
        assert [p for p in problems if p.startswith(("small", "faint", "scrolls"))] == []
        assert browser.evaluate(WIDER) == []
        ground = browser.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (ground == "rgb(19, 20, 22)") == (scheme == "dark")


@needs_browser
@pytest.mark.parametrize("name", ["good", "evil"])
def test_a_page_is_silent_and_readable(
    browser: Browser, whole: dict[str, Any], folder: Path, name: str
) -> None:
    long = "_".join(["a-name-without-any-blank"] * 6)
    tree = whole if name == "good" else hostile(whole, long + EVIL[1])
    path = folder / f"{name}.html"
    path.write_text(render_sweep(tree, folder), encoding="utf-8")
    check_look(browser, path)


def choose(browser: Browser, name: str, index: int) -> None:
    """Choose an option as its user does."""
    browser.evaluate(
        f"(s => {{ s.value = '{index}'; s.dispatchEvent(new Event('change')); }})"
        f"(document.getElementById('{name}'))"
    )


OPENED = """
(() => {
  const dialog = document.querySelector("dialog"), frame = dialog.querySelector("[data-compare]");
  const address = (id) => document.getElementById(id).src;
  return {
    open: dialog.open,
    title: document.getElementById("dialog-title").textContent,
    text: dialog.innerText,
    value: Number(frame.querySelector("input").value),
    clip: getComputedStyle(frame.querySelector(".after")).clipPath,
    spoken: frame.querySelector("input").getAttribute("aria-valuetext"),
    left: address("dialog-left"), right: address("dialog-right"),
    wide: dialog.scrollWidth - dialog.clientWidth,
  };
})()
"""


@needs_browser
@pytest.mark.parametrize("width", [400, 1280])
def test_a_cell_opens_and_compares_by_keys(
    browser: Browser, whole: dict[str, Any], folder: Path, width: int
) -> None:
    path = folder / "keys.html"
    path.write_text(render_sweep(whole, folder), encoding="utf-8")
    browser.resize(width, 900)
    browser.open(path)
    choose(browser, "sample", 1)
    shown = browser.evaluate(
        "[...document.querySelectorAll('#grid .shot img')].filter(i => i.offsetParent)"
        ".map(i => i.dataset.of)"
    )
    assert shown == ["1"] * 10
    browser.evaluate("document.querySelector('.is-best .shot').focus()")
    browser.press("Enter", 13, "\r")
    seen = browser.evaluate(OPENED)
    assert seen["open"]
    assert seen["wide"] == 0
    assert seen["title"] == "weight 0.75, timesteps 999/659/319/59"
    for words in ("make it sunset", "boat.png · seed 1", "weight=0.75", "0.022", "999/659/319/59"):
        assert words in seen["text"], words
    assert browser.evaluate("document.activeElement.type") == "range"
    browser.press("ArrowLeft", 37)
    moved = browser.evaluate(OPENED)
    assert moved["value"] == 49
    assert moved["clip"] == "inset(0px 0px 0px 49%)"
    assert moved["spoken"] == "49 % Source, 51 % weight 0.75, timesteps 999/659/319/59"
    source, picture = moved["left"], moved["right"]
    browser.evaluate("document.querySelector('[name=side][value=reference]').click()")
    other = browser.evaluate(OPENED)
    assert other["left"] not in (source, picture)
    assert other["right"] == picture
    assert "49 % Reference" in other["spoken"]
    browser.evaluate("document.getElementById('cell-after').click()")
    after = browser.evaluate(OPENED)
    assert after["title"] == "weight 1, timesteps 999/659/319/59"
    assert after["right"] != picture
    browser.press("Escape", 27)
    assert not browser.evaluate(OPENED)["open"]
    assert browser.complaints() == []


@needs_browser
def test_the_third_axis_is_chosen(browser: Browser, folder: Path) -> None:
    path = folder / "three.html"
    tree = make_sweep(folder, [WEIGHT, TIMESTEPS, GUIDANCE])
    path.write_text(render_sweep(tree, folder), encoding="utf-8")
    browser.resize(1280, 900)
    browser.open(path)
    seen = (
        "[...document.querySelectorAll('.shot')].filter(s => s.offsetParent)"
        ".map(s => s.dataset.cell)"
    )
    assert len(browser.evaluate(seen)) == 10
    first = browser.evaluate(seen)
    choose(browser, "panel", 1)
    assert not set(first) & set(browser.evaluate(seen))
