"""Publishing: what is refused, what is uploaded, and what the Hub can do to it."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from PIL import Image, PngImagePlugin
from safetensors.torch import load_file, save_file

from merge import load_recipe, run_recipe
from merge.card.render import CARD_MARKER
from merge.errors import CheckpointError, PublishError
from merge.json_files import json_bytes
from merge.publication.parents import decide
from merge.publication.prepare import prepare
from merge.records.provenance import build_provenance
from tests.hub import Fault, HubServer
from tests.mini import contents
from tests.run.test_run import write_tiny_recipe

TOKEN = "hf_" + "Canary" * 5 + "9012"
OTHER_TOKEN = "hf_" + "Leaked" * 6
UNET = "unet/diffusion_pytorch_model.safetensors"
LICENSE = "creativeml-openrail-m"
NO_WAIT = "import time; time.sleep = lambda s: None; from merge.cli.main import main; main()"


@pytest.fixture(scope="module")
def original(tiny_sd15: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export in both layouts that was verified."""
    folder = tmp_path_factory.mktemp("export")
    recipe = write_tiny_recipe(folder, tiny_sd15, output={"single_file": True})
    return run_recipe(load_recipe(recipe), folder / "out", device="cpu").folder


@pytest.fixture
def export(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "export"))


def write_records(folder: Path, **changes: Any) -> None:
    """Bring manifest and provenance in line with the files, as a careful forger would."""
    path = folder / "merge_manifest.json"
    manifest = json.loads(path.read_text()) | changes
    for name, record in manifest["files"].items():
        if (folder / name).is_file():
            data = (folder / name).read_bytes()
            record.update(size=len(data), sha256=hashlib.sha256(data).hexdigest())
    path.write_bytes(json_bytes(manifest))
    lock = (folder / "recipe.lock.yaml").read_bytes()
    (folder / "provenance.intoto.json").write_bytes(build_provenance(path.read_bytes(), lock))


def change_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    tree = json.loads(path.read_text())
    change(tree)
    path.write_text(json.dumps(tree))


# What is refused -------------------------------------------------------------------------------


def without(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).unlink()


def flip(name: str) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        data = bytearray((folder / name).read_bytes())
        data[-1] ^= 1
        (folder / name).write_bytes(data)

    return change


def report(**changes: Any) -> Callable[[Path], object]:
    return lambda folder: change_json(folder / "report.json", lambda tree: tree.update(changes))


def escape(folder: Path) -> None:
    tree = json.loads((folder / "merge_manifest.json").read_text())
    tree["files"]["../x"] = {"size": 1, "sha256": "0" * 64}
    (folder / "merge_manifest.json").write_text(json.dumps(tree))


def link_out(folder: Path) -> None:
    (folder / "images" / "passwords.png").symlink_to("/etc/passwd")


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "no manifest": (without("merge_manifest.json"), "has no merge_manifest.json"),
    "no lock": (without("recipe.lock.yaml"), "has no recipe.lock.yaml"),
    "not verified": (without("report.json"), "is not verified: it has no report.json"),
    "failed": (report(passed=False), "failed its verification"),
    "passed is a word": (report(passed="yes"), "failed its verification"),
    "another's report": (report(summary={"recipe_digest": "f" * 64}), "report of another merge"),
    "a report that is no JSON": (
        lambda folder: (folder / "report.json").write_text("{"),
        "report.json cannot be read",
    ),
    "weights": (flip(UNET), f"changed after it was made.*{UNET} has SHA-256"),
    "lock": (flip("recipe.lock.yaml"), "changed after it was made.*recipe.lock.yaml has SHA-256"),
    "a config": (flip("vae/config.json"), "changed after it was made.*vae/config.json"),
    "a missing file": (without("tokenizer/vocab.json"), "tokenizer/vocab.json is missing"),
    "a name outside": (escape, "names a file outside of the folder: '../x'"),
    "a link out": (link_out, "images/passwords.png is a link that leads out"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_must_not_be_published_is_refused(export: Path, case: str) -> None:
    change, message = REFUSED[case]
    change(export)
    with pytest.raises(PublishError, match=message) as caught:
        prepare(export, "me/fast", license=LICENSE)
    assert caught.value.exit_code == 10
    assert caught.value.hint


@pytest.mark.parametrize("repo_id", ["fast", "../x/y", "me/", "me/fast/x", "https://hf.co/me/x"])
def test_a_repo_id_is_an_owner_and_a_name(export: Path, repo_id: str) -> None:
    with pytest.raises(PublishError, match="is no Hub id"):
        prepare(export, repo_id, license=LICENSE)


def test_a_folder_without_a_single_file_has_none_to_publish(export: Path) -> None:
    (export / "tiny.safetensors").unlink()
    tree = json.loads((export / "merge_manifest.json").read_text())
    files = {name: record for name, record in tree["files"].items() if name != "tiny.safetensors"}
    write_records(export, files=files)
    with pytest.raises(PublishError, match="has no single file"):
        prepare(export, "me/fast", license=LICENSE, only="single-file")


def test_a_download_in_the_hubs_cache_is_no_link_out(original: Path, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / ("a" * 40)
    blobs.mkdir()
    for path in original.rglob("*"):
        if path.is_file():
            name = path.relative_to(original)
            blob = blobs / hashlib.sha256(str(name).encode()).hexdigest()
            shutil.copy(path, blob)
            (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
            (snapshot / name).symlink_to(os.path.relpath(blob, (snapshot / name).parent))
    prepare(snapshot, "me/fast", license=LICENSE)


# Licences --------------------------------------------------------------------------------------


def parents(*repos: str) -> dict[str, Any]:
    return {"inputs": {str(i): {"repo": r, "commit": "a" * 40} for i, r in enumerate(repos)}}


IP2P = "timbrooks/instruct-pix2pix"
LCM = "latent-consistency/lcm-lora-sdv1-5"


def test_the_licence_is_the_most_restrictive_of_the_parents() -> None:
    assert decide(parents(IP2P, LCM), None).licence.id == "creativeml-openrail-m"
    turbo = decide(parents("diffusers/sdxl-instructpix2pix-768", "stabilityai/sdxl-turbo"), None)
    assert (turbo.licence.id, turbo.licence.name) == ("other", "sai-nc-community")
    assert any("commercial" in note for note in turbo.notes)


def test_a_parent_without_derivatives_blocks_whatever_is_stated() -> None:
    for stated in (None, "cc-by-nc-nd-4.0"):
        with pytest.raises(PublishError, match="jasperai/flash-sdxl allows no derivatives"):
            decide(parents(IP2P, "jasperai/flash-sdxl"), stated)


def test_a_stated_licence_may_not_allow_more_than_the_parents(export: Path) -> None:
    with pytest.raises(PublishError, match="--license mit allows more than creativeml-openrail-m"):
        decide(parents(IP2P, LCM), "mit")
    assert decide(parents(IP2P, LCM), "cc-by-nc-4.0").licence.id == "cc-by-nc-4.0"


def test_unknown_parents_need_a_stated_licence(export: Path) -> None:
    with pytest.raises(PublishError, match="the licence of base, distilled, target is not known"):
        prepare(export, "me/fast")
    with pytest.raises(PublishError, match="--license: 'My Licence' is no licence id"):
        prepare(export, "me/fast", license="My Licence")
    notes = prepare(export, "me/fast", license="mit").notes
    assert not any("not known" in note for note in notes)


# Secrets ---------------------------------------------------------------------------------------


def add_text(name: str, text: str) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        path = folder / name
        path.write_text(path.read_text() + f"\n<!-- {text} -->\n")

    return change


def add_value(name: str, text: str) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        change_json(folder / name, lambda tree: tree.update(_name_or_path=text))
        write_records(folder)

    return change


def add_metadata(folder: Path) -> None:
    save_file(load_file(folder / UNET), folder / UNET, {"format": "pt", "by": OTHER_TOKEN})
    write_records(folder)


def add_png_text(folder: Path) -> None:
    path = next((folder / "images").glob("*-merged.png"))
    text = PngImagePlugin.PngInfo()
    text.add_text("parameters", f"token {OTHER_TOKEN}")
    with Image.open(path) as image:
        image.save(path, pnginfo=text)


def add_exif(folder: Path) -> None:
    path = next((folder / "images").glob("*-source.png"))
    with Image.open(path) as image:
        exif = image.getexif()
        exif[0x010E] = "/home/anna/pictures/cat.png"
        image.save(path, exif=exif)


LEAKS: dict[str, tuple[Callable[[Path], object], str]] = {
    "run.json": (add_value("run.json", OTHER_TOKEN), r"run\.json, line \d+: Hugging Face token"),
    "report.json": (
        lambda folder: change_json(
            folder / "report.json", lambda tree: tree.update(x="/home/anna/x")
        ),
        r"report\.json, line \d+: home folder",
    ),
    "report.html": (add_text("report.html", OTHER_TOKEN), r"report\.html, line \d+: Hugging"),
    "own card": (
        lambda folder: (folder / "README.md").write_text(f"# Mine\n\n{OTHER_TOKEN}\n"),
        r"README\.md, line \d+: Hugging Face token",
    ),
    "a config": (
        add_value("unet/config.json", "/home/anna/models/ip2p"),
        r"unet/config\.json, line \d+: home folder",
    ),
    "metadata": (add_metadata, rf"{UNET}, metadata by: Hugging Face token"),
    "PNG text": (add_png_text, r"images/.*-merged\.png, text of the picture: Hugging Face token"),
    "EXIF": (add_exif, r"images/.*-source\.png, text of the picture: home folder"),
}


@pytest.mark.parametrize("case", LEAKS)
def test_a_secret_is_found_and_its_file_named(export: Path, case: str) -> None:
    change, message = LEAKS[case]
    change(export)
    with pytest.raises(PublishError, match=message) as caught:
        prepare(export, "me/fast", license=LICENSE)
    assert OTHER_TOKEN not in str(caught.value)
    assert "anna" not in str(caught.value)


def test_the_token_that_is_in_use_is_found_in_any_shape(
    export: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "an odd one")
    add_text("report.html", "this is an odd one")(export)
    with pytest.raises(PublishError, match=r"report\.html, line \d+: access token"):
        prepare(export, "me/fast", license=LICENSE)


# What is uploaded ------------------------------------------------------------------------------


def test_all_is_uploaded_unless_one_layout_is_asked_for(export: Path) -> None:
    (export / "notes.txt").write_text("mine")
    everything = prepare(export, "me/fast", license=LICENSE)
    manifest = json.loads((export / "merge_manifest.json").read_text())
    records = {"README.md", "merge_manifest.json", "provenance.intoto.json", "run.json"}
    records |= {"report.json", "report.html"}
    images = {f"images/{path.name}" for path in (export / "images").iterdir()}
    assert everything.sizes.keys() == {*manifest["files"], *records, *images}
    assert any("notes.txt" in note for note in everything.notes)
    for name, size in everything.sizes.items():
        assert name == "README.md" or size == (export / name).stat().st_size
    folder = prepare(export, "me/fast", license=LICENSE, only="folder")
    assert everything.sizes.keys() - folder.sizes.keys() == {"tiny.safetensors"}
    assert "from_single_file" not in folder.card
    single = prepare(export, "me/fast", license=LICENSE, only="single-file")
    weights = {name for name in single.sizes if name.endswith(".safetensors")}
    assert weights == {"tiny.safetensors"}
    assert "model_index.json" in single.sizes
    assert "from_pretrained" not in single.card
    assert "from_single_file" in single.card


def test_our_card_is_rendered_for_the_repository(export: Path) -> None:
    card = ModelCard(prepare(export, "me/fast", license="openrail++").card)
    assert CARD_MARKER in card.content
    assert '"me/fast"' in card.content
    assert card.data.license == "openrail++"
    assert card.data.library_name == "diffusers"


def test_a_card_of_ones_own_keeps_its_text(export: Path) -> None:
    text = "---\nlicense: cc-by-nc-4.0\ntags: [mine]\n---\n# My model\n\nIt is good.\n"
    (export / "README.md").write_text(text)
    card = ModelCard(prepare(export, "me/fast").card)
    assert card.text.strip() == "# My model\n\nIt is good."
    assert card.data.license == "cc-by-nc-4.0"
    assert card.data.tags == ["mine"]
    assert card.data.pipeline_tag == "image-to-image"
    (export / "README.md").write_text("# No front matter\n")
    bare = ModelCard(prepare(export, "me/fast", license="mit").card)
    assert (bare.text.strip(), bare.data.license) == ("# No front matter", "mit")


def command(
    *words: object, env: dict[str, str] | None = None, token: str = TOKEN
) -> subprocess.CompletedProcess[str]:
    child = subprocess.run(
        [sys.executable, "-c", NO_WAIT, "publish", *map(str, words)],
        capture_output=True,
        text=True,
        env={**(os.environ if env is None else env), "HF_TOKEN": token},
        timeout=120,
    )
    assert TOKEN not in child.stdout + child.stderr
    assert "Traceback" not in child.stderr
    return child


def test_a_dry_run_lists_every_file_and_the_card_and_writes_nothing(export: Path) -> None:
    before = contents(export, but=())
    offline = {**os.environ, "HF_HUB_OFFLINE": "1"}
    words = (export, "--repo-id", "me/fast", "--license", LICENSE)
    child = command(*words, "--dry-run", env=offline)
    assert child.returncode == 0, child.stderr
    lines = child.stdout.splitlines()
    blank = lines.index("")
    listed = {line.split("  ")[-1]: line.split("  ")[-2] for line in lines[: blank - 1]}
    prepared = prepare(export, "me/fast", license=LICENSE)
    sizes = {name: int(size.replace(",", "")) for name, size in listed.items()}
    assert sizes == prepared.sizes
    assert f"{prepared.size_bytes:,}  in all" in lines[blank - 1]
    assert child.stdout.endswith(prepared.card)
    tree = json.loads(command(*words, "--dry-run", "--json", env=offline).stdout)
    assert (tree["files"], tree["card"]) == (prepared.sizes, prepared.card)
    refused = command(*words, env=offline)
    assert (refused.returncode, "HF_HUB_OFFLINE forbids" in refused.stderr) == (10, True)
    assert contents(export, but=()) == before


# The upload ------------------------------------------------------------------------------------


def test_warnings_of_the_verification_are_told(
    export: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # Of random weights, as every model here.
    with caplog.at_level("WARNING", logger="merge"):
        prepared = prepare(export, "org/x", license=LICENSE)
    told = [line for line in caplog.messages if "the verification of" in line]
    assert len(told) == 2
    assert told[0].startswith(f"the verification of {export} warns: noise_left is ")
    assert "**Warning**: " in prepared.card
    report = json.loads((export / "report.json").read_text())
    caplog.clear()
    (export / "report.json").write_text(json.dumps({**report, "warnings": "x"}))
    with pytest.raises(CheckpointError, match="warnings is not a list"):
        prepare(export, "org/x", license=LICENSE)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[HubServer]:
    (tmp_path / "hub").mkdir()
    with HubServer(tmp_path / "hub") as server:
        server.tokens = {TOKEN: "write", OTHER_TOKEN: "read"}
        yield server


def publish(
    hub: HubServer, export: Path, repo_id: str, *words: str, xet: bool = False, token: str = TOKEN
) -> subprocess.CompletedProcess[str]:
    env = hub.environment(export.parent / "home", xet=xet)
    return command(export, "--repo-id", repo_id, "--license", LICENSE, *words, env=env, token=token)


def writes(hub: HubServer) -> list[str]:
    return [path for method, path in hub.requests if method in ("POST", "PUT")]


@pytest.mark.parametrize("xet", [False, True], ids=["lfs", "xet"])
def test_an_upload_arrives_whole_and_private(hub: HubServer, export: Path, xet: bool) -> None:
    child = publish(hub, export, "me/fast", xet=xet)
    assert child.returncode == 0, child.stderr
    commit = hub.commit("me/fast")
    assert child.stdout == f"{hub.url}/me/fast/commit/{commit}\n"
    assert hub.read("me/fast") == contents(export, but=()) | {
        name: data for name, data in hub.read("me/fast").items() if name == ".gitattributes"
    }
    repository = hub.repositories.get("me/fast")
    assert repository is not None
    assert repository.private
    # Nobody else sees it.
    stranger = publish(hub, export, "me/fast", token=OTHER_TOKEN, xet=xet)
    assert stranger.returncode == 10
    # Once more: nothing changed, so there is no second commit.
    again = publish(hub, export, "me/fast", xet=xet)
    assert (again.returncode, hub.commit("me/fast")) == (0, commit)


def test_visibility_is_never_changed_by_accident(hub: HubServer, export: Path) -> None:
    assert publish(hub, export, "me/open", "--public").returncode == 0
    count = len(writes(hub))
    refused = publish(hub, export, "me/open")
    assert refused.returncode == 10
    assert "me/open is public already, and --public is not given" in refused.stderr
    assert publish(hub, export, "me/closed").returncode == 0
    private = publish(hub, export, "me/closed", "--public")
    assert private.returncode == 10
    assert "me/closed is private already" in private.stderr
    assert all(
        "me/closed" in path or "/create" in path or "validate" in path
        for path in writes(hub)[count:]
    )


def test_a_pull_request_leaves_the_branch_alone(hub: HubServer, export: Path) -> None:
    assert publish(hub, export, "me/fast").returncode == 0
    commit = hub.commit("me/fast")
    (export / "README.md").write_text("# My own words\n")
    child = publish(hub, export, "me/fast", "--create-pr")
    assert child.returncode == 0, child.stderr
    assert re.fullmatch(rf"{hub.url}/me/fast/discussions/\d+\n", child.stdout)
    assert hub.commit("me/fast") == commit


def test_a_branch_that_moved_is_left_as_it_is(hub: HubServer, export: Path, tmp_path: Path) -> None:
    assert publish(hub, export, "me/fast").returncode == 0
    other = tmp_path / "other"
    other.mkdir()
    (other / "a.txt").write_text("somebody else's")
    (export / "README.md").write_text("# My own words\n")
    hub.faults.append(Fault("POST", "/preupload/", then=lambda: hub.move("me/fast", other)))
    child = publish(hub, export, "me/fast")
    assert child.returncode == 10
    assert "me/fast changed while it was published" in child.stderr
    assert hub.read("me/fast") == {"a.txt": b"somebody else's"}


def test_an_answer_that_is_lost_is_no_failure(hub: HubServer, export: Path) -> None:
    hub.faults.append(Fault("POST", "/commit/main", lost=True))
    child = publish(hub, export, "me/fast", xet=True)
    assert child.returncode == 0, child.stderr
    assert child.stdout == f"{hub.url}/me/fast/commit/{hub.commit('me/fast')}\n"


def test_a_hub_that_is_busy_is_asked_again(hub: HubServer, export: Path) -> None:
    faults = [
        Fault("POST", "/preupload/", times=2, status=500),
        Fault("POST", "/objects/batch", status=429, headers={"Retry-After": "1"}),
        Fault("PUT", "", cut=0.5),
    ]
    hub.faults += faults
    child = publish(hub, export, "me/fast")
    assert child.returncode == 0, child.stderr
    assert [fault.left for fault in faults] == [0, 0, 0]
    assert hub.read("me/fast")[UNET] == (export / UNET).read_bytes()


@pytest.mark.parametrize(
    ("path", "status", "message"),
    [
        ("/repos/create", 401, "this account may not write to me/fast"),
        ("/repos/create", 403, "this account may not write to me/fast"),
        ("/commit/main", 403, "this account may not write to me/fast"),
        ("/commit/main", 409, "me/fast is being changed by somebody else"),
        ("/commit/main", 412, "me/fast changed while it was published"),
        ("/commit/main", 500, "the Hub refused me/fast (500)"),
    ],
)
def test_a_hub_that_refuses_is_understood(
    hub: HubServer, export: Path, path: str, status: int, message: str
) -> None:
    hub.faults.append(Fault("POST", path, times=99, status=status))
    child = publish(hub, export, "me/fast")
    assert child.returncode == 10
    assert message in child.stderr
    assert child.stderr.splitlines()[-1].startswith("hint: ")
    assert child.stdout == ""


def test_what_arrived_otherwise_is_told(hub: HubServer, export: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(export, other)
    (other / "vae" / "config.json").write_text("{}")
    # A Hub that stores something else, as far as anybody can see.
    hub.faults.append(Fault("GET", "/tree/", status=200, body=json.dumps([]).encode()))
    child = publish(hub, export, "me/fast")
    assert child.returncode == 10
    assert "what arrived at me/fast is not what was sent" in child.stderr
