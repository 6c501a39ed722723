"""What is taken over from a local model: no place of its trainer's machine, but its licence."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file, save_file

from merge import convert, load_recipe, run_recipe
from merge.disclosure.portable import blank_places
from merge.errors import PublishError
from merge.publication.parents import decide
from merge.publication.scan import scan
from merge.recipe.bundled import bundled_folder
from tests.mini import write_recipe


@pytest.mark.parametrize(
    ("value", "is_place"),
    [
        ("/home/ann/models/sd", True),
        ("/root/x", True),
        ("/mnt/data/ip2p", True),
        ("~/models", True),
        ("C:\\Users\\ann\\sd", True),
        ("\\\\server\\share", True),
        ("openai/clip-vit-large-patch14", False),
        ("./relative", False),
        ("runwayml/stable-diffusion-v1-5", False),
        ("<|endoftext|>", False),
        ("</w>", False),
        ("/", False),
        ("", False),
    ],
)
def test_only_places_are_blanked(value: str, is_place: bool) -> None:
    tree = {"_name_or_path": value, "deep": [{"vocab_file": value}], "size": 3}
    blank, fields = blank_places(tree)
    expected = "" if is_place else value
    assert blank == {"_name_or_path": expected, "deep": [{"vocab_file": expected}], "size": 3}
    assert fields == (("_name_or_path", "vocab_file") if is_place else ())


FILES = (
    "unet/config.json",
    "vae/config.json",
    "model_index.json",
    "tokenizer/tokenizer_config.json",
)


def with_places(target: Path) -> None:
    for name in FILES:
        path = target / name
        tree = json.loads(path.read_text()) if path.is_file() else {}
        path.write_text(json.dumps({**tree, "_name_or_path": "/home/trainer/runs/7"}))


def recipe_over(folder: Path, tiny: Path, target: Any) -> Any:
    models = {"distilled": str(tiny / "lora_kohya.safetensors"), "target": target}
    return load_recipe(write_recipe(folder, models=models, verify={"resolution": 64}))


def test_an_export_holds_no_place_of_the_trainers_machine(
    tiny_sd15: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    target = Path(shutil.copytree(tiny_sd15 / "target", tmp_path / "target"))
    with_places(target)
    recipe = recipe_over(tmp_path, tiny_sd15, "./target")
    run_recipe(recipe, tmp_path / "out", device="cpu", verify=False)
    for name in FILES:
        found = json.loads((tmp_path / "out" / name).read_text())
        assert found["_name_or_path"] == ""
        before = json.loads((target / name).read_text())
        assert {**found, "_name_or_path": before["_name_or_path"]}.keys() == before.keys()
        assert f"{name}: _name_or_path holds a place of another machine" in caplog.text
    names = [p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*")]
    assert scan(tmp_path / "out", [n for n in names if n.endswith(".json")], "") == []
    # What holds none is copied byte for byte, and the set is the same every time.
    name = "text_encoder/config.json"
    assert (tmp_path / "out" / name).read_bytes() == (target / name).read_bytes()
    run_recipe(recipe, tmp_path / "again", device="cpu", verify=False)
    manifests = [(tmp_path / n / "merge_manifest.json").read_bytes() for n in ("out", "again")]
    assert manifests[0] == manifests[1]
    # The digest of the input is of the file as it is.
    inputs = json.loads(manifests[0])["inputs"]["target"]["files"]
    assert inputs["vae/config.json"]["size"] == (target / "vae/config.json").stat().st_size


def test_a_conversion_blanks_places_too(tiny_sd15: Path, tmp_path: Path) -> None:
    target = Path(shutil.copytree(tiny_sd15 / "target", tmp_path / "target"))
    with_places(target)
    convert(target, tmp_path / "one.safetensors")
    result = convert(tmp_path / "one.safetensors", tmp_path / "back", config=target)
    for name in FILES:
        assert json.loads((tmp_path / "back" / name).read_text())["_name_or_path"] == ""
        assert any(line.startswith(f"{name}: _name_or_path holds") for line in result.notes)


# Links ------------------------------------------------------------------------------------------


def test_configs_of_another_folder_are_no_links(
    tiny_sd15: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    convert(tiny_sd15 / "target", tmp_path / "one.safetensors")
    target = {"path": "./one.safetensors", "config": str(tiny_sd15 / "target")}
    recipe = recipe_over(tmp_path, tiny_sd15, target)
    run_recipe(recipe, tmp_path / "out", device="cpu", verify=False)
    assert "is a link" not in caplog.text


def test_links_are_told_in_one_warning(
    tiny_sd15: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    target = Path(shutil.copytree(tiny_sd15 / "target", tmp_path / "target"))
    for name in ("tokenizer/merges.txt", "vae/config.json"):
        (target / name).rename(tmp_path / Path(name).name)
        (target / name).symlink_to(tmp_path / Path(name).name)
    recipe = recipe_over(tmp_path, tiny_sd15, "./target")
    run_recipe(recipe, tmp_path / "out", device="cpu", verify=False)
    (line,) = (r.message for r in caplog.records if "is a link" in r.message)
    assert "tokenizer/merges.txt is a link to" in line
    assert "vae/config.json is a link to" in line


# Licences ---------------------------------------------------------------------------------------


def manifest_of(out: Path) -> dict[str, Any]:
    tree: dict[str, Any] = json.loads((out / "merge_manifest.json").read_text())
    return tree


def test_a_card_beside_local_models_states_their_licence(tmp_path: Path) -> None:
    recipe = load_recipe(bundled_folder() / "demo.yaml")
    run_recipe(recipe, tmp_path / "out", device="cpu", verify=False)
    stated = json.loads((tmp_path / "out" / "run.json").read_text())["licences"]
    assert stated == dict.fromkeys(("base", "distilled", "target"), "apache-2.0")
    assert decide(manifest_of(tmp_path / "out"), None, stated).licence.id == "apache-2.0"
    with pytest.raises(PublishError, match="the licence of base, distilled, target is not known"):
        decide(manifest_of(tmp_path / "out"), None)


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        ("---\nlicense: mit\n---\ntext", "mit"),
        ("---\nlicense: other\nlicense_name: sai-nc-community\n---\n", "sai-nc-community"),
        ("no front matter\n---\nlicense: mit\n---", None),
        ("---\nlicense: [mit]\n---\n", None),
        ("---\n: : :\n---\n", None),
        ("", None),
    ],
)
def test_what_a_card_states(
    tiny_sd15: Path, tmp_path: Path, card: str, licence: str | None
) -> None:
    target = Path(shutil.copytree(tiny_sd15 / "target", tmp_path / "m" / "target"))
    (target / "README.md").write_text(card)
    recipe = recipe_over(tmp_path, tiny_sd15, str(target))
    run_recipe(recipe, tmp_path / "out", device="cpu", verify=False)
    stated = json.loads((tmp_path / "out" / "run.json").read_text())["licences"]
    assert stated.get("target") == licence


def test_the_metadata_of_a_lora_states_its_licence(tiny_sd15: Path, tmp_path: Path) -> None:
    lora = load_file(tiny_sd15 / "lora_kohya.safetensors")
    (tmp_path / "l").mkdir()
    save_file(lora, tmp_path / "l" / "x.safetensors", {"modelspec.license": "CC-BY-NC-4.0"})
    models = {"distilled": "./l/x.safetensors", "target": str(tiny_sd15 / "target")}
    recipe = load_recipe(write_recipe(tmp_path, models=models))
    run_recipe(recipe, tmp_path / "out", device="cpu", verify=False)
    assert yaml.safe_load((tmp_path / "out" / "run.json").read_text())["licences"] == {
        "distilled": "cc-by-nc-4.0"
    }
