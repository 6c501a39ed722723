"""The page of a verification in a real browser: silent, working, readable."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest

from merge.verify.checks import make_check
from merge.verify.page import render_page
from tests.browser import CHROMIUM, Browser
from tests.reports import make_report
from tests.verify.test_verify_page import EVIL

pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="there is no chromium here: apt-get install chromium"
)
WIDTHS = (400, 768, 1200)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A page that passed, one with everything that failed, and one of hostile words."""
    folder = tmp_path_factory.mktemp("pages")
    full = make_report(compared=True, size=256)
    long = "_".join(["a-name-without-any-blank"] * 6)
    failed = make_check("files_as_recorded", 1, detail=[f"{long} has SHA-256 {'ab' * 32}"])
    black = make_check("not_black", 0.001, edit=1)
    reports = {
        "passed": make_report(),
        "failed": dataclasses.replace(full, name=long, checks=(failed, *full.checks, black)),
        "evil": dataclasses.replace(
            full,
            name=EVIL[0],
            recipe_text="\n".join(EVIL),
            notes=EVIL,
            rows=tuple(
                dataclasses.replace(row, edit=dataclasses.replace(row.edit, instruction=evil))
                for row, evil in zip(full.rows, EVIL, strict=False)
            ),
        ),
    }
    paths = {}
    for name, report in reports.items():
        paths[name] = folder / f"{name}.html"
        paths[name].write_text(render_page(report), encoding="utf-8")
    return paths


@pytest.mark.parametrize("name", ["passed", "failed", "evil"])
def test_a_page_is_silent_and_asks_for_nothing(
    browser: Browser, pages: dict[str, Path], name: str
) -> None:
    browser.resize(1200, 900)
    browser.open(pages[name])
    assert browser.complaints() == []
    asked = [url for url in browser.requests() if not url.startswith("data:")]
    assert asked == [pages[name].as_uri()]
    # What has no size was not decoded.
    assert browser.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 0)")


def test_the_policy_stops_what_is_added_later(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["passed"])
    browser.evaluate(
        "document.body.insertAdjacentHTML('beforeend', "
        '\'<img src="https://example.org/x.png" onerror="window.bad = 1">\'); '
        "let s = document.createElement('script'); s.textContent = 'window.bad = 1'; "
        "document.body.append(s); new Promise(done => setTimeout(done, 200))"
    )
    assert browser.evaluate("window.bad === undefined")
    assert any("Content Security Policy" in line for line in browser.complaints())


SHOWN = """
(() => {
  const frame = document.querySelector("[data-compare]");
  const after = frame.querySelector(".after"), divider = frame.querySelector(".divider");
  const box = frame.getBoundingClientRect(), line = divider.getBoundingClientRect();
  return {
    value: Number(frame.querySelector("input").value),
    clip: getComputedStyle(after).clipPath,
    line: (line.left + line.width / 2 - box.left) / box.width * 100,
    spoken: frame.querySelector("input").getAttribute("aria-valuetext"),
    left: getComputedStyle(frame.querySelector(".tag.left")).opacity,
    right: getComputedStyle(frame.querySelector(".tag.right")).opacity,
    box: [box.left, box.top, box.width, box.height],
  };
})()
"""


@pytest.mark.parametrize("width", [400, 1200])
def test_the_slider_follows_mouse_and_keys(
    browser: Browser, pages: dict[str, Path], width: int
) -> None:
    browser.prefer(prefers_reduced_motion="reduce")
    browser.resize(width, 900)
    browser.open(pages["passed"])
    browser.evaluate("document.querySelector('[data-compare]').scrollIntoView()")
    shown = browser.evaluate(SHOWN)
    assert shown["value"] == 50
    assert shown["clip"] == "inset(0px 0px 0px 50%)"
    left, top, wide, high = shown["box"]
    y = top + high / 3
    for share in (0.25, 0.8):
        browser.drag((left + wide * 0.5, y), (left + wide * share, y))
        shown = browser.evaluate(SHOWN)
        assert shown["value"] == pytest.approx(share * 100, abs=1)
        assert shown["clip"] == f"inset(0px 0px 0px {shown['value']}%)"
        assert shown["line"] == pytest.approx(shown["value"], abs=0.5)
    assert shown["spoken"] == f"{shown['value']} % source, {100 - shown['value']} % merged"
    browser.press("ArrowLeft", 37)
    browser.press("ArrowLeft", 37)
    assert browser.evaluate(SHOWN)["value"] == shown["value"] - 2
    browser.press("End", 35)
    shown = browser.evaluate(SHOWN)
    assert (shown["value"], shown["left"], shown["right"]) == (100, "1", "0")
    browser.press("Home", 36)
    shown = browser.evaluate(SHOWN)
    assert (shown["value"], shown["left"], shown["right"]) == (0, "0", "1")
    assert browser.complaints() == []


def test_the_slider_shows_the_pictures_that_it_says(
    browser: Browser, pages: dict[str, Path], tmp_path: Path
) -> None:
    from PIL import Image

    browser.resize(1200, 900)
    browser.open(pages["passed"])
    browser.evaluate("document.querySelector('[data-compare]').scrollIntoView()")
    shown = browser.evaluate(SHOWN)
    left, top, wide, high = shown["box"]
    browser.screenshot(tmp_path / "page.png", whole=False)
    with Image.open(tmp_path / "page.png") as image:
        # The sky of the house, and its negative.
        source = image.getpixel((round(left + wide * 0.1), round(top + high * 0.1)))
        merged = image.getpixel((round(left + wide * 0.6), round(top + high * 0.05)))
    assert source[2] > source[0] + 60
    assert merged[2] < merged[0] - 60


READABLE = """
(() => {
  const problems = [];
  const wide = document.documentElement.scrollWidth;
  if (wide > innerWidth) problems.push("scrolls sideways: " + wide);
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  const luminance = (color) => {
    const [r, g, b] = color.match(/[\\d.]+/g).slice(0, 3).map(v => v / 255)
      .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = (element) => {
    for (let e = element; e; e = e.parentElement) {
      const color = getComputedStyle(e).backgroundColor;
      if (!/, 0\\)$|transparent/.test(color)) return color;
    }
    return "rgb(255, 255, 255)";
  };
  while (walker.nextNode()) {
    const node = walker.currentNode, element = node.parentElement;
    if (!node.data.trim() || ["SCRIPT", "STYLE"].includes(element.tagName)) continue;
    const style = getComputedStyle(element), what = node.data.trim().slice(0, 30);
    const range = document.createRange();
    range.selectNodeContents(node);
    const box = range.getBoundingClientRect();
    if (box.width === 0 || element.closest(".tag") || element.closest("pre")) continue;
    if (parseFloat(style.fontSize) < 13) problems.push("small: " + what);
    if (box.left < 0 || box.right > innerWidth + 0.5) problems.push("cut off: " + what);
    const pair = [luminance(style.color), luminance(ground(element))].sort((a, b) => b - a);
    if ((pair[0] + 0.05) / (pair[1] + 0.05) < 4.5) problems.push("faint: " + what);
  }
  const boxes = [...document.querySelectorAll("h1, h2, h3, p, dl, table, .compare, figure")]
    .map(e => [e, e.getBoundingClientRect()]).filter(([, b]) => b.height > 0);
  for (const [a, p] of boxes) for (const [b, q] of boxes) {
    if (a === b || a.contains(b) || b.contains(a)) continue;
    const over = Math.min(p.right, q.right) - Math.max(p.left, q.left) > 1
      && Math.min(p.bottom, q.bottom) - Math.max(p.top, q.top) > 1;
    if (over) problems.push("overlap: " + a.tagName + " and " + b.tagName);
  }
  return problems;
})()
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["passed", "failed", "evil"])
def test_a_page_is_readable(
    browser: Browser, pages: dict[str, Path], name: str, width: int, scheme: str
) -> None:
    browser.prefer(prefers_color_scheme=scheme)
    browser.resize(width, 900)
    browser.open(pages[name])
    assert browser.evaluate(READABLE) == []
    dark = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (dark == "rgb(19, 20, 22)") == (scheme == "dark")


def test_every_control_has_a_name(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["failed"])
    tree = browser.call("Accessibility.getFullAXTree")["nodes"]
    shown = [node for node in tree if not node.get("ignored")]
    sliders = [n["name"]["value"] for n in shown if n["role"]["value"] == "slider"]
    assert sliders == [
        f"Source or merged picture: {words}"
        for words in ("make it winter", "make it sunset", "turn the apple into an orange")
    ]
    pictures = [n["name"]["value"] for n in shown if n["role"]["value"] == "image"]
    assert len(pictures) >= 18
    assert all(pictures)


def test_a_page_prints(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["failed"])
    data = browser.call("Page.printToPDF", printBackground=False)["data"]
    assert len(data) > 10_000
    assert browser.complaints() == []
