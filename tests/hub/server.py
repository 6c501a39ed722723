"""The server: what tests set, what they read afterwards, and who may do what."""

from __future__ import annotations

import os
import sys
import tempfile
import threading
from http.server import ThreadingHTTPServer
from pathlib import Path
from types import TracebackType

from tests.hub.connection import Handler, Transfer
from tests.hub.downloads import Download
from tests.hub.faults import Fault
from tests.hub.messages import RefusedError, Request
from tests.hub.repositories import MAIN, Commit, Repositories, Repository, first_commit


class HubServer(ThreadingHTTPServer):
    """Serves repositories, takes new ones, and remembers what was asked.

    Attributes:
        root: Holds `org/name/...`: repositories with one commit, for `main` and `v1`.
        repositories: All of them, with those that clients made.
        faults: What goes wrong; the first that matches a request strikes.
        tokens: Tokens to `read` or `write`. While there are none, everybody may do everything.
        user: Whose tokens they are, and where repositories without an organization go.
        downloads: Every GET of a file.
        transfers: The bytes that were sent of each.
        requests: Method and path of everything.
        authorizations: Every Authorization header that came.
        gated: Repositories whose files need a token that nobody has.
        wrong_sha256: Repository and name to the digest that is stated instead of the true one.
        refused: Repository and name to the status of the answer for that file.
        cut: Files whose next GET breaks off in the middle.
        listed: Repository to names that are listed without being there.
        xet_url: Where large files are said to be, for clients that use Xet.
        xet_store: The folder that clients that use Xet upload to.
        chunked: The SHA-256 of the files that came in there.
    """

    daemon_threads = True

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.root = root
        self._scratch = tempfile.TemporaryDirectory()
        self.xet_store = Path(self._scratch.name, "xet-store")
        objects = Path(self._scratch.name, "objects")
        objects.mkdir()
        self.repositories = Repositories(root, objects)
        self.faults: list[Fault] = []
        self.tokens: dict[str, str] = {}
        self.user = "tester"
        self.downloads: list[Download] = []
        self.transfers: list[Transfer] = []
        self.requests: list[tuple[str, str]] = []
        self.authorizations: set[str] = set()
        self.gated: set[str] = set()
        self.wrong_sha256: dict[tuple[str, str], str] = {}
        self.refused: dict[tuple[str, str], int] = {}
        self.cut: set[tuple[str, str]] = set()
        self.listed: dict[str, list[str]] = {}
        self.xet_url = ""
        self.chunked: set[str] = set()

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
        self._scratch.cleanup()

    def stop(self) -> None:
        """Close the port: nothing answers there afterwards."""
        if self._thread.is_alive():
            self.shutdown()
            self._thread.join()
            self.server_close()

    def handle_error(self, request: object, client_address: object) -> None:
        """Report what went wrong, unless the client has merely gone away."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def environment(
        self, home: Path, *, offline: bool = False, xet: bool = False
    ) -> dict[str, str]:
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
            "HF_HUB_DISABLE_XET": str(int(not xet)),
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_OFFLINE": str(int(offline)),
        }

    def commit(self, repo: str, revision: str = "main") -> str:
        """Return the commit that a branch, a tag or a pull request stands for."""
        repository = self.repositories.get(repo)
        commit = repository.find(revision) if repository else None
        return commit.id if commit else first_commit(repo)

    def read(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        """Return the files of a repository at a revision."""
        repository = self.repositories.get(repo)
        commit = repository.find(revision) if repository else None
        if not commit:
            raise KeyError(f"{repo} at {revision}")
        return {name: entry.path.read_bytes() for name, entry in commit.files.items()}

    def move(self, repo: str, folder: Path, branch: str = "main") -> str:
        """Make a branch stand for a new commit with the files of a folder; return its id."""
        with self.repositories.lock:
            repository = self.repositories.get(repo) or self.repositories.create(repo)
            ref = MAIN if branch == "main" else f"refs/heads/{branch}"
            return repository.add(ref, folder, f"Move {branch}").id

    def names(self, repo: str) -> set[str]:
        """Return the files that were downloaded from a repository."""
        return {download.name for download in self.downloads if download.repo == repo}

    def struck(self, method: str, path: str) -> Fault | None:
        """Return what goes wrong with a request."""
        with self.repositories.lock:
            return next((fault for fault in self.faults if fault.strikes(method, path)), None)

    def scope(self, request: Request) -> str:
        """Return what a request may do: `write`, `read`, or nothing for strangers."""
        if not self.tokens:
            return "write"
        if not request.token:
            return ""
        if request.token not in self.tokens:
            raise RefusedError(401, "Invalid credentials in Authorization header")
        return self.tokens[request.token]

    def must_write(self, request: Request, code: str = "") -> None:
        """Refuse a request that may not write."""
        scope = self.scope(request)
        if not scope:
            raise RefusedError(401, "Invalid username or password.", code)
        if scope != "write":
            raise RefusedError(403, "Authorization error.")

    def reach(self, request: Request, repo: str, *, write: bool = False) -> Repository:
        """Return a repository that a request may see, and write to if it wants to."""
        scope = self.scope(request)
        repository = self.repositories.get(repo)
        if not repository or (repository.private and not scope):
            # The Hub does not tell strangers which names exist.
            known = self.tokens and scope
            message = "Repository not found" if known else "Invalid username or password."
            raise RefusedError(404 if known else 401, message, "RepoNotFound")
        if write:
            # Behind https the client takes a plain 401 for this; behind http it has to be said.
            self.must_write(request, "RepoNotFound")
        return repository

    def snapshot(
        self, request: Request, repo: str, revision: str, *, write: bool = False
    ) -> tuple[Repository, Commit]:
        """Return a repository and the commit that a revision of it stands for."""
        repository = self.reach(request, repo, write=write)
        commit = repository.find(revision)
        if not commit:
            raise RefusedError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return repository, commit
