"""Where a model's files are listed and fetched: a folder of this disk, or the Hub's cache."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from merge.errors import IntegrityError, SourceError, SourceNotFoundError
from merge.sources.fetch import fetch_files
from merge.sources.hub_errors import hub_errors
from merge.sources.model import HubFile, SourceFile
from merge.sources.retries import retried

_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class LocalStore:
    """A folder of this disk.

    Attributes:
        root: The folder.
        names: Its files.
    """

    root: Path
    names: frozenset[str]
    commit = None
    is_partial = False

    @staticmethod
    def open(root: Path) -> LocalStore:
        """List a folder.

        Raises:
            SourceNotFoundError: it is no folder or cannot be read.
        """
        found = []
        try:
            for folder, folders, files in os.walk(root, onerror=_raise, followlinks=True):
                # Nothing of a model is that deep; a wrong path such as `/` must not be walked, nor
                # a loop of links.
                if len(Path(folder).relative_to(root).parts) >= 3:
                    folders.clear()
                found += [(Path(folder) / name).relative_to(root).as_posix() for name in files]
        except OSError as error:
            raise SourceNotFoundError(f"cannot read the folder {root}: {error.strerror}") from error
        return LocalStore(root, frozenset(found))

    def file(self, name: str) -> SourceFile:
        """Return a file with its size.

        Raises:
            SourceNotFoundError: it cannot be read.
            SourceError: its name is not UTF-8, or has control characters.
        """
        path = self.root / name
        if name.encode(errors="ignore").decode() != name or any(c < " " for c in name):
            raise SourceError(
                f"the file name {name!r} in {self.root} is not UTF-8 or has control characters",
                hint="rename the file",
            )
        return SourceFile(name, path, _size_bytes(path))

    def fetch(self, names: Collection[str]) -> None:
        """Do nothing: the files are here."""


@dataclass(frozen=True)
class HubStore:
    """A repository of the Hub at one commit, through huggingface_hub's cache.

    Attributes:
        repo: Hub id.
        revision: Branch, tag or commit as asked for.
        commit: 40 hexadecimal digits.
        names: Files at that commit; offline, those in the cache.
        stated: What the Hub says of each; empty offline.
        root: The cache's snapshot folder.
    """

    repo: str
    revision: str
    commit: str
    names: frozenset[str]
    stated: Mapping[str, HubFile]
    root: Path

    @property
    def is_partial(self) -> bool:
        """Return True offline, where the names are those of the cache."""
        return not self.stated

    @staticmethod
    def open(repo: str, revision: str | None) -> HubStore:
        """Resolve a branch or tag to a commit, once, and list the files at it.

        Raises:
            SourceNotFoundError: no such repository or revision, or no access.
            OfflineError: offline, and the cache does not have it.
        """
        from huggingface_hub import HfApi, constants, snapshot_download

        name = revision or "main"
        with hub_errors(repo, revision):
            if constants.HF_HUB_OFFLINE:
                # Without patterns the client refuses a snapshot that another program fetched in
                # part, even when all that is needed is there.
                root = Path(
                    snapshot_download(
                        repo, revision=revision, local_files_only=True, allow_patterns=[]
                    )
                )
                names = LocalStore.open(root).names
                return HubStore(repo, name, root.name, names, {}, root)
            info = retried(lambda: HfApi().model_info(repo, revision=revision, files_metadata=True))
            commit = str(info.sha)
            if not _COMMIT.fullmatch(commit):
                raise SourceError(f"{repo} names no commit for {name}: {commit!r}")
            folder = f"models--{repo.replace('/', '--')}"
            root = Path(constants.HF_HUB_CACHE) / folder / "snapshots" / commit
            stated = {}
            for sibling in info.siblings or []:
                path = sibling.rfilename
                if not is_inside(path):
                    raise SourceError(f"{repo} lists a file outside of itself: {path!r}")
                sha256 = sibling.lfs.sha256 if sibling.lfs is not None else ""
                blob_id = (sibling.blob_id or "") if sibling.lfs is None else ""
                stated[path] = HubFile(repo, name, commit, path, sha256, blob_id, sibling.size)
            return HubStore(repo, name, commit, frozenset(stated), stated, root)

    def file(self, name: str) -> SourceFile:
        """Return a file, which need not be in the cache yet.

        Raises:
            SourceNotFoundError: offline, and the cache lacks it.
            IntegrityError: the cache has it in another size than the Hub.
        """
        path = self.root / name
        plain = HubFile(self.repo, self.revision, self.commit, name)
        hub = self.stated.get(name, plain)
        if not path.exists() and not self.is_partial:
            size = self._ask_size(name) if hub.size_bytes is None else hub.size_bytes
            return SourceFile(name, path, size, hub.sha256, hub)
        size = _size_bytes(path)
        if hub.size_bytes not in (None, size):
            raise IntegrityError(
                f"the cache has {name} of {self.repo} with {size:,} bytes, and the Hub states "
                f"{hub.size_bytes:,}",
                hint=f"remove {path} and run again",
            )
        return SourceFile(name, path, size, hub.sha256 or _blob_sha256(path), hub)

    def _ask_size(self, name: str) -> int:
        """Return a file's bytes, which the listing of some mirrors leaves out."""
        from huggingface_hub import get_hf_file_metadata, hf_hub_url

        with hub_errors(self.repo, self.commit):
            url = hf_hub_url(self.repo, name, revision=self.commit)
            size = retried(lambda: get_hf_file_metadata(url)).size
        if size is None:
            raise SourceError(f"{self.repo} does not say how large {name} is")
        return size

    def fetch(self, names: Collection[str]) -> None:
        """Download what the cache lacks.

        Raises:
            OfflineError: offline, or the Hub cannot be reached.
            IntegrityError: what came is not what the Hub states.
        """
        fetch_files([self.file(name) for name in sorted(names)])


# The files of one model by name, with `/` and relative to the model. Where it `is_partial`, the
# names are only those that a cache happens to hold.
Store = LocalStore | HubStore


def is_inside(name: str) -> bool:
    """Return True when a file's name cannot lead out of the folder that it is put into."""
    parts = name.replace("\\", "/").split("/")
    return ".." not in parts and "" not in parts and ":" not in parts[0]


def _blob_sha256(path: Path) -> str:
    """Return the SHA-256 that the cache stores a large file under, or an empty string."""
    name = path.resolve().name
    return name if _SHA256.fullmatch(name) else ""


def _size_bytes(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise SourceNotFoundError(f"cannot read {path}: {error.strerror}") from error


def _raise(error: OSError) -> None:
    raise error
