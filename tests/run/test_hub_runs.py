"""From a public recipe to a published checkpoint that somebody else rebuilds, and all that fails.

The real command line and the real clients of the Hub and of diffusers, in processes of their own,
against a Hub on loopback.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from tests.hub import Fault, HubServer

TOKEN = "hf_" + "Canary" * 5 + "5678"
UNET = "unet/diffusion_pytorch_model.safetensors"
BESIDE = ("README.md", "run.json", "report.json", "report.html")
# The client waits some seconds before it asks again; a test has no reason to.
NO_WAIT = "import sys, time; time.sleep = lambda s: None; from merge.cli.main import main; main()"


@pytest.fixture
def hub(tiny_sd15: Path, tmp_path: Path) -> Iterator[HubServer]:
    root = tmp_path / "hub"
    for role in ("target", "base", "distilled"):
        shutil.copytree(tiny_sd15 / role, root / "tiny" / role)
    lora = root / "tiny" / "lora"
    lora.mkdir()
    name = "pytorch_lora_weights.safetensors"
    shutil.copy(tiny_sd15 / "lora_kohya.safetensors", lora / name)
    with HubServer(root) as server:
        yield server


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    models = {role: f"tiny/{role}" for role in ("base", "distilled", "target")}
    tree = {"name": "fast", "models": models, "verify": {"resolution": 64}}
    path = tmp_path / "fast.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def command(
    hub: HubServer, home: Path, *words: object, xet: bool = False, **variables: str
) -> subprocess.CompletedProcess[str]:
    child = subprocess.run(
        [sys.executable, "-c", NO_WAIT, *map(str, words)],
        capture_output=True,
        text=True,
        env={**hub.environment(home, xet=xet), "HF_TOKEN": TOKEN, **variables},
        cwd=home.parent,
        timeout=240,
    )
    assert TOKEN not in child.stdout + child.stderr
    assert "Traceback" not in child.stderr
    return child


def together(
    hub: HubServer, home: Path, lines: list[list[object]], prelude: str = ""
) -> list[tuple[int, str]]:
    """Start commands at once; return their exit codes and messages."""
    children = [
        subprocess.Popen(
            [sys.executable, "-c", prelude + NO_WAIT, *map(str, words)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**hub.environment(home), "HF_TOKEN": TOKEN},
            cwd=home.parent,
        )
        for words in lines
    ]
    said = [child.communicate(timeout=240)[1] for child in children]
    return [(child.returncode, text) for child, text in zip(children, said, strict=True)]


def reproducible(folder: Path) -> dict[str, str]:
    """Return the digest of every file but those that say how a run went."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and path.relative_to(folder).parts[0] not in ("images", ".cache", *BESIDE)
        and path.name != ".gitattributes"
    }


def files_with(text: bytes, *folders: Path) -> list[Path]:
    paths = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    return [path for path in paths if text in path.read_bytes()]


# The whole way -----------------------------------------------------------------------------------

LOAD = """
import sys, torch
from diffusers import DiffusionPipeline
from huggingface_hub import snapshot_download
from PIL import Image

pipeline = DiffusionPipeline.from_pretrained(sys.argv[1], torch_dtype=torch.float32)
assert type(pipeline).__name__ == "StableDiffusionInstructPix2PixPipeline"
assert type(pipeline.scheduler).__name__ == "LCMScheduler"
image = pipeline(
    "make it winter", image=Image.new("RGB", (64, 64), "green"), num_inference_steps=4,
    guidance_scale=2, image_guidance_scale=1, generator=torch.Generator().manual_seed(0),
).images[0]
assert image.size == (64, 64)
print(snapshot_download(sys.argv[1], local_dir=sys.argv[2]))
"""


# What an upload by Xet does differently, the tests of publication try by default.
@pytest.mark.parametrize("mode", ["lfs", pytest.param("xet", marks=pytest.mark.slow)])
def test_a_recipe_becomes_a_published_model_that_others_rebuild(
    hub: HubServer, recipe: Path, tmp_path: Path, mode: str
) -> None:
    hub.tokens = {TOKEN: "write"}
    home, out, xet = tmp_path / "home", tmp_path / "out", mode == "xet"
    run = command(hub, home, "run", recipe, "--out", out)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-1] == str(out)
    assert json.loads((out / "report.json").read_text())["passed"] is True
    words = ("publish", out, "--repo-id", "me/fast", "--license", "creativeml-openrail-m")
    published = command(hub, home, *words, "--public", xet=xet)
    assert published.returncode == 0, published.stderr
    commit = hub.commit("me/fast")
    assert published.stdout.splitlines()[-1] == f"{hub.url}/me/fast/commit/{commit}"
    # Somebody else, with nothing but the name of the published model.
    other = tmp_path / "elsewhere" / "home"
    other.parent.mkdir()
    copy = tmp_path / "elsewhere" / "copy"
    loaded = subprocess.run(
        [sys.executable, "-c", LOAD, "me/fast", str(copy)],
        capture_output=True,
        text=True,
        env=hub.environment(other),
        cwd=other.parent,
        timeout=240,
    )
    assert loaded.returncode == 0, loaded.stderr
    assert reproducible(copy) == reproducible(out)
    front = (copy / "README.md").read_text()
    assert "base_model:\n- tiny/target\n- tiny/base\n- tiny/distilled\n" in front
    assert "license: creativeml-openrail-m\n" in front
    again = command(hub, other, "reproduce", copy, "--out", other.parent / "again")
    assert again.returncode == 0, again.stderr
    assert reproducible(other.parent / "again") == reproducible(out)
    checked = command(hub, other, "verify", copy, "--files")
    assert checked.returncode == 0, checked.stderr
    # The token was there to be leaked: the client sent it.
    assert f"Bearer {TOKEN}" in hub.authorizations
    assert files_with(TOKEN.encode(), out, copy, home, other) == []
    assert all(TOKEN.encode() not in data for data in hub.read("me/fast").values())


def test_a_lock_runs_the_commit_that_a_branch_was_at(
    hub: HubServer, recipe: Path, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    words = ("run", recipe, "--no-verify", "-q", "--out")
    assert command(hub, home, *words, tmp_path / "a", "--write-lock").returncode == 0
    commit = hub.commit("tiny/distilled")
    hub.move("tiny/distilled", changed(hub.root / "tiny" / "distilled", tmp_path / "new"))
    clean = tmp_path / "clean"
    locked = command(hub, clean, *words, tmp_path / "b", "--locked")
    assert locked.returncode == 0, locked.stderr
    assert reproducible(tmp_path / "b") == reproducible(tmp_path / "a")
    assert {d.revision for d in hub.downloads if d.repo == "tiny/distilled"} == {commit}
    free = command(hub, clean, *words, tmp_path / "c")
    assert free.returncode == 0, free.stderr
    assert reproducible(tmp_path / "c") != reproducible(tmp_path / "a")
    # A branch and its commit give the same bytes; only another commit does not.
    word = f"models.distilled.revision={commit}"
    pinned = command(hub, clean, *words, tmp_path / "d", word)
    assert pinned.returncode == 0, pinned.stderr
    assert reproducible(tmp_path / "d") == reproducible(tmp_path / "a")
    moved = command(hub, clean, *words, tmp_path / "e", "models.distilled.revision=v1", "--locked")
    assert moved.returncode == 3
    assert "models.distilled.revision is v1, and main in the lock" in moved.stderr
    assert command(hub, clean, *words, tmp_path / "f", HF_HUB_OFFLINE="1").returncode == 0


def changed(folder: Path, to: Path) -> Path:
    """Copy a UNet folder with other weights of the same size."""
    shutil.copytree(folder, to)
    for path in to.rglob("*.safetensors"):
        tensors = {key: value + torch.ones_like(value) for key, value in load_file(path).items()}
        save_file(tensors, path, {"format": "pt"})
    return to


# Plans -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("distilled", ["tiny/distilled", "tiny/lora"])
def test_a_plan_reads_headers_and_downloads_no_weights(
    hub: HubServer, recipe: Path, tmp_path: Path, distilled: str
) -> None:
    words = [f"models.distilled={distilled}"]
    if distilled == "tiny/lora":
        words.append("models.base=null")
    plan = command(hub, tmp_path / "home", "plan", recipe, *words, "--json")
    assert plan.returncode == 0, plan.stderr
    weights = [sent for sent in hub.transfers if sent.name.endswith(".safetensors")]
    assert weights
    for repo, name in {(sent.repo, sent.name) for sent in weights}:
        read = sum(sent.length for sent in weights if (sent.repo, sent.name) == (repo, name))
        header = 8 + int.from_bytes((hub.root / repo / name).read_bytes()[:8], "little")
        # The header, its first bytes twice, and the few of each alpha.
        assert header <= read <= header + 4096, (repo, name)
    assert not list((tmp_path / "home").rglob("*.safetensors"))
    assert "a run downloads" in plan.stderr
    # The same plan as of files on this disk.
    run = command(hub, tmp_path / "home", "run", recipe, *words, "--no-verify", "-q")
    assert run.returncode == 0, run.stderr
    count = len(hub.transfers)
    later = command(hub, tmp_path / "home", "plan", recipe, *words, "--json")
    assert later.stdout == plan.stdout
    assert len(hub.transfers) == count


def test_models_that_do_not_fit_are_told_before_anything_is_downloaded(
    hub: HubServer, recipe: Path, tmp_path: Path
) -> None:
    run = command(hub, tmp_path / "home", "run", recipe, "exclude=[nothing.*]", "--no-verify")
    assert run.returncode == 6
    assert not list((tmp_path / "home").rglob("*.safetensors"))


def test_a_hub_that_sends_only_whole_files_is_told(
    hub: HubServer, recipe: Path, tmp_path: Path
) -> None:
    # As a proxy does that drops the header.
    hub.faults.append(Fault("GET", r"safetensors", times=9, status=200, body=b"x" * 100))
    plan = command(hub, tmp_path / "home", "plan", recipe)
    assert plan.returncode == 4
    assert "only as a whole" in plan.stderr
    # A run does without.
    words = ("run", recipe, "--no-verify", "-q", "--out", tmp_path / "out")
    hub.faults[:] = [Fault("GET", r"safetensors", status=200, body=b"x" * 100)]
    run = command(hub, tmp_path / "home", *words)
    assert run.returncode == 0, run.stderr
    assert hub.faults[0].left == 0


@pytest.mark.parametrize("etag", ["", "1" * 64])
def test_a_listing_without_sizes_and_digests_is_made_up_for(
    hub: HubServer, recipe: Path, tmp_path: Path, etag: str
) -> None:
    home, out = tmp_path / "home", tmp_path / "out"
    with urllib.request.urlopen(f"{hub.url}/api/models/tiny/target") as answer:
        short = answer.read()
    assert b"sha256" not in short
    assert b"size" not in short
    hub.faults.append(Fault("GET", "/api/models/tiny/target", times=9, status=200, body=short))
    if etag:
        wrong = {"X-Linked-Etag": f'"{etag}"'}
        hub.faults.append(Fault("HEAD", UNET, times=9, after=1, headers=wrong))
    plan = command(hub, home, "plan", recipe)
    assert plan.returncode == 0, plan.stderr
    run = command(hub, home, "run", recipe, "--no-verify", "--out", out)
    assert run.returncode == (4 if etag else 0), run.stderr
    if etag:
        assert f"{UNET} has SHA-256 " in run.stderr
        assert f"and {etag} is expected" in run.stderr
        assert not list(home.rglob(f"blobs/{etag}*"))


# Faults ------------------------------------------------------------------------------------------

BUSY = {
    "429": Fault("GET|HEAD", UNET, status=429, headers={"Retry-After": "1"}),
    "500 twice for a file": Fault("GET", UNET, times=2, status=500),
    "500 twice for its size": Fault("HEAD", UNET, times=2, status=500),
    "500 twice for the listing": Fault("GET", r"/api/models/tiny/target", times=2, status=500),
    "503 for a small file": Fault("GET", r"tokenizer/vocab\.json", status=503),
    "cut at 99 %": Fault("GET", UNET, cut=0.99, after=2),
    "a header cut": Fault("GET", UNET, cut=0.5),
}


def test_a_hub_that_is_busy_for_a_moment_is_asked_again(
    hub: HubServer, recipe: Path, tmp_path: Path
) -> None:
    quiet = command(hub, tmp_path / "quiet", "run", recipe, "--no-verify", "--out", tmp_path / "a")
    assert quiet.returncode == 0, quiet.stderr
    hub.faults += BUSY.values()
    busy = command(hub, tmp_path / "busy", "run", recipe, "--no-verify", "--out", tmp_path / "b")
    assert busy.returncode == 0, busy.stderr
    assert [name for name, fault in BUSY.items() if fault.left] == []
    assert reproducible(tmp_path / "a") == reproducible(tmp_path / "b")


Refused = tuple[list[Fault], int, str]
REFUSED: dict[str, Refused] = {
    "the listing says 401": (
        [
            Fault(
                "GET",
                r"/api/models/tiny/base",
                status=401,
                headers={"X-Error-Code": "RepoNotFound"},
            )
        ],
        4,
        "models.base: there is no model tiny/base on the Hub, or it is private",
    ),
    "gated": (
        [Fault("GET|HEAD", UNET, 99, status=403, headers={"X-Error-Code": "GatedRepo"})],
        4,
        "models.target: tiny/target is gated and this account has no access",
    ),
    "a file says 409": ([Fault("GET", UNET, 99, status=409)], 4, "tiny/target"),
    "busy for ever": ([Fault("GET", UNET, 99, status=503)], 4, "tiny/target"),
    "a wrong etag": (
        [Fault("HEAD", UNET, 99, headers={"X-Linked-Etag": f'"{"1" * 64}"'})],
        4,
        f", and {'1' * 64} is expected",
    ),
    "a wrong file of the right size": (
        [Fault("GET", UNET, 99, after=2, status=200, body=b"?")],
        4,
        UNET,
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_hub_that_fails_for_good_leaves_nothing_wrong(
    hub: HubServer, recipe: Path, tmp_path: Path, case: str
) -> None:
    faults, code, message = REFUSED[case]
    path = hub.root / "tiny" / "target" / UNET
    # Faults are shared between the cases' runs: each gets its own.
    for fault in faults:
        body = fault.body * path.stat().st_size if fault.body == b"?" else fault.body
        copy = Fault(fault.method, fault.path, fault.times, fault.after, fault.status)
        copy.headers, copy.body = fault.headers, body
        hub.faults.append(copy)
    home, out = tmp_path / "home", tmp_path / "out"
    child = command(hub, home, "run", recipe, "--no-verify", "--out", out)
    assert child.returncode == code, child.stderr
    assert message in child.stderr
    assert child.stderr.splitlines()[-1].startswith("hint: ")
    assert not list(tmp_path.glob("out*"))
    # What is in the cache is what the Hub has.
    truth = {hashlib.sha256(p.read_bytes()).hexdigest() for p in hub.root.rglob("*") if p.is_file()}
    cached = [p for p in home.rglob("snapshots/*/**/*") if p.is_file()]
    assert {hashlib.sha256(p.read_bytes()).hexdigest() for p in cached} <= truth
    hub.faults.clear()
    again = command(hub, home, "run", recipe, "--no-verify", "--out", out)
    assert again.returncode == 0, again.stderr


def test_a_branch_that_moves_between_two_files_gives_none_of_the_new(
    hub: HubServer, recipe: Path, tmp_path: Path
) -> None:
    commit = hub.commit("tiny/target")
    new = changed(hub.root / "tiny" / "target", tmp_path / "new")
    moving = Fault("GET", UNET, after=2, then=lambda: hub.move("tiny/target", new))
    hub.faults.append(moving)
    out = tmp_path / "out"
    child = command(hub, tmp_path / "home", "run", recipe, "--no-verify", "--out", out)
    assert child.returncode == 0, child.stderr
    assert hub.commit("tiny/target") != commit
    assert {d.revision for d in hub.downloads if d.repo == "tiny/target"} == {commit}
    lock: dict[str, Any] = yaml.safe_load((out / "recipe.lock.yaml").read_text())
    assert lock["models"]["target"]["commit"] == commit
    for name, record in lock["models"]["target"]["files"].items():
        data = (hub.root / "tiny" / "target" / name).read_bytes()
        assert record["sha256"] == hashlib.sha256(data).hexdigest()


def test_a_broken_download_goes_on_where_it_ended(
    hub: HubServer, recipe: Path, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    # More than the 10 MiB that the client writes at a time.
    big = hub.root / "tiny" / "target" / UNET
    tensors = load_file(big)
    save_file({**tensors, "ballast": torch.zeros(6 * 2**20, dtype=torch.float32)}, big)
    hub.faults.append(Fault("GET", UNET, after=2, cut=0.9))
    words = ("run", recipe, "exclude=[ballast]", "--no-verify", "--out", tmp_path / "out")
    child = command(hub, home, *words)
    assert child.returncode == 0, child.stderr
    sent = [t.start for t in hub.transfers if t.name == UNET and t.repo == "tiny/target"]
    assert sent[-2] == 0
    assert sent[-1] >= 10 * 2**20


def test_names_that_would_leave_the_folder_are_refused(
    hub: HubServer, recipe: Path, tmp_path: Path
) -> None:
    hub.listed["tiny/target"] = ["../../evil.json"]
    child = command(hub, tmp_path / "home", "run", recipe, "--no-verify")
    assert child.returncode == 4
    assert "lists a file outside of itself: '../../evil.json'" in child.stderr


@pytest.mark.parametrize("locks", ["work", "do nothing"])
def test_runs_that_download_the_same_models_at_once_both_succeed(
    hub: HubServer, tmp_path: Path, locks: str
) -> None:
    models = {role: {"repo": f"tiny/{role}"} for role in ("base", "distilled")}
    models["target"] = {"repo": "tiny/target", "subfolder": "unet"}
    (tmp_path / "fast.yaml").write_text(yaml.safe_dump({"name": "fast", "models": models}))
    prelude = "" if locks == "work" else "import fcntl; fcntl.flock = lambda *_: None; "
    lines: list[list[object]] = [
        ["run", "fast.yaml", "--out", tmp_path / name, "--no-verify"] for name in ("a", "b")
    ]
    for line, (code, said) in zip(
        lines, together(hub, tmp_path / "home", lines, prelude), strict=True
    ):
        if locks != "work" and "changed while it was in use" in said:
            # The other run put its own download in place under our feet: told, and nothing is lost.
            assert code == 4, said
            ((code, said),) = together(hub, tmp_path / "home", [line], prelude)
        assert code == 0, said
    assert reproducible(tmp_path / "a") == reproducible(tmp_path / "b")
    assert not list((tmp_path / "home").rglob("*.incomplete"))
    # What both left in the cache is right: a third run takes it from there.
    asked = len(hub.transfers)
    words = ["run", "fast.yaml", "--out", tmp_path / "c", "--no-verify"]
    ((code, said),) = together(hub, tmp_path / "home", [words])
    assert code == 0, said
    assert reproducible(tmp_path / "c") == reproducible(tmp_path / "a")
    assert hub.transfers[asked:] == []
