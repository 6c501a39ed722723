"""Download what the cache lacks, and keep nothing in it that is not what the Hub states."""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from merge.errors import IntegrityError, NoSpaceError, SourceError
from merge.reader.pickles.archive import PICKLE_SUFFIXES
from merge.sources.hub_errors import hub_errors, naming
from merge.sources.model import HubFile, SourceFile, Sources
from merge.sources.retries import retried

# Told the bytes that are there by now, and those of all files.
OnBytes = Callable[[int, int], None]

_WEIGHTS = (".safetensors", *PICKLE_SUFFIXES)
_SMALL_BYTES = 8 * 1024 * 1024
# Small files take a round trip each and hardly any bandwidth. A large one is cut into pieces and
# fetched in parallel by the client itself.
_WORKERS = 8
DISCARDED_HINT = "it was taken out of the cache: run again, without a mirror if it comes back"
_SHA1 = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


def fetch_sources(sources: Sources, on_bytes: OnBytes | None = None) -> None:
    """Download every file of the models that is not in the cache yet.

    Each comes from the commit that its model was resolved to, and an interrupted download goes on
    where it ended. Sizes and digests are compared, which the client does not do.

    Args:
        sources: From `resolve_sources(recipe, download=False)`.
        on_bytes: For progress.

    Raises:
        OfflineError: the Hub cannot be reached.
        IntegrityError: what came is not what the Hub states; it is taken out of the cache again.
        NoSpaceError: the cache's disk is too small.
    """
    # The target last, as it is resolved.
    models = (*sources.models[1:], sources.target)
    absent = _absent(file for model in models for file in model.files)
    _check_space(absent)
    bar = _bar_class(sum(file.size_bytes for file in absent), on_bytes) if absent else None
    for model in models:
        with naming(model.role):
            _fetch(model.files, bar)


def fetch_files(files: Sequence[SourceFile]) -> None:
    """Download those of a model's files that are not in the cache yet."""
    absent = _absent(files)
    _check_space(absent)
    _fetch(files, _bar_class(0, None) if absent else None)


def _fetch(files: Sequence[SourceFile], bar: Any) -> None:
    absent = _absent(files)
    small = [file for file in absent if not _is_large(file)]
    if small:
        with ThreadPoolExecutor(_WORKERS) as pool:
            list(pool.map(lambda file: _download(file, bar), small))
    # Weights last: a snapshot that has them has everything that goes with them.
    for file in sorted(filter(_is_large, absent), key=lambda file: file.name.endswith(_WEIGHTS)):
        _download(file, bar)
    _write_references(file.hub for file in files if file.hub is not None)


def _absent(files: Iterable[SourceFile]) -> list[SourceFile]:
    return list({file.path: file for file in files if not file.is_present}.values())


def discard(file: SourceFile) -> None:
    """Take a file out of the cache whose content is not what the Hub states."""
    if file.hub is not None:
        file.path.resolve().unlink(missing_ok=True)
        file.path.unlink(missing_ok=True)


def _is_large(file: SourceFile) -> bool:
    return file.size_bytes > _SMALL_BYTES or file.name.endswith(_WEIGHTS)


def _download(file: SourceFile, bar: Any) -> None:
    from huggingface_hub import hf_hub_download

    hub = file.hub
    assert hub is not None
    with hub_errors(hub.repo, hub.commit):
        path = Path(
            retried(
                lambda: hf_hub_download(hub.repo, hub.name, revision=hub.commit, tqdm_class=bar)
            )
        )
    if path != file.path:
        raise SourceError(f"{hub.repo}: {file.name} was stored at an unexpected place")
    _check(file)


def _check(file: SourceFile) -> None:
    """Compare a fresh download with the listing of its repository, and with its ETag.

    The client names what it stores after the ETag, whatever that says: the SHA-256 of a large file,
    and Git's id of a small one.
    """
    from huggingface_hub.utils.sha import git_hash

    assert file.hub is not None
    etag = file.path.resolve().name if file.path.is_symlink() else ""
    sha256 = {file.hub.sha256, etag if _SHA256.fullmatch(etag) else ""} - {""}
    blob_id = {file.hub.blob_id, etag if _SHA1.fullmatch(etag) and not sha256 else ""} - {""}
    size = file.path.stat().st_size
    what = ""
    if size != file.size_bytes:
        what = f"{size:,} bytes, and {file.size_bytes:,} are expected"
    elif sha256 and {actual := _sha256(file.path)} != sha256:
        what = f"SHA-256 {actual}, and {(sha256 - {actual}).pop()} is expected"
    elif blob_id and {actual := git_hash(file.path.read_bytes())} != blob_id:
        what = f"Git id {actual}, and {(blob_id - {actual}).pop()} is expected"
    if what:
        discard(file)
        raise IntegrityError(f"{file.name} has {what}", hint=DISCARDED_HINT)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_space(files: Sequence[SourceFile]) -> None:
    if not files:
        return
    needed = sum(file.size_bytes for file in files)
    folder = files[0].path
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise NoSpaceError(
            f"the models to download have {needed:,} bytes, and {free:,} are free in {folder}",
            hint="make room, or set HF_HOME to a folder on a larger disk",
        )


def _write_references(files: Iterable[HubFile]) -> None:
    """Write down what each branch stood for, for offline runs to look up.

    The client does so only when asked by the branch's name, which could have moved by now.
    """
    from huggingface_hub import constants

    for repo, revision, commit in sorted({(f.repo, f.revision, f.commit) for f in files}):
        if revision == commit or constants.HF_HUB_OFFLINE:
            continue
        folder = Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}" / "refs"
        with hub_errors(repo, commit):
            path = folder / revision
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(commit, encoding="utf-8")


def _bar_class(total: int, on_bytes: OnBytes | None) -> Any:
    """Return a stand-in for tqdm that adds up what the client reports, and prints nothing."""
    from tqdm import tqdm

    done = 0

    def report(count: int) -> None:
        # A retry may take bytes back.
        nonlocal done
        done += count
        if on_bytes is not None:
            on_bytes(min(done, total), total)

    class Bar(tqdm):  # type: ignore[type-arg]
        """What the client takes for a bar."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            kwargs["disable"] = True
            # Every class of bars gets this argument from the client.
            kwargs.pop("name", None)
            super().__init__(*args, **kwargs)
            if initial := kwargs.get("initial"):
                report(int(initial))

        def update(self, n: float | None = 1) -> bool | None:
            report(int(n or 0))
            return None

        def update_transfer(self, n: float | None = 1) -> None:
            # Xet reports what came and what was written; the latter is enough.
            pass

    return Bar
