"""Recipes and models that want to run code, to write elsewhere, or to call home: none of them can.

Each case runs in a child that can write to one folder only and has no network, and that notes
every attempt: opening a file for writing, a connection, a program, an import, an unpickled name.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from merge.cli.main import main
from merge.header.encode import encode_header
from tests.isolation import run_isolated
from tests.mini import contents, random_tensors, write_models, write_unet
from tests.watching import CANARY, Watch

WEIGHTS = "diffusion_pytorch_model.safetensors"
HEAD = "models: {base: ./base, distilled: ./distilled, target: ./target}\n"
EVIL = f"{CANARY}evil"
# Names that lead elsewhere, on some system or by some reader.
TRAVERSALS = [
    *("../x", "../../x", "..", ".", "", "/etc/passwd", "//etc/passwd", "./../x", "a/../../x"),
    *("..\\x", "..\\..\\x", "C:x", "C:\\x", "\\\\host\\share", "\\x", "x/..", "x/../..", "~/x"),
    *("~root/x", ".hidden", "...", "....//x", "x\0y", "x\ny", "%2e%2e/x", "..%2fx", "\u2025/x"),
    *("file:///etc/passwd", "http://example.com/x", "$HOME/x", "`id`", "$(id)", "|id", "-rf"),
]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A recipe over a pipeline, a module that tells when it is imported, and a secret nearby."""
    models = tmp_path / "models"
    tensors = write_models(models)
    write_unet(models / "target" / "unet", tensors["target"])
    (models / "target" / WEIGHTS).unlink()
    (models / "target" / "config.json").unlink()
    for name in ("vae", "tokenizer", "scheduler"):
        (models / "target" / name).mkdir()
    save_file({"w": torch.ones(4)}, models / "target" / "vae" / WEIGHTS)
    (models / "target" / "vae" / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    (models / "target" / "tokenizer" / "merges.txt").write_text("a b\n")
    write_json(models / "target" / "scheduler" / "scheduler_config.json", {"beta_start": 0.1})
    write_index(models / "target")
    (models / "mini.yaml").write_text("name: mini\n" + HEAD)
    (models / f"{EVIL}.py").write_text("raise SystemExit('ran')\n")
    (tmp_path / "secret.txt").write_text("secret")
    return tmp_path


def write_json(path: Path, tree: object) -> None:
    path.write_text(json.dumps(tree))


def write_index(folder: Path, **entries: object) -> None:
    index = {
        "_class_name": "StableDiffusionInstructPix2PixPipeline",
        "scheduler": ["diffusers", "DDIMScheduler"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    write_json(folder / "model_index.json", {**index, **entries})


def attack(place: Path, commands: list[list[str]]) -> list[tuple[int, list[str], str]]:
    """Run commands in a child; return exit codes, what they should not do, and what they said."""
    os.chdir(place / "models")
    os.environ["PYTHONPATH"] = str(place / "models")
    os.environ["CANARY_SECRET"] = "canary-value"
    sys.path.insert(0, str(place / "models"))
    watch = Watch([place / "out"])
    results = []
    for words in commands:
        said = io.StringIO()
        # An earlier test's stderr is gone by now.
        logging.getLogger("merge").handlers.clear()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            try:
                main(words)
            except SystemExit as error:
                results.append((int(error.code or 0), watch.seen, said.getvalue()))
        watch.seen = []
    assert len(results) == len(commands)
    return results


def run_all(
    place: Path, commands: list[list[str]], *, calls: bool = False
) -> list[tuple[int, str]]:
    """Run recipes where only `out` can be written to; return exit codes and messages."""
    (place / "out").mkdir(exist_ok=True)
    before = contents(place / "models", but=())
    made = str(place / "out" / "made")
    lines = [["run", "--no-verify", "--out", made, *words] for words in commands]
    results = run_isolated(attack, place, lines, writable=[place / "out"])
    for words, (_, seen, said) in zip(commands, results, strict=True):
        assert [line for line in seen if not (calls and line.startswith("socket."))] == [], words
        assert "canary-value" not in said
        assert "Traceback" not in said
    assert contents(place / "models", but=()) == before
    return [(code, said) for code, _, said in results]


def refused_all(place: Path, commands: list[list[str]], *, calls: bool = False) -> list[str]:
    results = run_all(place, commands, calls=calls)
    for words, (code, said) in zip(commands, results, strict=True):
        assert code in (3, 4, 5, 6), (words, said)
        assert said.rstrip().splitlines()[-1].startswith("hint: ")
    assert list((place / "out").iterdir()) == []
    return [said for _, said in results]


def run(place: Path, *words: str) -> tuple[int, str]:
    return run_all(place, [["mini.yaml", *words]])[0]


def refused(place: Path, *words: str) -> str:
    return refused_all(place, [["mini.yaml", *words]])[0]


def test_a_good_run_writes_to_its_output_alone_and_calls_nobody(place: Path) -> None:
    for words in ([], ["--overwrite"]):
        code, said = run(place, *words)
        assert code == 0, said
    assert (place / "out" / "made" / "unet" / WEIGHTS).is_file()
    assert [path.name for path in (place / "out").iterdir()] == ["made"]


def test_the_watch_sees_what_it_should(place: Path) -> None:
    def misbehave() -> list[str]:
        watch = Watch([place / "out"])
        for attempt in (
            lambda: (place / "elsewhere").write_text("x"),
            lambda: (place / "secret.txt").unlink(),
            lambda: (place / "secret.txt").rename(place / "out" / "x"),
            lambda: __import__("socket").create_connection(("127.0.0.1", 9), 1),
            lambda: os.system("true"),
            lambda: __import__(EVIL),
            lambda: __import__("pickle").loads(b"cos\nsystem\n."),
        ):
            with contextlib.suppress(OSError, ImportError):
                attempt()
        return watch.seen

    (place / "out").mkdir()
    seen = run_isolated(misbehave, writable=[place / "out"])
    assert [line.split()[0] for line in seen] == [
        *("open", "os.remove", "os.rename", "socket.getaddrinfo", "socket.connect", "os.system"),
        *("import", "unpickles"),
    ]
    assert (place / "secret.txt").read_text() == "secret"


# Recipes -----------------------------------------------------------------------------------------

RECIPES = {
    "an environment variable": "exclude: ['${oc.env:CANARY_SECRET}']",
    "an environment variable in a path": "output: {folder: 'x/${oc.env:CANARY_SECRET}'}",
    "a module by coerce": "exclude: ['${oc.coerce:" + EVIL + ".X,1}']",
    "a module by create": "exclude: ['${oc.create:{_target_: " + EVIL + "}}']",
    "a decoded text": "exclude: ['${oc.decode:__import__}']",
    "a resolver of nobody": "exclude: ['${eval:1}']",
    "an interpolation that leads to itself": "exclude: ['${exclude}']",
    "a Python object": "exclude: !!python/object/apply:os.system ['touch x']",
    "a Python name": "exclude: !!python/name:os.system ''",
    "a Python module": f"exclude: !!python/module:{EVIL} ''",
    "a Python object that is made": f"exclude: !!python/object/new:{EVIL}.X []",
    "a tag of nobody": "exclude: !evil x",
    "a list in itself": "exclude: &a [*a]",
    "a target to call": "scheduler: {_target_: os.system}",
    "another scheduler class": "scheduler: {class_name: ../../evil}",
    "a pipeline class": "custom_pipeline: evil/evil",
    "trusted code": "trust_remote_code: true",
}


@pytest.mark.parametrize("case", RECIPES)
def test_a_hostile_recipe_is_refused(place: Path, case: str) -> None:
    (place / "models" / "mini.yaml").write_text(f"name: mini\n{HEAD}{RECIPES[case]}\n")
    refused(place)


def test_an_alias_bomb_is_refused(place: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10)]
    text = "scheduler:\n  config:\n    " + "\n    ".join(lines)
    (place / "models" / "mini.yaml").write_text(f"name: mini\n{HEAD}{text}\n")
    assert "expansion exceeds" in refused(place)


@pytest.mark.parametrize("field", ["name", "subfolder", "repo", "revision", "file"])
def test_names_of_a_recipe_lead_nowhere(place: Path, field: str) -> None:
    commands, asked = [], []
    for index, name in enumerate(TRAVERSALS):
        recipe: dict[str, Any] = {"name": "mini"}
        target: dict[str, str] = {"path": "./target"}
        if field == "name":
            recipe["name"] = name
        elif field == "subfolder":
            # Nothing there: the folder itself.
            target["subfolder"] = name or ".."
        else:
            target = {"repo": "a/b", field: name}
        recipe["models"] = {"base": "./base", "distilled": "./distilled", "target": target}
        write_json(place / "models" / f"{index}.yaml", recipe)
        # The Hub is asked for what could be a name of it.
        is_asked = field in ("revision", "file") and ".." not in re.split(r"[/\\]", name)
        (asked if is_asked else commands).append([f"{index}.yaml"])
    refused_all(place, commands)
    refused_all(place, asked, calls=True)


# Models ------------------------------------------------------------------------------------------


def variants(place: Path, role: str, change: Callable[[Path, str], None]) -> list[list[str]]:
    """Make a copy of a model for each name, changed; return a command for each."""
    commands = []
    for index, name in enumerate(TRAVERSALS):
        folder = place / "models" / f"{role}{index}"
        shutil.copytree(place / "models" / role, folder)
        change(folder, name)
        commands.append(["mini.yaml", f"models.{role}=./{role}{index}"])
    return commands


def test_components_lead_nowhere(place: Path) -> None:
    def change(folder: Path, name: str) -> None:
        write_index(folder, **{name: ["diffusers", "AutoencoderKL"]})

    refused_all(place, variants(place, "target", change))


@pytest.mark.parametrize(
    "entry", [[EVIL, "X"], ["../x", "X"], ["os", "system"], ["", "X"], [5, "X"], [[], "X"]]
)
def test_components_of_other_libraries_are_refused(place: Path, entry: list[Any]) -> None:
    write_index(place / "models" / "target", vae=entry)
    assert "is code of its own" in refused(place)


def test_code_beside_a_model_is_neither_run_nor_copied(place: Path) -> None:
    target = place / "models" / "target"
    code = "raise SystemExit('ran')\n"
    for name in ("pipeline.py", "vae/modeling.py", "tokenizer/tokenization.py"):
        (target / name).write_text(code)
    write_index(place / "models" / "target", _class_name=["pipeline", "Evil"])
    assert "code of its own (pipeline.Evil)" in refused(place)
    write_index(place / "models" / "target", _class_name="EvilPipeline", custom_pipeline="pipeline")
    for name in ("tokenizer/tokenizer_config.json", "vae/config.json"):
        write_json(target / name, {"auto_map": {"AutoTokenizer": ["tokenization.X", None]}})
    code_of_run, said = run(place)
    assert code_of_run == 0, said
    assert not list((place / "out").rglob("*.py"))
    index = json.loads((place / "out" / "made" / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionInstructPix2PixPipeline"


def test_an_index_of_shards_leads_nowhere(place: Path) -> None:
    base = place / "models" / "base"
    (base / WEIGHTS).unlink()
    tensors = random_tensors(1)
    names = [f"diffusion_pytorch_model-0000{part}-of-00002.safetensors" for part in (1, 2)]
    weight_map = {}
    for part, name in enumerate(names):
        keys = sorted(tensors)[part::2]
        save_file({key: tensors[key] for key in keys}, base / name)
        weight_map |= dict.fromkeys(keys, name)
    index = f"{WEIGHTS}.index.json"
    write_json(base / index, {"weight_map": weight_map})

    def change(folder: Path, name: str) -> None:
        write_json(folder / index, {"weight_map": {**weight_map, "conv_in.bias": name}})

    for said in refused_all(place, variants(place, "base", change)):
        assert "not the name of a file beside it" in said or "which is missing" in said
    assert run(place)[0] == 0


def test_tensors_with_names_that_lead_elsewhere_lead_nowhere(place: Path) -> None:
    tensors = {name: ("F16", value.shape) for name, value in random_tensors(1).items()}

    def change(folder: Path, name: str) -> None:
        header, parsed = encode_header({**tensors, name: ("F16", (1,))}, {})
        (folder / WEIGHTS).write_bytes(header + bytes(parsed.file_bytes - len(header)))

    refused_all(place, variants(place, "distilled", change))


def test_metadata_is_text_and_nothing_else(place: Path) -> None:
    evil = {
        "modelspec.thumbnail": "data:text/html,<script>alert(1)</script>",
        "modelspec.description": "[x](javascript:alert(1)) \x1b]0;evil\x07 <img src=x onerror=y>",
        "ss_output_name": "../../x",
        "workflow": "x" * 100_000,
    }
    save_file(random_tensors(3), place / "models" / "distilled" / WEIGHTS, evil)
    code, said = run(place)
    assert code == 0, said
    for path in (place / "out" / "made").rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            if path.suffix == ".safetensors":
                # The header alone: values may be any bytes.
                data = data[: int.from_bytes(data[:8], "little") + 8]
            assert not any(
                word in data for word in (b"<script", b"javascript:", b"\x1b", b"onerror", b"xxxx")
            ), path
    assert "\x1b" not in said


class _Payload:
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, ...]]:
        return os.system, ("touch ran",)


@pytest.mark.parametrize("is_allowed", [False, True])
@pytest.mark.parametrize("role", ["base", "distilled", "target/unet", "target/vae"])
def test_pickles_run_nothing(place: Path, role: str, is_allowed: bool) -> None:
    folder = place / "models" / role
    (folder / WEIGHTS).unlink()
    torch.save(
        {**random_tensors(1, channels=8 if "unet" in role else 4), "x": _Payload()},
        folder / "diffusion_pytorch_model.bin",
    )
    refused(place, f"allow_pickle={str(is_allowed).lower()}")


def test_a_link_out_of_a_model_is_told(place: Path) -> None:
    merges = place / "models" / "target" / "tokenizer" / "merges.txt"
    merges.unlink()
    merges.symlink_to(place / "secret.txt")
    code, said = run(place)
    assert code == 0, said
    assert f"tokenizer/merges.txt is a link to {place}/secret.txt" in said
    assert "its content goes into the output" in said
