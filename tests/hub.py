"""A small Hub on the loopback interface: the part of the protocol that downloads use.

The real client talks to it when HF_ENDPOINT is its address. Every folder `org/name` below the root
is a repository; its large files are those with a weight file's suffix.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
import time
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

LARGE = (".safetensors", ".bin", ".ckpt", ".msgpack")
_INFO = re.compile(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?")
_TREE = re.compile(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)")
_XET_TOKEN = re.compile(r"/api/models/([^/]+/[^/]+)/xet-read-token/([^/]+)")
_FILE = re.compile(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)")


class Download(NamedTuple):
    """One file as it was asked for."""

    repo: str
    revision: str
    name: str


class HubServer(ThreadingHTTPServer):
    """Serves repositories and remembers what was asked.

    Attributes:
        root: Holds `org/name/...`.
        downloads: Every GET of a file.
        requests: Method and path of everything.
        authorizations: Every Authorization header that came.
        gated: Repositories whose files need a token that nobody has.
        wrong_sha256: Repository and name to the digest that is stated instead of the true one.
        refused: Repository and name to the status of the answer for that file.
        cut: Files whose next GET breaks off in the middle.
        listed: Repository to names that are listed without being there.
        xet_url: Where large files are said to be, for clients that use Xet.
    """

    daemon_threads = True

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root = root
        self.downloads: list[Download] = []
        self.requests: list[tuple[str, str]] = []
        self.authorizations: set[str] = set()
        self.gated: set[str] = set()
        self.wrong_sha256: dict[tuple[str, str], str] = {}
        self.refused: dict[tuple[str, str], int] = {}
        self.cut: set[tuple[str, str]] = set()
        self.listed: dict[str, list[str]] = {}
        self.xet_url = ""

    def __enter__(self) -> HubServer:
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Close the port: nothing answers there afterwards."""
        if self._thread.is_alive():
            self.shutdown()
            self._thread.join()
            self.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def environment(self, home: Path, *, offline: bool = False) -> dict[str, str]:
        """Return the environment of a process that has only this Hub and its own cache."""
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("HF_", "HUGGING", "TRANSFORMERS_"))
            and not name.lower().endswith("_proxy")
        }
        return {
            **kept,
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_OFFLINE": str(int(offline)),
        }

    def commit(self, repo: str) -> str:
        """Return the commit that `main` and `v1` of a repository stand for."""
        return hashlib.sha1(repo.encode()).hexdigest()

    def names(self, repo: str) -> set[str]:
        """Return the files that were downloaded from a repository."""
        return {download.name for download in self.downloads if download.repo == repo}


class _Handler(BaseHTTPRequestHandler):
    server: HubServer

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append((self.command, path))
        if token := self.headers.get("Authorization"):
            self.server.authorizations.add(token)
        if match := _INFO.fullmatch(path):
            self._answer_info(match[1], match[2] or "main")
        elif match := _TREE.fullmatch(path):
            self._answer_tree(match[1], match[2])
        elif _XET_TOKEN.fullmatch(path):
            self._answer_xet()
        elif match := _FILE.fullmatch(path):
            self._answer_file(Download(match[1], match[2], match[3]))
        else:
            self._answer(400, {})

    do_HEAD = do_GET  # noqa: N815

    def _is_missing(self, repo: str, revision: str) -> bool:
        if not (self.server.root / repo).is_dir():
            # The Hub does not tell strangers which names exist.
            self._answer(401, {"X-Error-Code": "RepoNotFound"})
        elif revision not in ("main", "v1", self.server.commit(repo)):
            self._answer(404, {"X-Error-Code": "RevisionNotFound"})
        else:
            return False
        return True

    def _files(self, repo: str) -> list[tuple[str, Path]]:
        root = self.server.root / repo
        paths = [path for path in sorted(root.rglob("*")) if path.is_file()]
        return [(path.relative_to(root).as_posix(), path) for path in paths]

    def _facts(self, repo: str, name: str, path: Path) -> dict[str, object]:
        data = path.read_bytes()
        facts: dict[str, object] = {"size": len(data)}
        if name.endswith(LARGE):
            digest = self.server.wrong_sha256.get((repo, name), hashlib.sha256(data).hexdigest())
            facts["lfs"] = {"sha256": digest, "oid": digest, "size": len(data), "pointerSize": 130}
        return facts

    def _answer_info(self, repo: str, revision: str) -> None:
        if self._is_missing(repo, revision):
            return
        siblings = [
            {"rfilename": name, "blobId": _blob_id(path), **self._facts(repo, name, path)}
            for name, path in self._files(repo)
        ]
        siblings += [{"rfilename": name} for name in self.server.listed.get(repo, [])]
        tree = {
            "id": repo,
            "modelId": repo,
            "sha": self.server.commit(repo),
            "private": False,
            # A gated repository shows its list of files to everybody.
            "gated": "manual" if repo in self.server.gated else False,
            "tags": [],
            "siblings": siblings,
        }
        self._answer_json(tree)

    def _answer_tree(self, repo: str, revision: str) -> None:
        if not self._is_missing(repo, revision):
            files = self._files(repo)
            self._answer_json(
                [
                    {"type": "file", "path": n, "oid": _blob_id(p), **self._facts(repo, n, p)}
                    for n, p in files
                ]
            )

    def _answer_file(self, asked: Download) -> None:
        repo, revision, name = asked
        if self._is_missing(repo, revision):
            return
        commit = {"X-Repo-Commit": self.server.commit(repo)}
        if repo in self.server.gated:
            self._answer(401, {**commit, "X-Error-Code": "GatedRepo"})
            return
        if status := self.server.refused.get((repo, name)):
            self._answer(status, commit)
            return
        path = self.server.root / repo / name
        if not path.is_file():
            self._answer(404, {**commit, "X-Error-Code": "EntryNotFound"})
            return
        data = path.read_bytes()
        headers = {**commit, "ETag": f'"{_blob_id(path)}"', "Accept-Ranges": "bytes"}
        if name.endswith(LARGE):
            digest = hashlib.sha256(data).hexdigest()
            headers |= {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(data))}
            if self.server.xet_url:
                token = f"{self.server.url}/api/models/{repo}/xet-read-token/{revision}"
                headers |= {"X-Xet-Hash": digest, "X-Xet-Refresh-Route": token}
        if self.command == "GET":
            self.server.downloads.append(asked)
        if match := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            start = int(match[1])
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            self._answer(206, headers, data[start:])
        elif self.command == "GET" and (repo, name) in self.server.cut:
            self.server.cut.remove((repo, name))
            self._answer(200, headers, data, sent=len(data) // 2)
            self.close_connection = True
        else:
            self._answer(200, headers, data)

    def _answer_xet(self) -> None:
        headers = {"X-Xet-Cas-Url": self.server.xet_url, "X-Xet-Access-Token": "token"}
        headers["X-Xet-Token-Expiration"] = str(int(time.time()) + 3600)
        self._answer(200, headers)

    def _answer_json(self, tree: object) -> None:
        self._answer(200, {"Content-Type": "application/json"}, json.dumps(tree).encode())

    def _answer(
        self, status: int, headers: Mapping[str, str], body: bytes = b"", sent: int | None = None
    ) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:sent])

    def log_message(self, *arguments: object) -> None:
        pass


def _blob_id(path: Path) -> str:
    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
