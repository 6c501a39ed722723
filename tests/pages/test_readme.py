"""Every command and recipe of the pages is run or, where it needs the Hub, checked."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest
import yaml
from PIL import Image

import merge.recipe.bundled as bundled
import merge.run.closing_edits as closing
from merge import load_recipe
from merge.cli.main import cli, main
from merge.methods.table import METHODS
from merge.recipe.schema import (
    DistilledRef,
    EditSpec,
    ModelRef,
    OutputSpec,
    Recipe,
    VerifySpec,
)
from merge.verify.checks import CHECKS
from tests.hub import HubServer

ROOT = Path(__file__).parents[2]
PAGES = {
    name: (ROOT / name).read_text(encoding="utf-8")
    for name in (
        "README.md",
        "recipes/README.md",
        "recipes/choosing.md",
        "tests/README.md",
        "scripts/bench/README.md",
    )
}
README = PAGES["README.md"]
ALL = "\n".join(PAGES.values())
# Of a GitHub page's anchors: what is left of a heading.
_NOT_IN_ANCHORS = re.compile(r"[^\w\- ]")


def blocks(language: str, text: str = ALL) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def section(title: str, page: str = "README.md") -> str:
    found = PAGES[page].partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    assert found, f"{page} has no section {title}"
    return found


def commands(text: str) -> list[list[str]]:
    """Return the commands of a text, in order: of its sh blocks, and of the table of commands."""
    found = re.findall(r"^(?:\| `)?(instruct-merge [^`\n]*)", _commands_alone(text), re.MULTILINE)
    return [shlex.split(line, comments=True) for line in found]


def _commands_alone(text: str) -> str:
    parts = re.findall(r"```sh\n.*?```|^\| `instruct-merge .*?` \|", text, re.DOTALL | re.MULTILINE)
    return "\n".join(parts).replace("\\\n", " ")


def slug(heading: str) -> str:
    """Return the anchor that GitHub gives a heading."""
    plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
    return _NOT_IN_ANCHORS.sub("", plain.strip().lower()).replace(" ", "-")


def anchors(text: str) -> list[str]:
    outside = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    return [slug(heading) for heading in re.findall(r"^#+ (.*)$", outside, re.MULTILINE)]


def _edit_warm(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
    """Run the closing edits here, where torch and diffusers are imported already."""
    assert command[-1].endswith("job.json")
    closing.answer(command[-1])
    return subprocess.CompletedProcess(command, 0, "", "")


def _like_the_demo(tree: dict[str, Any], demo: dict[str, Any]) -> str:
    """Return a recipe with what the demo's models need: 32 px, and what they predict."""
    tree.setdefault("verify", {})["resolution"] = 32
    tree["scheduler"] = demo["scheduler"]
    return yaml.safe_dump(tree)


def _walk(folder: Path) -> None:
    """Lay out what the walk through one's own models begins with: the demo's models as these."""
    demo = yaml.safe_load((ROOT / "recipes" / "demo.yaml").read_text())
    models = folder / "models"
    shutil.copytree(ROOT / "recipes/demo/target", models / "instruct-pix2pix")
    shutil.copy(ROOT / "recipes/demo/lcm_lora.safetensors", models / "lcm-lora.safetensors")
    shutil.copytree(ROOT / "recipes/demo/base", models / "sd15")
    (text,) = blocks("yaml", section("Merge your own models"))
    (folder / "mine.yaml").write_text(_like_the_demo(yaml.safe_load(text), demo))
    picture = Image.open(ROOT / "recipes/demo/pictures/plant-flowers.png").convert("RGB")
    picture.save(folder / "photo.jpg", quality=95)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a current folder with what the pages' commands begin with."""
    recipes = tmp_path / "recipes"
    shutil.copytree(ROOT / "recipes", recipes)
    # What needs the Hub runs with the demo's models in place of the Hub's.
    demo = yaml.safe_load((recipes / "demo.yaml").read_text())
    hub = recipes / "sd15-lcm-lora.yaml"
    tree = yaml.safe_load(hub.read_text())
    tree["models"] = {
        "target": demo["models"]["target"],
        "distilled": "./demo/lcm_lora.safetensors",
    }
    hub.write_text(_like_the_demo(tree, demo))
    monkeypatch.setattr(bundled, "bundled_folder", lambda: recipes)
    processes = SimpleNamespace(run=_edit_warm, DEVNULL=subprocess.DEVNULL, PIPE=subprocess.PIPE)
    monkeypatch.setattr(closing, "subprocess", processes)
    monkeypatch.chdir(tmp_path)
    _walk(tmp_path)
    (tmp_path / "words.txt").write_text("make it night\nplant flowers\n")
    (tmp_path / "photos").mkdir()
    Image.effect_noise((80, 64), 90).save(tmp_path / "photos" / "a.png")
    return tmp_path


def test_every_command_runs(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    count = 0
    for page, text in PAGES.items():
        for words in commands(text):
            count += 1
            if words[1] == "publish" and "--dry-run" not in words:
                _publish(words, here)
                continue
            with pytest.raises(SystemExit) as stop:
                # The first run of the demo makes what later lines look at.
                main(words[1:])
            captured = capsys.readouterr()
            assert not stop.value.code, f"{page}: {words}: {captured.err}"
            assert captured.out.strip(), words
    assert count >= 40


def _publish(words: list[str], folder: Path) -> None:
    """Publish to a Hub on loopback: its client reads where that is when it is imported."""
    (folder / "hub").mkdir()
    with HubServer(folder / "hub") as hub:
        with subprocess.Popen(
            [sys.executable, "-m", "merge", *words[1:]],
            env=hub.environment(folder / "home"),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as child:
            said = child.communicate()
        assert child.returncode == 0, said[1]
        assert said[0].startswith(hub.url)


def test_every_line_that_begins_with_the_tool_is_run() -> None:
    for page, text in PAGES.items():
        lines = [line for block in blocks("sh", text) for line in block.splitlines()]
        named = [line for line in lines if line.startswith("instruct-merge")]
        table = re.findall(r"^\| `instruct-merge ", text, re.MULTILINE)
        assert len(commands(text)) == len(named) + len(table), page


def test_the_table_of_commands_has_every_command() -> None:
    shown = [words[1] for words in commands(section("Commands"))]
    assert sorted(shown) == sorted(cli.list_commands(click.Context(cli)))


def _mask(line: str) -> str:
    """Return a line without what depends on the models: its numbers, or a field's value."""
    field = re.match(r"([a-z_]+(?: [a-z]+)?)  ", line)
    if field:
        return field[1]
    return re.sub(r"\b[0-9a-f]{16}\b|\d[\d.,]*\b", "#", line.strip())


def test_what_the_walk_shows_is_printed(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    steps = re.split(r"(?=```sh\n)", section("Merge your own models"))[1:]
    shown_count = 0
    for step in steps:
        shown = [line[4:] for line in step.splitlines() if line.startswith("    ")]
        shown = [line for line in shown if not line.startswith("- ")]  # of the recipe
        if not shown:
            continue
        printed = ""
        for words in commands(step):
            with pytest.raises(SystemExit):
                main(words[1:])
            captured = capsys.readouterr()
            printed += captured.out + captured.err
        masked = {_mask(line) for line in printed.splitlines()}
        for line in shown:
            assert _mask(line) in masked, f"{line!r} is not among {sorted(masked)}"
            shown_count += 1
    assert shown_count >= 12


# What the walk says of models that do not fit, and a plan that is told it.
WRONG = {
    "has 4 input channels; an InstructPix2Pix UNet has 8": ["models.target=./models/sd15"],
    "is a full UNet: name the model that it was distilled from as models.base": [
        "models.distilled=./models/sd15"
    ],
    "every distilled model is a LoRA, which needs no base": ["models.base=./models/sd15"],
    "it looks like a LoRA for": ["models.distilled=./models/other.safetensors"],
    "is no epsilon model": ["scheduler.config={}"],
}


def test_every_message_of_the_walk_is_given(
    here: Path, tiny_sd15: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(tiny_sd15 / "lora_kohya.safetensors", here / "models" / "other.safetensors")
    walk = section("Merge your own models").partition("**When it looks wrong:**")[2]
    messages = set(re.findall(r"^\| `([^`]*)`", walk, re.MULTILINE))
    doubts = {kind.doubt for kind in CHECKS.values()}
    assert messages - doubts == WRONG.keys()
    assert len(messages & doubts) == 2
    for message, words in WRONG.items():
        with pytest.raises(SystemExit) as stop:
            main(["plan", "mine.yaml", *words])
        assert stop.value.code
        assert message in capsys.readouterr().err


def test_every_recipe_is_valid(tmp_path: Path) -> None:
    texts = blocks("yaml")
    assert len(texts) == 3
    for text in texts:
        (tmp_path / "mine.yaml").write_text(text)
        assert load_recipe(tmp_path / "mine.yaml").name == "mine"


def test_the_annotated_recipe_is_valid_and_names_defaults(tmp_path: Path) -> None:
    (text,) = blocks("yaml", section("Recipes"))
    (tmp_path / "mine.yaml").write_text(text)
    recipe = load_recipe(tmp_path / "mine.yaml")
    short = {"name": "mine", "models": yaml.safe_load(text)["models"]}
    (tmp_path / "short.yaml").write_text(yaml.safe_dump(short))
    assert load_recipe(tmp_path / "short.yaml") == recipe


def test_the_rest_of_a_recipe_names_defaults(tmp_path: Path) -> None:
    (text,) = blocks("yaml", section("What a recipe may hold", "recipes/README.md"))
    tree = yaml.safe_load(text)
    short = {"name": "mine", "models": tree["models"], "verify": {"edits": tree["verify"]["edits"]}}
    (tmp_path / "mine.yaml").write_text(text)
    (tmp_path / "short.yaml").write_text(yaml.safe_dump(short))
    assert load_recipe(tmp_path / "short.yaml") == load_recipe(tmp_path / "mine.yaml")
    model = load_recipe(tmp_path / "mine.yaml").models
    assert (model.target.ema, model.target.sha256) == (ModelRef().ema, ModelRef().sha256)
    assert model.distilled[0].weight == DistilledRef().weight
    assert tree["verify"]["edits"][0]["expected_limit"] == EditSpec("", "").expected_limit


def test_the_two_annotated_recipes_name_every_field() -> None:
    trees = [
        yaml.safe_load(blocks("yaml", text)[0])
        for text in (
            section("Recipes"),
            section("What a recipe may hold", "recipes/README.md"),
        )
    ]
    assert {key for tree in trees for key in tree} == {field.name for field in fields(Recipe)}
    for name, kind in (("verify", VerifySpec), ("output", OutputSpec)):
        named = {key for tree in trees for key in tree[name]}
        assert named == {field.name for field in fields(kind)}
    assert {*trees[1]["verify"]["edits"][0], "timesteps"} == {f.name for f in fields(EditSpec)}
    models = trees[1]["models"]
    refs = (models["base"], models["target"], models["distilled"][0])
    assert {key for ref in refs for key in ref} == {field.name for field in fields(DistilledRef)}


def test_the_table_lists_every_bundled_recipe() -> None:
    rows = re.findall(r"^\| `([a-z0-9-]+)` \|", section("Recipes"), re.MULTILINE)
    assert sorted(rows) == sorted(path.stem for path in (ROOT / "recipes").glob("*.yaml"))


@pytest.mark.parametrize(
    ("title", "page", "least"),
    [
        ("Forms", "recipes/README.md", 25),
        ("What it promises", "tests/README.md", 12),
        ("When things go wrong", "tests/README.md", 40),
    ],
)
def test_every_form_and_every_promise_has_a_proof(title: str, page: str, least: int) -> None:
    rows = re.findall(r"^\| .* \|$", section(title, page), re.MULTILINE)
    rows = [row for row in rows if not row.startswith(("| form |", "| promise |"))]
    assert len(rows) >= least
    for row in rows:
        proofs = re.findall(r"\| `(test_\w+\.py)::(test_\w+)` \|", row)
        assert len(proofs) == 1, row


def test_every_test_that_is_named_exists() -> None:
    proofs = re.findall(r"`(test_\w+\.py)::(test_\w+)`", ALL)
    assert len(proofs) >= 80
    for file, name in proofs:
        (path,) = (ROOT / "tests").rglob(file)
        text = path.read_text(encoding="utf-8")
        assert f"\ndef {name}(" in text, f"{file}::{name}"


def test_every_file_that_is_named_exists() -> None:
    places = [ROOT, *((ROOT / name).parent for name in PAGES), ROOT / "scripts" / "demo"]
    places += [path for path in (ROOT / "tests").iterdir() if path.is_dir()]
    named = re.findall(r"`((?:[\w-]+/)*[\w-]+\.py|(?:merge|scripts|tests)/[\w/]+/?)`", ALL)
    assert len(named) >= 20
    for name in named:
        assert any((place / name).exists() for place in places), name


def test_every_method_is_listed_with_its_params() -> None:
    text = section("Methods", "recipes/README.md")
    lines = re.findall(r"^\| `([a-z_]+)` \|(.*)\|$", text, re.MULTILINE)
    rows = {name: cells.split("|") for name, cells in lines if name != "method"}
    assert rows.keys() == METHODS.keys()
    for name, (_, params, _) in rows.items():
        named = re.findall(r"`(\w+)`", params)
        assert named == [param.name for param in METHODS[name].params]


def test_the_error_shown_is_the_error_given(tmp_path: Path) -> None:
    shown = re.search(r"    error: the recipe mine.yaml.*?\n    hint: [^\n]*", ALL, re.DOTALL)
    assert shown is not None
    tree = {"name": "mine", "wieght": 1, "out_dtype": "fp16"}
    tree["models"] = {"base": "a/b", "distilled": "a/c", "target": "a/d"}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(tree))
    with pytest.raises(Exception, match="not valid") as caught:
        load_recipe(tmp_path / "mine.yaml")
    expected = "\n".join(f"    {line}" for line in f"error: {caught.value}".splitlines())
    assert shown.group() == expected


def test_every_python_block_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    # Lines for plain diffusers are run with an export, in test_card.py.
    found = [text for text in blocks("python") if "from merge import" in text]
    assert found
    for text in found:
        exec(compile(text, "README", "exec"), {})
    assert {path.name for path in tmp_path.iterdir()} <= {"outputs"}


def test_the_python_names_exist() -> None:
    (names,) = re.findall(r"`from merge import ([^`]*)`", ALL)
    namespace: dict[str, object] = {}
    exec(f"from merge import ({names})", namespace)
    assert len(namespace) > 5


def test_make_targets_are_the_makefiles() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    inline = re.findall(r"`make ([a-z- ]+)(?: [A-Z]+=\S+)?`", ALL)
    fenced = re.findall(r"^make ([a-z- ]+?) *(?:#.*)?$", "\n".join(blocks("sh")), re.MULTILINE)
    words = {word for text in (*inline, *fenced) for word in text.split()}
    assert len(words) >= 8
    assert words <= targets


@pytest.mark.parametrize(
    "page", [*PAGES, "scripts/demo/RESULTS.md", "scripts/demo/TUNING.md", "recipes/demo/README.md"]
)
def test_every_link_leads_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    names = anchors(text)
    assert len(set(names)) == len(names), "two headings have one anchor"
    outside = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", outside):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        path = (ROOT / page).parent / name if name else ROOT / page
        assert path.resolve().is_relative_to(ROOT.resolve()), target
        assert path.exists(), target
        if anchor:
            assert anchor in anchors(path.read_text(encoding="utf-8")), target


def test_the_first_page_is_short() -> None:
    assert len(README.splitlines()) < 250
