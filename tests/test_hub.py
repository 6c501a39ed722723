"""The Hub, by the real client against a real server on the loopback interface."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml

COMMIT = "c0ffee" * 6 + "c0ff"


class Handler(BaseHTTPRequestHandler):
    """Model info and file downloads, as huggingface_hub asks for them."""

    server: HubServer

    def do_GET(self) -> None:
        parts = self.path.split("?")[0].strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            self.answer_info("/".join(parts[2:4]), parts[5] if len(parts) > 5 else "main")
        else:
            self.answer_file("/".join(parts[:2]), "/".join(parts[4:]))

    do_HEAD = do_GET  # noqa: N815

    def answer_info(self, repo: str, revision: str) -> None:
        root = self.server.root / repo
        if not root.is_dir():
            self.answer(404, {"X-Error-Code": "RepoNotFound"})
        elif repo == "org/gated":
            self.answer(403, {"X-Error-Code": "GatedRepo"})
        elif revision not in ("main", COMMIT):
            self.answer(404, {"X-Error-Code": "RevisionNotFound"})
        else:
            files = [path for path in sorted(root.rglob("*")) if path.is_file()]
            siblings = [self.describe(path, path.relative_to(root).as_posix()) for path in files]
            tree = {"id": repo, "sha": COMMIT, "private": False, "tags": [], "siblings": siblings}
            self.answer(200, {"Content-Type": "application/json"}, json.dumps(tree).encode())

    def describe(self, path: Path, name: str) -> dict[str, object]:
        data = path.read_bytes()
        entry: dict[str, object] = {"rfilename": name, "size": len(data), "blobId": "0" * 40}
        if path.suffix == ".safetensors":
            digest = hashlib.sha256(data).hexdigest()
            digest = self.server.lies.get(name, digest)
            entry["lfs"] = {"sha256": digest, "size": len(data), "pointerSize": 130}
        return entry

    def answer_file(self, repo: str, name: str) -> None:
        path = self.server.root / repo / name
        if not path.is_file():
            self.answer(404, {"X-Error-Code": "EntryNotFound"})
            return
        if self.command == "GET":
            self.server.downloads.append(f"{repo}/{name}")
        data = path.read_bytes()
        digest = hashlib.sha256(data).hexdigest()
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{digest}"', "X-Linked-Size": str(len(data))}
        self.answer(200, headers, data)

    def answer(self, code: int, headers: dict[str, str], body: bytes = b"") -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        pass


class HubServer(ThreadingHTTPServer):
    """Serves the folders `org/name` below a root, each as a repository."""

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.root = root
        self.downloads: list[str] = []
        self.lies: dict[str, str] = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@pytest.fixture
def hub(tiny_sd15: Path, tmp_path: Path) -> Iterator[HubServer]:
    root = tmp_path / "hub" / "org"
    shutil.copytree(tiny_sd15 / "target", root / "target")
    shutil.copytree(tiny_sd15 / "base", root / "base")
    shutil.copytree(tiny_sd15 / "distilled", root / "lcm")
    (root / "lora").mkdir()
    shutil.copyfile(
        tiny_sd15 / "lora_kohya.safetensors", root / "lora" / "pytorch_lora_weights.safetensors"
    )
    (root / "gated").mkdir()
    # What a public repository has besides: other formats, other variants, a card.
    vae = root / "target" / "vae"
    shutil.copyfile(
        vae / "diffusion_pytorch_model.safetensors",
        vae / "diffusion_pytorch_model.fp16.safetensors",
    )
    for name in ("vae/diffusion_pytorch_model.bin", "unet/diffusion_flax_model.msgpack"):
        (root / "target" / name).write_bytes(b"other format")
    (root / "target" / "README.md").write_text("a card")
    (root / "base" / "diffusion_pytorch_model.non_ema.safetensors").write_bytes(b"not this one")
    server = HubServer(root.parent)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def run(
    hub: HubServer, tmp_path: Path, *words: str, offline: bool = False
) -> subprocess.CompletedProcess[str]:
    recipe = tmp_path / "hub.yaml"
    target = {"repo": "org/target", "variant": "fp16"}
    models = {"base": "org/base", "distilled": "org/lcm@main", "target": target}
    recipe.write_text(yaml.safe_dump({"name": "hub", "models": models}))
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_OFFLINE": str(int(offline)),
    }
    command = [sys.executable, "-m", "merge", words[0], str(recipe), *words[1:]]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_only_needed_files_of_one_commit_are_downloaded(hub: HubServer, tmp_path: Path) -> None:
    out = tmp_path / "out"
    child = run(hub, tmp_path, "run", "--out", str(out), "--no-verify", "-v")
    assert child.returncode == 0, child.stderr
    assert "target: its UNet has no fp16 variant, its plain files are used" in child.stderr
    downloads = set(hub.downloads)
    assert len(downloads) == len(hub.downloads)
    assert "org/target/vae/diffusion_pytorch_model.fp16.safetensors" in downloads
    assert "org/target/unet/diffusion_pytorch_model.safetensors" in downloads
    unwanted = ("non_ema", ".bin", ".msgpack", "README", "vae/diffusion_pytorch_model.safetensors")
    assert not [name for name in downloads if any(part in name for part in unwanted)]
    # The variant's suffix is taken off in the export.
    assert (out / "vae" / "diffusion_pytorch_model.safetensors").is_file()
    manifest = json.loads((out / "merge_manifest.json").read_text())
    for role, repo in (("target", "target"), ("base", "base"), ("distilled", "lcm")):
        record = manifest["inputs"][role]
        assert (record["repo"], record["commit"]) == (f"org/{repo}", COMMIT)
        for name, file in record["files"].items():
            data = (hub.root / "org" / repo / name).read_bytes()
            assert file["sha256"] == hashlib.sha256(data).hexdigest()
    lock = yaml.safe_load((out / "recipe.lock.yaml").read_text())
    assert lock["recipe"]["models"]["distilled"][0]["revision"] == COMMIT
    # Offline, the same from the cache, and nothing asked.
    hub.downloads.clear()
    again = tmp_path / "again"
    child = run(hub, tmp_path, "run", "--out", str(again), "--no-verify", "-q", offline=True)
    assert child.returncode == 0, child.stderr
    assert hub.downloads == []
    for name in ("merge_manifest.json", "recipe.lock.yaml"):
        assert (again / name).read_bytes() == (out / name).read_bytes()


def test_a_lora_repository_needs_its_one_file(hub: HubServer, tmp_path: Path) -> None:
    child = run(hub, tmp_path, "plan", "models.distilled=org/lora", "models.base=null")
    assert child.returncode == 0, child.stderr
    assert "278 lora" in child.stdout
    assert "org/lora/pytorch_lora_weights.safetensors" in hub.downloads


@pytest.mark.parametrize(
    ("word", "message", "hint"),
    [
        ("models.base=org/none", "there is no model org/none on the Hub", "hf auth login"),
        ("models.base=org/base@v9", "org/base has no revision v9", "Hub id"),
        ("models.base=org/gated", "org/gated is gated", "accept its terms"),
    ],
)
def test_what_is_not_there_is_named(
    hub: HubServer, tmp_path: Path, word: str, message: str, hint: str
) -> None:
    child = run(hub, tmp_path, "plan", word)
    assert child.returncode == 4
    assert f"models.base: {message}" in child.stderr
    assert hint in child.stderr.splitlines()[-1]


def test_bytes_that_differ_from_what_the_hub_states_are_refused(
    hub: HubServer, tmp_path: Path
) -> None:
    hub.lies["diffusion_pytorch_model.safetensors"] = "0" * 64
    out = tmp_path / "out"
    child = run(hub, tmp_path, "run", "--out", str(out), "--no-verify")
    assert child.returncode == 4
    assert f"and {'0' * 64} is expected" in child.stderr
    assert not list(tmp_path.glob("out*"))


def test_a_partial_cache_offline_says_what_to_download(hub: HubServer, tmp_path: Path) -> None:
    assert run(hub, tmp_path, "plan").returncode == 0
    (cached,) = (tmp_path / "home").rglob("models--org--base/snapshots/*/*.safetensors")
    cached.unlink()
    child = run(hub, tmp_path, "plan", offline=True)
    assert child.returncode == 4
    assert "the cache lacks files of org/base" in child.stderr
    assert f"hf download org/base --revision {COMMIT}" in child.stderr


def test_a_hub_that_cannot_be_reached(hub: HubServer, tmp_path: Path) -> None:
    hub.shutdown()
    hub.server_close()
    child = run(hub, tmp_path, "plan")
    assert child.returncode == 4
    assert "the Hub cannot be reached for org/base" in child.stderr
    assert child.stderr.splitlines()[-1].startswith("hint: check the network")
