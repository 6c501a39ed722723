"""Where a model's files are listed and fetched: a folder of this disk, or the Hub's cache."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from merge.errors import SourceError, SourceNotFoundError
from merge.pickles import PICKLE_SUFFIXES


class Store(Protocol):
    """Files of one model by name."""

    @property
    def names(self) -> frozenset[str]:
        """Names of all files, with `/`, relative to the model."""
        ...

    def fetch(self, names: Collection[str]) -> None:
        """Make files present on this disk."""
        ...

    def path(self, name: str) -> Path:
        """Return where a fetched file is."""
        ...

    def expected_sha256(self, name: str) -> str:
        """Return the SHA-256 that the store states for a file, or an empty string."""
        ...


@dataclass(frozen=True)
class LocalStore:
    """A folder of this disk.

    Attributes:
        root: The folder.
        names: Its files.
    """

    root: Path
    names: frozenset[str]

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

    def fetch(self, names: Collection[str]) -> None:
        """Do nothing: the files are here."""

    def path(self, name: str) -> Path:
        """Return the file's path."""
        return self.root / name

    def expected_sha256(self, name: str) -> str:
        """Return an empty string: a folder states no digests."""
        return ""


@dataclass(frozen=True)
class HubStore:
    """A repository of the Hub at one commit, through huggingface_hub's cache.

    Attributes:
        repo: Hub id.
        revision: Branch, tag or commit as asked for.
        commit: 40 hexadecimal digits.
        names: Files at that commit; offline, those in the cache.
        digests: SHA-256 of the large files, as the Hub states them.
        offline: True when only the cache may be used.
        root: The cache's snapshot folder.
    """

    repo: str
    revision: str
    commit: str
    names: frozenset[str]
    digests: Mapping[str, str]
    offline: bool
    root: Path

    @staticmethod
    def open(repo: str, revision: str | None) -> HubStore:
        """Resolve a branch or tag to a commit, once, and list the files at it.

        Raises:
            SourceNotFoundError: no such repository or revision, or no access.
            OfflineError: offline, and the cache does not have it.
        """
        from huggingface_hub import HfApi, constants, snapshot_download

        from merge.sources.hub_errors import hub_errors

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
                return HubStore(repo, name, root.name, LocalStore.open(root).names, {}, True, root)
            info = HfApi().model_info(repo, revision=revision, files_metadata=True)
            siblings = info.siblings or []
            digests = {s.rfilename: s.lfs.sha256 for s in siblings if s.lfs is not None}
            names = frozenset(s.rfilename for s in siblings)
            for path in sorted(names):
                if not is_inside(path):
                    raise SourceError(f"{repo} lists a file outside of itself: {path!r}")
            commit = str(info.sha)
            folder = f"models--{repo.replace('/', '--')}"
            root = Path(constants.HF_HUB_CACHE) / folder / "snapshots" / commit
            return HubStore(repo, name, commit, names, digests, False, root)

    def fetch(self, names: Collection[str]) -> None:
        """Download what the cache lacks.

        Raises:
            OfflineError: offline, or the Hub cannot be reached.
        """
        from huggingface_hub import hf_hub_download

        from merge.sources.hub_errors import hub_errors

        if self.offline:
            return
        # Weights last: offline, a snapshot that has them has everything that goes with them.
        weights = (".safetensors", *PICKLE_SUFFIXES)
        for name in sorted(names, key=lambda name: (name.endswith(weights), name)):
            with hub_errors(self.repo, self.commit):
                path = Path(hf_hub_download(self.repo, name, revision=self.commit))
            if path != self.path(name):
                raise SourceError(f"{self.repo}: {name} was stored at an unexpected place")
        # The client writes down what a branch stands for only when asked by the branch's name,
        # which could have moved by now. Offline runs look it up here.
        reference = self.root.parent.parent / "refs" / self.revision
        if self.revision != self.commit:
            with hub_errors(self.repo, self.commit):
                reference.parent.mkdir(parents=True, exist_ok=True)
                reference.write_text(self.commit, encoding="utf-8")

    def path(self, name: str) -> Path:
        """Return where the cache keeps the file."""
        return self.root / name

    def expected_sha256(self, name: str) -> str:
        """Return the digest of a large file; an empty string for small ones."""
        return self.digests.get(name, "")


def is_inside(name: str) -> bool:
    """Return True when a file's name cannot lead out of the folder that it is put into."""
    parts = name.replace("\\", "/").split("/")
    return ".." not in parts and "" not in parts and ":" not in parts[0]


def _raise(error: OSError) -> None:
    raise error
