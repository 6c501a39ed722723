"""Every command and recipe of the README is run or, where it needs the Hub, checked."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from PIL import Image

import merge.recipe.bundled as bundled
import merge.run.closing_edits as closing
from merge import load_recipe
from merge.cli.main import main
from merge.methods.table import METHODS
from tests.hub import HubServer

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def section(title: str) -> str:
    return README.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def commands() -> list[list[str]]:
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    return [shlex.split(line, comments=True) for line in lines if line.startswith("instruct-merge")]


def _edit_warm(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
    """Run the closing edits here, where torch and diffusers are imported already."""
    assert command[-1].endswith("job.json")
    closing.answer(command[-1])
    return subprocess.CompletedProcess(command, 0, "", "")


def test_every_command_runs(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
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
    tree["verify"]["resolution"] = 32
    tree["scheduler"] = demo["scheduler"]
    hub.write_text(yaml.safe_dump(tree))
    monkeypatch.setattr(bundled, "bundled_folder", lambda: recipes)
    processes = SimpleNamespace(run=_edit_warm, DEVNULL=subprocess.DEVNULL, PIPE=subprocess.PIPE)
    monkeypatch.setattr(closing, "subprocess", processes)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    for path in (tmp_path / "photo.jpg", tmp_path / "photos" / "a.png"):
        Image.effect_noise((80, 64), 90).save(path)
    todo = commands()
    assert len(todo) >= 12
    for words in todo:
        if words[1] == "publish" and "--dry-run" not in words:
            _publish(words, tmp_path)
            continue
        with pytest.raises(SystemExit) as stop:
            # The first run of the demo makes what later lines look at.
            main([word for word in words[1:] if not word.startswith("mine.yaml/")])
        captured = capsys.readouterr()
        assert not stop.value.code, f"{words}: {captured.err}"
        assert captured.out.strip(), words


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


def test_the_annotated_recipe_is_valid_and_names_defaults(tmp_path: Path) -> None:
    (text,) = blocks("yaml")
    (tmp_path / "mine.yaml").write_text(text)
    recipe = load_recipe(tmp_path / "mine.yaml")
    short = {"name": "mine", "models": yaml.safe_load(text)["models"]}
    (tmp_path / "short.yaml").write_text(yaml.safe_dump(short))
    assert load_recipe(tmp_path / "short.yaml") == recipe


def test_the_table_lists_every_bundled_recipe() -> None:
    rows = re.findall(r"^\| `([a-z0-9-]+)` \|", section("Recipes"), re.MULTILINE)
    assert sorted(rows) == sorted(path.stem for path in (ROOT / "recipes").glob("*.yaml"))


def test_every_form_has_a_proof() -> None:
    proofs = re.findall(r"\| `(test_\w+\.py)::(test_\w+)` \|", README)
    assert len(proofs) >= 15
    for file, name in proofs:
        text = (ROOT / "tests" / file).read_text(encoding="utf-8")
        assert f"\ndef {name}(" in text, f"{file}::{name}"


def test_every_method_is_listed_with_its_params() -> None:
    lines = re.findall(r"^\| `([a-z_]+)` \|(.*)\|$", section("Methods"), re.MULTILINE)
    rows = {name: cells.split("|") for name, cells in lines if name != "method"}
    assert rows.keys() == METHODS.keys()
    for name, (_, params, _) in rows.items():
        named = re.findall(r"`(\w+)`", params)
        assert named == [param.name for param in METHODS[name].params]


def test_the_error_shown_is_the_error_given(tmp_path: Path) -> None:
    shown = re.search(r"    error: the recipe mine.yaml.*?\n    hint: [^\n]*", README, re.DOTALL)
    assert shown is not None
    tree = {"name": "mine", "wieght": 1, "out_dtype": "fp16"}
    tree["models"] = {"base": "a/b", "distilled": "a/c", "target": "a/d"}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(tree))
    with pytest.raises(Exception, match="not valid") as caught:
        load_recipe(tmp_path / "mine.yaml")
    expected = "\n".join(f"    {line}" for line in f"error: {caught.value}".splitlines())
    assert shown.group() == expected


def test_the_python_names_exist() -> None:
    (names,) = re.findall(r"`from merge import ([^`]*)`", README)
    namespace: dict[str, object] = {}
    exec(f"from merge import ({names})", namespace)
    assert len(namespace) > 5


def test_make_targets_are_the_makefiles() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"`make ([a-z- ]+)`|^make ([a-z-]+)", README, re.MULTILINE))
    words = {word for pair in named for text in pair for word in text.split()}
    assert words
    assert words <= targets
