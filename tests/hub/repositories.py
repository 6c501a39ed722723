"""What a Hub holds: repositories, their commits, and the bytes of their files."""

from __future__ import annotations

import hashlib
import tempfile
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

LARGE = (".safetensors", ".bin", ".ckpt", ".msgpack")
MAIN = "refs/heads/main"
_LARGE_SIZE = 10 * 2**20
_ATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LARGE)


class Entry(NamedTuple):
    """One file of a commit: where its bytes are, and whether git holds only a pointer to them."""

    path: Path
    large: bool


class Facts(NamedTuple):
    """What is stated about a file without sending it.

    Attributes:
        size: Its number of bytes.
        sha256: The digest of its bytes.
        blob: The id of what git holds: the bytes, or the pointer to them.
        pointer_size: The size of that pointer, and 0 without one.
    """

    size: int
    sha256: str
    blob: str
    pointer_size: int


@dataclass(frozen=True)
class Commit:
    """A snapshot of a repository.

    Attributes:
        id: 40 hexadecimal digits.
        content: Its files by name, or a folder that holds them.
        parent: The id of the commit before.
        title: The first line of its message.
        message: The rest.
        date: When it was made.
    """

    id: str
    content: Path | Mapping[str, Entry]
    parent: str = ""
    title: str = "initial commit"
    message: str = ""
    date: datetime = field(default_factory=lambda: datetime.now(UTC))

    @property
    def files(self) -> dict[str, Entry]:
        """The files by name, in order."""
        if not isinstance(self.content, Path):
            return dict(sorted(self.content.items()))
        # Tests change a placed folder while the server runs, so that it is read each time.
        return {
            path.relative_to(self.content).as_posix(): Entry(path, path.name.endswith(LARGE))
            for path in sorted(self.content.rglob("*"))
            if path.is_file()
        }

    @property
    def stamp(self) -> str:
        """The date as the Hub writes it."""
        return self.date.strftime("%Y-%m-%dT%H:%M:%S.000Z")


class Pull(NamedTuple):
    """A pull request, whose commits are at `refs/pr/` and its number."""

    number: int
    title: str
    date: str


@dataclass
class Repository:
    """A repository with its history.

    Attributes:
        id: `org/name`.
        private: Whether strangers are told that it does not exist.
        commits: Every commit by id.
        refs: The full names of branches, tags and pull requests to the ids of commits.
        pulls: The pull requests.
    """

    id: str
    private: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    pulls: list[Pull] = field(default_factory=list)

    def ref(self, revision: str) -> str:
        """Return the full name of a branch, a tag or a pull request, or nothing."""
        names = (revision, f"refs/heads/{revision}", f"refs/tags/{revision}")
        return next((name for name in names if name in self.refs), "")

    def find(self, revision: str) -> Commit | None:
        """Return the commit that a branch, a tag, a pull request or an id stands for."""
        return self.commits.get(self.refs.get(self.ref(revision), revision))

    def is_movable(self, revision: str) -> bool:
        """Return whether commits can be made on a revision."""
        return self.ref(revision).startswith(("refs/heads/", "refs/pr/"))

    def add(
        self, ref: str, content: Path | Mapping[str, Entry], title: str, message: str = ""
    ) -> Commit:
        """Make a commit on top of a ref, which stands for it from then on."""
        parent = self.refs.get(ref, "")
        # The count keeps two commits of the same content on the same parent apart.
        seed = "\n".join((self.id, parent, title, message, str(len(self.commits))))
        commit = Commit(hashlib.sha1(seed.encode()).hexdigest(), content, parent, title, message)
        self.commits[commit.id] = commit
        self.refs[ref] = commit.id
        return commit

    def history(self, commit: Commit) -> list[Commit]:
        """Return a commit and all before it, the newest first."""
        found = [commit]
        while before := self.commits.get(found[-1].parent):
            found.append(before)
        return found

    def last_change(self, commit: Commit, name: str) -> Commit:
        """Return the commit that gave a file, or a folder, the content that it has."""
        found, *earlier = self.history(commit)
        wanted = _below(found, name)
        for before in earlier:
            if _below(before, name) != wanted:
                break
            found = before
        return found

    def open_pull(self, title: str, base: str) -> Pull:
        """Open a pull request that begins at a commit."""
        date = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")
        pull = Pull(len(self.pulls) + 1, title, date)
        self.pulls.append(pull)
        self.refs[f"refs/pr/{pull.number}"] = base
        return pull


class Repositories:
    """All repositories: those that folders below a root stand for, and those that were created.

    Args:
        root: Holds `org/name/...`.
        objects: An empty folder for bytes that come in.
    """

    def __init__(self, root: Path, objects: Path) -> None:
        self.root = root
        self._objects = objects
        self.lock = threading.RLock()
        self._known: dict[str, Repository] = {}

    def get(self, repo: str) -> Repository | None:
        """Return a repository that exists."""
        with self.lock:
            if repo not in self._known and (self.root / repo).is_dir():
                first = Commit(first_commit(repo), self.root / repo)
                refs = {MAIN: first.id, "refs/tags/v1": first.id}
                self._known[repo] = Repository(repo, commits={first.id: first}, refs=refs)
            return self._known.get(repo)

    def create(self, repo: str, *, private: bool = False) -> Repository:
        """Make a repository that holds what every new one holds."""
        found = self._known[repo] = Repository(repo, private)
        attributes = Entry(self.keep(repo, [_ATTRIBUTES.encode()]), large=False)
        found.add(MAIN, {".gitattributes": attributes}, "initial commit")
        return found

    def keep(self, repo: str, chunks: Iterable[bytes]) -> Path:
        """Write bytes to the place that their digest gives them in a repository."""
        digest = hashlib.sha256()
        folder = self.folder(repo)
        with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
            part = Path(file.name)
            try:
                for chunk in chunks:
                    digest.update(chunk)
                    file.write(chunk)
            except BaseException:
                part.unlink()
                raise
        return part.rename(folder / digest.hexdigest())

    def held(self, repo: str, sha256: str) -> Path | None:
        """Return the place of bytes that came in for a repository, if they did."""
        path = self.folder(repo) / sha256
        return path if path.is_file() else None

    def folder(self, repo: str) -> Path:
        """Return where the bytes are that came in for a repository, named by their SHA-256."""
        folder = self._objects / repo
        folder.mkdir(parents=True, exist_ok=True)
        return folder


def first_commit(repo: str) -> str:
    """Return the id of the first commit of a repository that a folder stands for."""
    return hashlib.sha1(repo.encode()).hexdigest()


def is_large(name: str, size: int) -> bool:
    """Return whether git would hold only a pointer to a file."""
    return name.endswith(LARGE) or size > _LARGE_SIZE


def facts_of(entry: Entry) -> Facts:
    """Return what is stated about a file."""
    status = entry.path.stat()
    size, sha256, blob = _digests(entry.path, status.st_size, status.st_mtime_ns)
    if not entry.large:
        return Facts(size, sha256, blob, 0)
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n"
    return Facts(size, sha256, _blob_id(pointer.encode()), len(pointer))


@lru_cache(maxsize=4096)
def _digests(path: Path, size: int, changed: int) -> tuple[int, str, str]:
    sha256, blob = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % size)
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            sha256.update(chunk)
            blob.update(chunk)
    return size, sha256.hexdigest(), blob.hexdigest()


def _blob_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _below(commit: Commit, name: str) -> dict[str, str]:
    return {
        path: facts_of(entry).sha256
        for path, entry in commit.files.items()
        if path == name or path.startswith(name + "/")
    }
