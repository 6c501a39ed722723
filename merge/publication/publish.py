"""The upload itself: to the commit that was seen, and compared with what was meant."""

from __future__ import annotations

import glob
import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merge._version import __version__
from merge.card.render import CARD_NAME
from merge.errors import MergeError, PublishError
from merge.publication.model import PreparedUpload, Published
from merge.publication.prepare import listed, prepare
from merge.writer.file import write_atomically

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_SHOWN = 5
_TOKEN_HINT = "a token that may write comes from HF_TOKEN or `hf auth login`"
_NO_ACCESS = ("this account may not write to {repo}: {said}", _TOKEN_HINT)
# HTTP status to what it means, and what to do about it.
_REFUSALS = {
    401: _NO_ACCESS,
    403: _NO_ACCESS,
    409: ("{repo} is being changed by somebody else: {said}", "publish again later"),
    412: (
        "{repo} changed while it was published: {said}",
        "look at what the other commit did, then publish again",
    ),
    429: ("the Hub asks for a pause: {said}", "publish again later"),
}
_REFUSED = (
    "the Hub refused {repo} ({status}): {said}",
    "publish again later; what arrived already is not sent twice",
)


def publish(
    folder: str | Path,
    repo_id: str,
    *,
    public: bool = False,
    create_pr: bool = False,
    license: str | None = None,
    only: str | None = None,
    on_bytes: Callable[[int, int], None] | None = None,
) -> Published:
    """Upload an export to the Hub.

    The token comes from HF_TOKEN or the Hub client's own login, and nowhere else. The card is
    written into the folder as it is published.

    Args:
        folder: An output of `run` that was verified and passed.
        repo_id: `org/name`; created when it is not there.
        public: A new repository is visible to all, or an existing public one is meant.
        create_pr: Open a pull request instead of committing to `main`.
        license: As for `prepare`.
        only: As for `prepare`.
        on_bytes: As for `prepare`.

    Raises:
        PublishError: the export must not be published as it is, the Hub refuses it, its branch
            moved meanwhile, or what arrived is not what was sent.
    """
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:
        raise PublishError("HF_HUB_OFFLINE forbids to publish", hint="unset it, or add --dry-run")
    prepared = prepare(folder, repo_id, license=license, only=only, on_bytes=on_bytes)
    api = HfApi(library_name="instruct-merge", library_version=__version__)
    with _publish_errors(repo_id):
        parent = _open_repository(api, repo_id, public)
        _write_card(prepared)
        commit, url = _send(api, prepared, parent, create_pr)
        others = _check_arrival(api, prepared, commit)
    notes = prepared.notes
    if others:
        shown = listed(others, _SHOWN)
        notes = (*notes, f"The repository also holds files that are not of this merge: {shown}.")
    return Published(repo_id, url, commit, notes)


def _send(api: HfApi, prepared: PreparedUpload, parent: str, create_pr: bool) -> tuple[str, str]:
    """Upload the files onto a commit; return the new commit and its address."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        info = api.upload_folder(
            repo_id=prepared.repo_id,
            folder_path=prepared.folder,
            # Names are exact; brackets in them are no patterns.
            allow_patterns=[glob.escape(name) for name in prepared.sizes],
            commit_message=f"Upload the merge {prepared.title}",
            parent_commit=parent,
            create_pr=create_pr,
        )
    except HfHubHTTPError as error:
        if error.response is None or error.response.status_code != 412 or create_pr:
            raise
        # The client sends a commit again whose answer was lost: then it is our own that moved the
        # branch.
        head = str(api.model_info(prepared.repo_id).sha)
        try:
            _check_arrival(api, prepared, head)
        except PublishError:
            raise error from None
        return head, f"{api.endpoint}/{prepared.repo_id}/commit/{head}"
    return str(info.oid), str(info.pr_url if create_pr else info.commit_url)


def _open_repository(api: HfApi, repo_id: str, public: bool) -> str:
    """Create the repository if need be, check who can see it, and return its latest commit."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        info = api.model_info(repo_id)
    except RepositoryNotFoundError:
        api.create_repo(repo_id, private=not public, exist_ok=True)
        # Another run may have made it meanwhile, with another visibility.
        info = api.model_info(repo_id)
    if not info.private and not public:
        raise PublishError(
            f"{repo_id} is public already, and --public is not given",
            hint="add --public, or choose another --repo-id; the repository stays as it is",
        )
    if info.private and public:
        raise PublishError(
            f"{repo_id} is private already, and --public would not change that",
            hint="change its visibility in its settings on the Hub, or leave --public out",
        )
    return str(info.sha)


def _write_card(prepared: PreparedUpload) -> None:
    path = prepared.folder / CARD_NAME
    if path.is_symlink():
        # Of a download in the Hub's cache, whose blobs are shared.
        path.unlink()
    write_atomically(path, prepared.card.encode())


def _check_arrival(api: HfApi, prepared: PreparedUpload, commit: str) -> list[str]:
    """Compare the files of the commit with ours; return the names that are not ours."""
    found: dict[str, Any] = {
        entry.path: entry
        for entry in api.list_repo_tree(prepared.repo_id, recursive=True, revision=commit)
        if hasattr(entry, "blob_id")
    }
    wrong = []
    for name, size in prepared.sizes.items():
        entry = found.pop(name, None)
        if entry is None:
            wrong.append(f"{name} is missing")
        elif entry.size != size:
            wrong.append(f"{name} has {entry.size:,} bytes, not {size:,}")
        elif entry.lfs is not None:
            if name in prepared.sha256 and entry.lfs.sha256 != prepared.sha256[name]:
                wrong.append(f"{name} has SHA-256 {entry.lfs.sha256}")
        elif entry.blob_id != _git_blob_id(prepared.folder / name):
            wrong.append(f"{name} has other bytes")
    if wrong:
        raise PublishError(
            f"what arrived at {prepared.repo_id} is not what was sent: {'; '.join(wrong)}",
            hint="somebody else wrote to it at the same time? publish again",
        )
    return sorted(name for name in found if name != ".gitattributes")


def _git_blob_id(path: Path) -> str:
    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


@contextmanager
def _publish_errors(repo_id: str) -> Iterator[None]:
    """Translate what the Hub's client raises.

    Raises:
        PublishError: with what to do about it.
    """
    import httpx2
    from huggingface_hub import errors as hub

    try:
        yield
    except MergeError:
        raise
    except hub.HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        said = error.server_message or str(error).splitlines()[0]
        raise _refusal(repo_id, status, said) from error
    except hub.LocalTokenNotFoundError as error:
        raise PublishError(
            f"{repo_id} cannot be written without a token", hint=_TOKEN_HINT
        ) from error
    except ConnectionError as error:
        # What the Xet client raises when it is given no token to write with.
        if "403" in str(error) or "401" in str(error):
            raise _refusal(repo_id, 403, str(error)) from error
        raise _unreachable(repo_id, error) from error
    except (httpx2.HTTPError, TimeoutError, RuntimeError) as error:
        raise _unreachable(repo_id, error) from error
    except ValueError as error:
        raise PublishError(f"the Hub's client refuses {repo_id}: {error}") from error
    except OSError as error:
        raise PublishError(f"publishing {repo_id} failed: {error}") from error


def _unreachable(repo_id: str, error: Exception) -> PublishError:
    return PublishError(
        f"the Hub cannot be reached for {repo_id}: {error}",
        hint="check the network and publish again; what arrived already is not sent twice",
    )


def _refusal(repo_id: str, status: int, said: str) -> PublishError:
    text, hint = _REFUSALS.get(status, _REFUSED)
    return PublishError(text.format(repo=repo_id, status=status, said=said), hint=hint)
