"""The card of an export: its lines really load what they stand beside, and texts stay texts."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from huggingface_hub import ModelCard
from PIL import Image

from merge import EditSettings, load_editor, load_recipe, run_recipe
from merge import edit as edit_picture
from merge.card.metadata import CardLicence
from merge.card.refresh import draft_card, refresh_card
from merge.card.render import CARD_MARKER, CARD_NAME, render_card
from merge.errors import CheckpointError, SourceNotFoundError
from merge.records.folder import LOCK_NAME, MANIFEST_NAME

COMMIT = "0123456789abcdef0123456789abcdef01234567"
PLACEHOLDER = "path/to/this/folder"
NASTY = (
    "</details><script>alert(1)</script>\n---\nlicense: mit\n---\n# title | cell `code` ```\n"
    "![x](javascript:1) [a](https://evil.example) www.evil.example <!-- \u202e \ud800 &lt;b> _i_"
)


def export(root: Path, folder: Path, **fields: Any) -> Path:
    tree = {
        "name": "carded",
        "models": {role: str(root / role) for role in ("base", "distilled", "target")},
        "verify": {"resolution": 64},
        # Half precision overflows in these random models on a CPU.
        "out_dtype": "float32",
        **fields,
    }
    path = folder.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(tree))
    return run_recipe(load_recipe(path), folder, device="cpu", verify=False).folder


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    models: Path = request.getfixturevalue(f"tiny_{request.param}")
    root = tmp_path_factory.mktemp(f"card-{request.param}")
    return export(models, root / "out", output={"single_file": True})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An export's records with Hub parents and a report, without its weights."""
    hub = {"sha256": {}, "revision": COMMIT}
    recipe: dict[str, Any] = {
        "name": "recorded",
        "models": {
            "base": {"repo": "org/base", **hub},
            "distilled": [
                {"repo": "org/few-step", "weight": 1.0, **hub},
                {"repo": "org/base", "weight": 0.25, **hub},
            ],
            "target": {"repo": "org/edit", **hub},
        },
        "method": "dare_ties",
        "params": {"density": 0.75, "seed": 2**62 + 1},
        "weight": 0.5,
        "components": ["unet"],
        "block_weights": {"down_blocks.0.*": 0.125},
        "exclude": ["conv_out.*"],
        "guidance_embedding": "bake",
        "bake_guidance": 7.5,
        "out_dtype": "bfloat16",
        "scheduler": {"class_name": "TCDScheduler", "config": {}},
        "verify": {"steps": 6, "guidance_scale": 1.75, "resolution": 640},
    }
    files = {"unet/diffusion_pytorch_model.safetensors": {"size": 1234567, "sha256": "a" * 64}}
    manifest = {
        "schema_version": 1,
        "tool": {"name": "instruct-merge", "version": "1.2.3"},
        "recipe_digest": "d" * 64,
        "architecture": "sdxl",
        "inputs": {
            "base": {"repo": "org/base", "commit": COMMIT, "files": {}},
            "distilled[0]": {"repo": "org/few-step", "commit": COMMIT, "files": {}},
            "distilled[1]": {"repo": "org/base", "commit": COMMIT, "files": {}},
            "target": {"repo": "org/edit", "commit": COMMIT, "files": {}},
        },
        "counts": {"delta": 7, "copy": 1, "cast": 0},
        "left_out": [{"model": "base", "key": "conv_in.weight", "reason": "channels"}],
        "files": files,
    }
    settings = {
        "steps": 6,
        "guidance_scale": 1.75,
        "image_guidance_scale": 1.0,
        "resolution": 640,
        "seed": 3,
    }
    edits = [
        {
            "instruction": f"make it {index}",
            "seed": 3,
            "settings": settings,
            "files": [f"images/{index:02d}-3-{kind}.png" for kind in ("source", "merged")],
        }
        for index in range(8)
    ]
    checks = [
        {"name": "not_black", "value": v, "limit": 0.05, "rule": "at least", "passed": v > 0.05}
        for v in (0.5, 1.0)
    ]
    report = {
        "passed": True,
        "summary": {"recipe_digest": "d" * 64},
        "checks": checks,
        "edits": edits,
        "notes": ["no CLIP model"],
    }
    (tmp_path / "images").mkdir()
    for edit in edits:
        for name in edit["files"]:  # type: ignore[attr-defined]
            (tmp_path / name).touch()
    (tmp_path / "model_index.json").write_text("{}")
    (tmp_path / "unet").mkdir(exist_ok=True)
    (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").touch()
    (tmp_path / LOCK_NAME).write_text(yaml.safe_dump({"recipe": recipe}))
    (tmp_path / MANIFEST_NAME).write_text(json.dumps(manifest))
    (tmp_path / "report.json").write_text(json.dumps(report))
    return tmp_path


def change(folder: Path, name: str, edit: Callable[[Any], object]) -> None:
    """Change a record in place."""
    path = folder / name
    is_lock = name == LOCK_NAME
    tree = yaml.safe_load(path.read_text()) if is_lock else json.loads(path.read_text())
    edit(tree["recipe"] if is_lock else tree)
    path.write_text(yaml.safe_dump(tree) if is_lock else json.dumps(tree))


def test_a_new_report_renews_our_card_and_no_other(folder: Path) -> None:
    path = folder / CARD_NAME
    report = (folder / "report.json").read_bytes()
    (folder / "report.json").unlink()
    before = draft_card(folder)
    assert "images/" not in before
    (folder / "report.json").write_bytes(report)
    path.write_text(before)
    refresh_card(folder)
    assert path.read_text() == draft_card(folder) != before
    assert "images/00-3-merged.png" in path.read_text()
    published = render_card(folder, repo_id="org/x").replace("make it 0", "as it was")
    for text in ("# My own words\n", published):
        path.write_text(text)
        refresh_card(folder)
        assert path.read_text() == text
    path.unlink()
    refresh_card(folder)
    assert not path.exists()


def test_a_draft_states_the_licence_that_is_known(folder: Path) -> None:
    assert "license" not in draft_card(folder).split("---")[1]
    repos = {"target": "timbrooks/instruct-pix2pix", "base": "runwayml/stable-diffusion-v1-5"}
    for role, repo in repos.items():
        change(folder, MANIFEST_NAME, put("inputs", role, "repo", value=repo))
    change(
        folder,
        MANIFEST_NAME,
        lambda tree: [
            model.update(repo="latent-consistency/lcm-lora-sdv1-5")
            for role, model in tree["inputs"].items()
            if role not in repos and "repo" in model
        ],
    )
    tree = json.loads((folder / MANIFEST_NAME).read_text())
    for role in [role for role, model in tree["inputs"].items() if "repo" not in model]:
        del tree["inputs"][role]
    (folder / MANIFEST_NAME).write_text(json.dumps(tree))
    assert "license: creativeml-openrail-m" in draft_card(folder).split("---")[1]


def blocks(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def execute(code: str, where: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Run a card's lines in a folder with a photo, on the CPU and without a network."""
    import diffusers

    diffusers.logging.set_verbosity_error()
    diffusers.logging.disable_progress_bar()
    monkeypatch.chdir(where)
    Image.effect_noise((80, 64), 90).save("photo.jpg")
    code = code.replace('.to("cuda")', "")
    code = code.replace(
        "from_pretrained(", "from_pretrained(local_files_only=True, pretrained_model_name_or_path="
    )
    space: dict[str, Any] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(code, space)
    return space


@pytest.mark.parametrize("repo_id", [None, "org/carded"])
def test_the_lines_of_the_card_load_and_edit(
    exported: Path, repo_id: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = render_card(exported, repo_id=repo_id)
    if repo_id is None:
        assert text == (exported / CARD_NAME).read_text()
        code = "".join(blocks(text)).replace(PLACEHOLDER, str(exported))
    else:
        address = "https://huggingface.co/org/carded/blob/main/carded.safetensors"
        assert text.count(address) == 1
        code = "".join(blocks(text)).replace(address, str(exported / "carded.safetensors"))
        code = code.replace('"org/carded"', json.dumps(str(exported)))
        assert PLACEHOLDER not in text
    assert len(blocks(text)) == 2
    space = execute(code, tmp_path, monkeypatch)
    assert space["image"].size == (64, 64)
    assert (tmp_path / "edited.png").is_file()
    assert space["pipeline"].unet.config.in_channels == 8
    assert "local" in text
    assert str(exported.parent) not in text


def test_another_length_of_schedule_is_set(
    tiny_sd15: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = export(
        tiny_sd15, tmp_path / "out", verify={"resolution": 64, "original_inference_steps": 25}
    )
    code = blocks((folder / CARD_NAME).read_text())[0].replace(PLACEHOLDER, str(folder))
    space = execute(code, tmp_path, monkeypatch)
    assert space["pipeline"].scheduler.config.original_inference_steps == 25
    # Every 40th of 1000 training steps, and of those 25 every 6th, from the top.
    assert space["pipeline"].scheduler.timesteps.tolist() == [999, 759, 519, 279]


def test_the_two_lines_of_timesteps_give_our_pictures(
    tiny_sd15: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timesteps = [999, 599, 299, 99]
    verify = {"resolution": 64, "timesteps": timesteps, "guidance_scale": 1.5}
    folder = export(tiny_sd15, tmp_path / "out", verify=verify, out_dtype="float32")
    text = (folder / CARD_NAME).read_text()
    assert "--timesteps 999,599,299,99" in text
    assert "the two lines set them on the scheduler" in text
    code = blocks(text)[0].replace(PLACEHOLDER, str(folder))
    added = [line for line in code.splitlines() if "timesteps" in line]
    assert len(added) == 2
    space = execute(code, tmp_path, monkeypatch)
    assert space["pipeline"].scheduler.timesteps.tolist() == timesteps

    photo = Image.open(tmp_path / "photo.jpg").convert("RGB").resize((64, 64))
    settings = EditSettings(timesteps=tuple(timesteps), guidance_scale=1.5, resolution=64)
    ours = edit_picture(
        load_editor(folder, device="cpu"), photo, "make it winter", settings
    ).to_pil()
    gaps = np.asarray(ours).astype(int) - np.asarray(space["image"])
    assert np.abs(gaps).max() <= 1
    # Without the lines the scheduler picks its own.
    plain = "\n".join(line for line in code.splitlines() if "timesteps" not in line)
    other = execute(plain, tmp_path, monkeypatch)
    assert other["pipeline"].scheduler.timesteps.tolist() == [999, 759, 499, 259]
    assert np.abs(np.asarray(ours).astype(int) - np.asarray(other["image"])).max() > 1


def test_a_unet_alone_loads(
    tiny_sd15: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = {role: str(tiny_sd15 / role) for role in ("base", "distilled")}
    models["target"] = str(tiny_sd15 / "target" / "unet")
    folder = export(tiny_sd15, tmp_path / "out", models=models)
    text = (folder / CARD_NAME).read_text()
    (code,) = blocks(text)
    space = execute(code.replace(PLACEHOLDER, str(folder)), tmp_path, monkeypatch)
    assert space["unet"].config.in_channels == 8
    (folder / "unet" / "config.json").unlink()
    assert "without a config" in render_card(folder)


def test_the_front_matter_is_read_by_the_hub_client(folder: Path) -> None:
    licence = CardLicence("other", "sai-nc-community", "https://example.org/LICENSE.md")
    data = ModelCard(render_card(folder, repo_id="org/x", licence=licence)).data.to_dict()
    assert data == {
        "library_name": "diffusers",
        "pipeline_tag": "image-to-image",
        "base_model": ["org/edit", "org/base", "org/few-step"],
        "base_model_relation": "merge",
        "tags": [
            "instruct-pix2pix",
            "merge",
            "tcd",
            "dare-ties",
            "stable-diffusion-xl",
            "image-to-image",
        ],
        "license": "other",
        "license_name": "sai-nc-community",
        "license_link": "https://example.org/LICENSE.md",
    }


def test_local_parents_and_unknown_licences_leave_their_fields_out(exported: Path) -> None:
    data = ModelCard((exported / CARD_NAME).read_text()).data.to_dict()
    assert set(data) == {"library_name", "pipeline_tag", "tags"}
    assert "lcm" in data["tags"]


def test_the_marker_is_the_first_line_after_the_front_matter(folder: Path) -> None:
    text = render_card(folder)
    assert text.startswith("---\nlibrary_name")
    assert text.split("\n---\n", 1)[1].splitlines()[0] == CARD_MARKER
    assert CARD_MARKER == "<!-- made by instruct-merge -->"


def test_the_card_has_the_numbers_of_the_records(folder: Path) -> None:
    text = render_card(folder, repo_id="org/x")
    for line in (
        "# recorded",
        "| weight | 0.5 |",
        "| density | `0.75` |",
        f"| seed | `{2**62 + 1}` |",
        "| normalize | `false` |",
        "| weight of distilled&#91;1&#93; | 0.25, times the weight above |",
        "| weight of `down_blocks.0.*` | 0.125 |",
        "| kept from the target | `conv_out.*` |",
        "| guidance scale that is baked in | 7.5 |",
        "Of 8 tensors: 1 copy, 7 delta.",
        f"| target | [org/edit](https://huggingface.co/org/edit) | `{COMMIT}` |",
        f"| `unet/diffusion_pytorch_model.safetensors` | 1.23 MB | `{'a' * 64}` |",
        f"Made by instruct-merge `1.2.3`, recipe digest `{'d' * 64}`.",
        "instruct-merge reproduce FOLDER       # merges again and compares every SHA-256",
        "instruct-merge run FOLDER/recipe.lock.yaml    # merges again",
        "    num_inference_steps=6,",
        "    guidance_scale=1.75,",
        "    height=640,",
        '    "org/x", torch_dtype=torch.bfloat16',
        "- The idea was found to work at 768 px only.",
    ):
        assert line in text.splitlines(), line
    assert yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])["name"] == "recorded"


def test_pictures_and_checks_are_the_reports(folder: Path) -> None:
    text = render_card(folder)
    rows = re.findall(r"^\| !\[source\]\((.*?)\) \| !\[merged\]\((.*?)\) \| (.*) \|$", text, re.M)
    settings = "6 steps, guidance 1.75, image guidance 1, 640 px, seed 3"
    assert [row[2] for row in rows] == [f"make it {index}: {settings}" for index in range(6)]
    assert all((folder / name).is_file() for row in rows for name in row[:2])
    assert "**Passed**: 2 checks passed (`report.json`" in text
    assert "| not black | 0.5 to 1 | at least 0.05 | passed |" in text
    assert "- no CLIP model" in text
    (folder / "images" / "00-3-merged.png").unlink()
    assert "images/00-3" not in render_card(folder)


def test_the_timesteps_of_an_edit_are_said(folder: Path) -> None:
    path = folder / "report.json"
    report = json.loads(path.read_text())
    report["edits"][0]["settings"]["timesteps"] = [999, 299]
    path.write_text(json.dumps(report))
    assert "make it 0: 6 steps at 999 299, guidance 1.75" in render_card(folder)
    report["edits"][0]["settings"]["timesteps"] = [999, "soon"]
    path.write_text(json.dumps(report))
    with pytest.raises(CheckpointError, match="timesteps is not a list of whole numbers"):
        render_card(folder)


def test_a_failed_report_says_so(folder: Path) -> None:
    def fail(report: dict[str, Any]) -> None:
        report["passed"] = False
        report["checks"][0] |= {"passed": False, "value": float("nan")}

    change(folder, "report.json", fail)
    text = render_card(folder)
    assert "**Failed**: 1 of 2 checks" in text
    assert "| not black | not finite | at least 0.05 | 1 of 2 failed |" in text
    (folder / "report.json").unlink()
    assert "Not verified by an edit" in render_card(folder)


def test_a_report_with_warnings_says_so(folder: Path) -> None:
    def warn(report: dict[str, Any]) -> None:
        report["verdict"] = "2 of 3 checks passed, with a warning: pictures look like noise"
        report["not_judged"] = "Not judged: whether the edits are what was asked for."
        report["warnings"] = ["noise_left is 0.9 and must be at most 0.5 <b>"]
        noise = {"name": "noise_left", "value": 0.9, "limit": 0.5, "rule": "at most"}
        report["checks"].append({**noise, "passed": False, "severity": "warned"})

    change(folder, "report.json", warn)
    text = render_card(folder)
    said = "2 of 3 checks passed, with a warning: pictures look like noise"
    assert f"**Warning**: {said} (`report.json`, `report.html`)." in text
    assert "Not judged: whether the edits are what was asked for.\n" in text
    assert "- Warning: noise&#95;left is" in text
    assert "<b>" not in text
    assert "| noise left | 0.9 | at most 0.5 | 1 of 1 warned |" in text
    assert "**Passed**" not in text


@pytest.mark.parametrize("evil", ["<img src=x>", "see https://evil.example", "a\n# b", "[a](b)"])
def test_a_verdict_that_somebody_wrote_is_no_markup(folder: Path, evil: str) -> None:
    change(folder, "report.json", lambda report: report.update(verdict=evil, not_judged=evil))
    text = render_card(folder)
    assert evil not in text
    assert "\n# b" not in text


def test_notes_of_a_licence_stand_beside_their_parents(folder: Path) -> None:
    licence = CardLicence("openrail++", notes=("org/few-step: no commercial use", "pass it on"))
    text = render_card(folder, licence=licence)
    assert (
        f"| distilled&#91;0&#93; | [org/few-step](https://huggingface.co/org/few-step) "
        f"| `{COMMIT}` | no commercial use |"
    ) in text
    assert text.endswith("- pass it on\n")
    assert ModelCard(text).data.to_dict()["license"] == "openrail++"


def test_texts_of_the_records_stay_texts(folder: Path) -> None:
    clean = render_card(folder)

    def taint_recipe(recipe: dict[str, Any]) -> None:
        # YAML itself refuses lone surrogates.
        text = NASTY.replace("\ud800", "")
        recipe["name"] = recipe["method"] = recipe["out_dtype"] = text
        recipe["channel_rule"] = recipe["guidance_embedding"] = recipe["compute_dtype"] = text
        recipe["scheduler"]["class_name"] = text
        recipe |= {"block_weights": {text: 1}, "exclude": [text], "components": [text]}
        recipe["params"] = {text: 1}

    def taint_manifest(manifest: dict[str, Any]) -> None:
        inputs = manifest["inputs"]
        inputs["target"] = {"name": NASTY}
        inputs[NASTY] = inputs.pop("distilled[1]")
        manifest["files"][f"{NASTY}.safetensors"] = {"size": 1, "sha256": NASTY}
        manifest["tool"]["version"] = manifest["recipe_digest"] = NASTY
        manifest["counts"][NASTY] = 1

    def taint_report(report: dict[str, Any]) -> None:
        report["summary"] = {}
        report["notes"] = [NASTY]
        for edit in report["edits"]:
            edit["instruction"] = NASTY
        report["edits"][0]["files"] += [f"images/{NASTY}.png", "../../secret.png"]
        for check in report["checks"]:
            check |= {"name": NASTY, "rule": NASTY}

    change(folder, LOCK_NAME, taint_recipe)
    change(folder, MANIFEST_NAME, taint_manifest)
    change(folder, "report.json", taint_report)
    licence = CardLicence(NASTY, NASTY, "javascript:alert(1)", (NASTY,))
    text = render_card(folder, licence=licence)
    text.encode()
    data = ModelCard(text).data.to_dict()
    assert set(data) == set(ModelCard(clean).data.to_dict()) | {
        "license",
        "license_name",
        "license_link",
    }
    body = text.split("\n---\n", 1)[1]
    # The recipe stands in a block of code that only its own fence closes.
    fence = re.search(r"^(`{3,})yaml\n.*?^\1$", body, re.M | re.S)
    assert fence is not None
    assert len(fence[1]) == 4
    body = body.replace(fence[0], "")
    assert set(re.findall(r"<[^>]*>?", body)) == {
        CARD_MARKER,
        "<code>",
        "</code>",
        "<details>",
        "</details>",
        "<summary>",
        "</summary>",
    }
    assert "\u202e" not in body
    for word in ("javascript:", "](https://evil", "www.evil", "# title", "license: mit"):
        assert word not in body
    headings = [line for line in body.splitlines() if line.startswith("#")]
    assert headings[1:] == [line for line in clean.splitlines() if line.startswith("## ")]
    tables = [line for line in body.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in tables} <= {3, 4, 5}
    for code in blocks(body):
        compile(code, "card", "exec")


def test_names_that_are_no_files_make_no_lines(exported: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(exported, folder)
    (folder / "carded.safetensors").unlink()
    assert "from_single_file" not in render_card(folder)


@pytest.mark.parametrize("name", [MANIFEST_NAME, LOCK_NAME])
def test_a_folder_without_records_has_no_card(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(SourceNotFoundError, match=f"has no {re.escape(name)}"):
        render_card(folder)


def put(*keys: str, value: Any) -> Callable[[Any], object]:
    """Return a change that sets a value deep inside a record."""

    def edit(tree: Any) -> None:
        for key in keys[:-1]:
            tree = tree[key]
        tree[keys[-1]] = value

    return edit


@pytest.mark.parametrize(
    ("name", "edit"),
    [
        (MANIFEST_NAME, put("architecture", value="flux")),
        (MANIFEST_NAME, put("architecture", value=3)),
        (MANIFEST_NAME, put("inputs", value=[])),
        (MANIFEST_NAME, put("inputs", "target", value={})),
        (MANIFEST_NAME, put("inputs", "target", "repo", value="a](b)/c")),
        (MANIFEST_NAME, put("inputs", "target", "commit", value="main")),
        (MANIFEST_NAME, put("counts", "delta", value=True)),
        (MANIFEST_NAME, put("tool", value=None)),
        (MANIFEST_NAME, put("files", "x.safetensors", value={"size": 10**400, "sha256": ""})),
        (LOCK_NAME, put("weight", value=float("nan"))),
        (LOCK_NAME, put("weight", value="1")),
        (LOCK_NAME, put("params", value={"density": [1]})),
        (LOCK_NAME, put("params", value={"density": "x"})),
        (LOCK_NAME, put("verify", "steps", value="__import__('os')")),
        (LOCK_NAME, put("verify", "guidance_scale", value=float("inf"))),
        (LOCK_NAME, put("models", "distilled", value=[1])),
        (LOCK_NAME, put("exclude", value=[1])),
        ("report.json", put("passed", value="yes")),
        ("report.json", put("edits", value={})),
        ("report.json", put("checks", value=[{}])),
        ("report.json", put("summary", value={"recipe_digest": "e" * 64})),
    ],
)
def test_broken_records_are_refused(folder: Path, name: str, edit: Callable[[Any], object]) -> None:
    change(folder, name, edit)
    with pytest.raises(CheckpointError, match=re.escape(name)):
        render_card(folder)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"passed": ' + "[" * 100_000])
def test_a_report_that_is_none_is_refused(folder: Path, text: str) -> None:
    (folder / "report.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"report\.json"):
        render_card(folder)


@pytest.mark.parametrize("repo_id", ["", "name", "a/b/c", 'a/b"', "a/b\n", "-a/b"])
def test_what_is_no_hub_id_is_refused(folder: Path, repo_id: str) -> None:
    with pytest.raises(ValueError, match="no Hub id"):
        render_card(folder, repo_id=repo_id)
