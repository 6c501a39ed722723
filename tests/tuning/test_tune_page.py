"""The page of a tuning: what was chosen, why, and nothing else than its one file."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from merge.tuning.page import render_tune
from tests.browser import CHROMIUM, Browser
from tests.grid.test_sweep_page import OPENED, check_look, check_policy
from tests.grid_trees import LISTS, make_tune
from tests.verify.test_verify_page import EVIL, Page, shape


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tune")


@pytest.fixture(scope="module")
def whole(folder: Path) -> dict[str, Any]:
    return make_tune(folder)


@pytest.fixture
def tree(whole: dict[str, Any]) -> dict[str, Any]:
    return copy.deepcopy(whole)


def test_a_page_says_what_was_chosen_and_why(tree: dict[str, Any], folder: Path) -> None:
    text = render_tune(tree, folder)
    page = Page(text)
    for words in (
        "Chosen: weight 0.75 instead of 0.85",
        "instruct-merge run demo weight=0.75",
        "Folds pick 0.75–0.85 4 folds Samples 8 per merge Merges 8 UNet rows 5,000 in all",
        "Distance to the target's own path: mean over the steps, of latents. Lower is better.",
        "4 steps at 999/659/319/59, guidance 1, best at 0.75",
        "one of 4 folds of the samples picks: 0.75, 0.75, 0.85, 0.75",
        "16 samples of other noise, which had no part in the choice: 0.021",
        "The check passed.",
        "weight 0.85 0.0013 0.0004 to 0.0022 told apart",
        "Before and after",
        "Endpoint. It decides what is measured further.",
        "0.75 chosen 999/659/319/59",
        "A note.",
    ):
        assert words in page.text, words
    assert 'class="verdict passed"' in text
    # Three pairs, and the one of the dialog.
    assert text.count("data-compare>") == 4
    # Wide and narrow: one ring, two bands and four picks in each.
    why = text.split('id="why"')[1].split("</section>")[0]
    assert [why.count(f'class="{name}"') for name in ("best", "band", "pick")] == [2, 4, 8]
    # The grid is of the chosen timesteps only, with a row for each sample that has pictures.
    grid = text.split('class="grid"')[1].split("</table>")[0]
    assert re.findall(r'data-cell="(\d+)"', grid) == ["0", "1", "2", "3", "4", "5"] * 3


def test_the_order_of_keys_does_not_matter(tree: dict[str, Any], folder: Path) -> None:
    """A tree that was read from its file has them sorted."""
    read = json.loads(json.dumps(tree, sort_keys=True))
    assert Page(render_tune(read, folder)).text == Page(render_tune(tree, folder)).text


def test_what_stays_is_said_to_stay(tree: dict[str, Any], folder: Path) -> None:
    tree.update(over=["weight", "timesteps"])
    tree["chosen"] |= {"weight": 0.85, "timesteps": LISTS[1]}
    page = Page(render_tune(tree, folder))
    words = "Chosen: weight 0.85, as it was; timesteps 999/499/249/99 instead of 999/659/319/59"
    assert words in page.text
    assert "chosen, as it was 0.85" in page.text
    tree["chosen"] = dict(tree["before"])
    page = Page(render_tune(tree, folder))
    assert "Before and after" not in page.text
    tree["before"] |= {"timesteps": None, "weight": 0.33}
    page = Page(render_tune(tree, folder))
    assert "timesteps 999/659/319/59 instead of the scheduler’s own" in page.text
    assert "Before and after" not in page.text


def test_nothing_chosen_looks_like_a_warning(tree: dict[str, Any], folder: Path) -> None:
    tree.update(decided=False, reason="The curve is flat.", chosen=None, words=[])
    tree.update(held_out=None, screen=None)
    text = render_tune(tree, folder)
    page = Page(text)
    assert "Nothing was chosen; the recipe stays as it is" in page.text
    assert "The curve is flat." in page.text
    assert 'class="verdict warned"' in text
    for words in ("instruct-merge run", "held out", "First pass", "Before and after", "None"):
        assert words not in page.text, words


def test_a_page_of_little_is_still_shown(tree: dict[str, Any], folder: Path) -> None:
    tree.update(cells=[], curves=[], shown=[], reference=None, decided=False, chosen=None)
    page = Page(render_tune(tree, folder))
    for words in ("All merges", "Pictures over weight", "Why"):
        assert words not in page.text, words
    failed = make_tune(folder)
    for cell in failed["cells"][:4]:
        cell.update(problem="no room", pictures=[], metrics={}, samples={})
    text = render_tune(failed, folder)
    assert Page(text).text.count("no room") == 4
    assert "Before and after" not in Page(text).text


def hostile(tree: dict[str, Any], word: str) -> dict[str, Any]:
    tree = copy.deepcopy(tree)
    tree.update(
        recipe=word, device=f"cpu {word}", notes=[word], reason=word, words=[word], command=[word]
    )
    tree["decides"] |= {"title": word, "meaning": word}
    tree["held_out"]["what"] = word
    tree["screen"] |= {"title": word, "meaning": word}
    for curve in (*tree["curves"], *tree["screen"]["curves"]):
        curve["label"] = word
    for sample in tree["samples"]:
        sample.update(image=word, instruction=word)
    for cell in tree["cells"]:
        cell.update(labels=[word, word], sha256=word)
    tree["cells"][1].update(problem=word, metrics={}, pictures=[])
    return tree


@pytest.mark.parametrize("evil", EVIL)
def test_nothing_of_a_user_becomes_markup(whole: dict[str, Any], folder: Path, evil: str) -> None:
    text = render_tune(hostile(whole, evil), folder)
    page = Page(text)
    assert shape(page) == shape(Page(render_tune(hostile(whole, "word"), folder)))
    assert page.text.count(" ".join(evil.split())) >= 40
    assert " 49" not in page.text
    check_policy(text)
    for tag, attributes in page.elements:
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name in ("src", "href"):
                assert (value or "").startswith("data:"), (tag, name)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("there is no chromium here: apt-get install chromium")
    with Browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.mark.parametrize("name", ["good", "undecided"])
def test_a_page_is_silent_and_readable(
    browser: Browser, whole: dict[str, Any], folder: Path, name: str
) -> None:
    tree = whole
    if name == "undecided":
        tree = hostile(whole, "_".join(["a-name-without-any-blank"] * 6) + EVIL[1])
        tree.update(decided=False, chosen=None, words=[])
    path = folder / f"{name}.html"
    path.write_text(render_tune(tree, folder), encoding="utf-8")
    check_look(browser, path)


def test_pairs_and_cells_are_compared(
    browser: Browser, whole: dict[str, Any], folder: Path
) -> None:
    path = folder / "keys.html"
    path.write_text(render_tune(whole, folder), encoding="utf-8")
    browser.resize(1280, 900)
    browser.open(path)
    browser.evaluate("document.querySelector('.pairs input').focus()")
    browser.press("Home", 36)
    pair = "document.querySelector('.pairs .after')"
    assert browser.evaluate(f"getComputedStyle({pair}).clipPath") == "inset(0px 0px 0px 0%)"
    browser.evaluate('document.querySelector(\'.shot[data-sample="2"][data-cell="3"]\').focus()')
    browser.press("Enter", 13, "\r")
    seen = browser.evaluate(OPENED)
    assert seen["open"]
    assert "turn the apple into an orange" in seen["text"]
    assert seen["left"] != seen["right"]
    browser.press("Escape", 27)
    assert not browser.evaluate(OPENED)["open"]
    assert browser.complaints() == []
