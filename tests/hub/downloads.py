"""The requests that read: facts about repositories, and the bytes of their files."""

from __future__ import annotations

import re
import time
from typing import TYPE_CHECKING, NamedTuple

from tests.hub.messages import Answer, Piece, RefusedError, Request
from tests.hub.repositories import Commit, Entry, Repository, facts_of

if TYPE_CHECKING:
    from tests.hub.server import HubServer


class Download(NamedTuple):
    """One file as it was asked for."""

    repo: str
    revision: str
    name: str


def harnesses(hub: HubServer, request: Request) -> Answer:
    """List the programs whose names clients add to theirs: none; each new cache asks once."""
    return Answer.of({"standardEnvVars": [], "harnesses": {}})


def whoami(hub: HubServer, request: Request) -> Answer:
    """Say whose token it is."""
    scope = hub.scope(request)
    if not request.token or not scope:
        raise RefusedError(401, "Invalid username or password.")
    token = {"displayName": "test", "role": scope}
    return Answer.of({"type": "user", "name": hub.user, "orgs": [], "auth": {"accessToken": token}})


def info(hub: HubServer, request: Request, repo: str, revision: str = "main") -> Answer:
    """State the facts of a repository at a revision."""
    repository, commit = hub.snapshot(request, repo, revision)
    siblings: list[dict[str, object]] = []
    for name, entry in commit.files.items():
        sibling: dict[str, object] = {"rfilename": name}
        if request.has("blobs"):
            sibling |= _file_facts(hub, repo, name, entry, digest="sha256", blob="blobId")
        siblings.append(sibling)
    siblings += [{"rfilename": name} for name in hub.listed.get(repo, [])]
    return Answer.of(
        {
            "_id": commit.id[:24],
            "id": repo,
            "modelId": repo,
            "author": repo.partition("/")[0],
            "sha": commit.id,
            "lastModified": commit.stamp,
            "createdAt": repository.history(commit)[-1].stamp,
            "private": repository.private,
            # A gated repository shows its list of files to everybody.
            "gated": "manual" if repo in hub.gated else False,
            "disabled": False,
            "tags": [],
            "downloads": 0,
            "likes": 0,
            "siblings": siblings,
        }
    )


def tree(
    hub: HubServer, request: Request, repo: str, revision: str, folder: str | None = None
) -> Answer:
    """List a folder, in one page."""
    repository, commit = hub.snapshot(request, repo, revision)
    files = commit.files
    start = f"{folder}/" if folder else ""
    names = {name for name in files if name.startswith(start)}
    if folder and not names:
        raise RefusedError(404, f"{folder} does not exist", "EntryNotFound")
    # Folders are entries of their own.
    names |= {
        name[: match.start()]
        for name in names
        for match in re.finditer("/", name)
        if match.start() >= len(start)
    }
    if not request.has("recursive"):
        names = {name for name in names if "/" not in name[len(start) :]}
    expand = request.has("expand")
    return Answer.of([_tree_entry(hub, repository, commit, n, expand) for n in sorted(names)])


def paths_info(hub: HubServer, request: Request, repo: str, revision: str) -> Answer:
    """State the facts of those of some paths that exist."""
    repository, commit = hub.snapshot(request, repo, revision)
    form = request.form()
    expand = form.get("expand", [""])[-1].lower() == "true"
    found = [
        name
        for name in form.get("paths", [])
        if any(f"{file}/".startswith(f"{name}/") for file in commit.files)
    ]
    return Answer.of([_tree_entry(hub, repository, commit, name, expand) for name in found])


def refs(hub: HubServer, request: Request, repo: str) -> Answer:
    """List branches, tags and pull requests."""
    repository = hub.reach(request, repo)
    kinds = {"branches": "refs/heads/", "tags": "refs/tags/", "pullRequests": "refs/pr/"}
    listed = {
        kind: [
            {"name": ref.removeprefix(start), "ref": ref, "targetCommit": commit}
            for ref, commit in repository.refs.items()
            if ref.startswith(start)
        ]
        for kind, start in kinds.items()
    }
    return Answer.of({**listed, "converts": []})


def commits(hub: HubServer, request: Request, repo: str, revision: str) -> Answer:
    """List the history of a revision, in one page."""
    repository, commit = hub.snapshot(request, repo, revision)
    return Answer.of(
        [
            {
                "id": one.id,
                "title": one.title,
                "message": one.message,
                "authors": [{"user": hub.user}],
                "date": one.stamp,
            }
            for one in repository.history(commit)
        ]
    )


def discussion(hub: HubServer, request: Request, repo: str, number: str) -> Answer:
    """Describe a pull request."""
    repository = hub.reach(request, repo)
    pull = next((pull for pull in repository.pulls if str(pull.number) == number), None)
    if not pull:
        raise RefusedError(404, "Discussion not found")
    return Answer.of(
        {
            "num": pull.number,
            "title": pull.title,
            "author": {"name": hub.user},
            "createdAt": pull.date,
            "status": "draft",
            "repo": {"name": repo, "type": "model"},
            "isPullRequest": True,
            "events": [],
            "changes": {"base": "refs/heads/main"},
            "filesWithConflicts": [],
        }
    )


def resolve(hub: HubServer, request: Request, repo: str, revision: str, name: str) -> Answer:
    """Send a file, or the part of it that a range names."""
    _, commit = hub.snapshot(request, repo, revision)
    headers = {"X-Repo-Commit": commit.id}
    if repo in hub.gated:
        status = 403 if request.token else 401
        raise RefusedError(status, f"Access to model {repo} is restricted.", "GatedRepo", headers)
    if (repo, name) in hub.refused:
        return Answer(hub.refused[repo, name], headers)
    entry = commit.files.get(name)
    if not entry:
        raise RefusedError(404, "Entry not found", "EntryNotFound", headers)
    facts = facts_of(entry)
    headers |= {"ETag": f'"{facts.blob}"', "Accept-Ranges": "bytes"}
    if entry.large:
        linked = {"X-Linked-Etag": f'"{facts.sha256}"', "X-Linked-Size": str(facts.size)}
        headers |= linked
        if hub.xet_url:
            token = f"{hub.url}/api/models/{repo}/xet-read-token/{revision}"
            headers |= {"X-Xet-Hash": facts.sha256, "X-Xet-Refresh-Route": token}
    if request.method == "GET":
        hub.downloads.append(Download(repo, revision, name))
    start, count = _wanted(request.headers.get("Range", ""), facts.size, headers)
    answer = Answer(200, headers, Piece(repo, name, entry.path, start, count))
    if "Content-Range" in headers:
        answer.status = 206
    elif request.method == "GET" and (repo, name) in hub.cut:
        hub.cut.remove((repo, name))
        answer.share = 0.5
    return answer


def xet_token(hub: HubServer, request: Request, repo: str, access: str, revision: str) -> Answer:
    """Name the store for content in chunks, and a token for it."""
    hub.reach(request, repo, write=access == "write")
    url = hub.xet_url or f"local://{hub.xet_store}"
    expires = int(time.time()) + 3600
    # The client reads the headers, and the library below it the body.
    return Answer.of(
        {"accessToken": "token", "exp": expires, "casUrl": url},
        X_Xet_Cas_Url=url,
        X_Xet_Access_Token="token",
        X_Xet_Token_Expiration=str(expires),
    )


def _wanted(asked: str, size: int, headers: dict[str, str]) -> tuple[int, int]:
    """Return the first byte and the number of bytes that a Range header asks for."""
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", asked)
    if not match or not any(match.groups()):
        return 0, size
    first, last = match.groups()
    if first:
        start, end = int(first), min(int(last) + 1 if last else size, size)
    else:
        start, end = max(size - int(last), 0), size
    if start >= end:
        unsatisfied = {**headers, "Content-Range": f"bytes */{size}"}
        raise RefusedError(416, "Range Not Satisfiable", headers=unsatisfied)
    headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
    return start, end - start


def _tree_entry(
    hub: HubServer, repository: Repository, commit: Commit, name: str, expand: bool
) -> dict[str, object]:
    if entry := commit.files.get(name):
        stated = _file_facts(hub, repository.id, name, entry, digest="oid", blob="oid")
        found = {"type": "file", "path": name, **stated}
        if expand:
            scans = {"avScan": None, "pickleImportScan": None}
            found["securityFileStatus"] = {"status": "unscanned", **scans}
    else:
        found = {"type": "directory", "path": name, "oid": commit.id, "size": 0}
    if expand:
        last = repository.last_change(commit, name)
        found["lastCommit"] = {"id": last.id, "title": last.title, "date": last.stamp}
    return found


def _file_facts(
    hub: HubServer, repo: str, name: str, entry: Entry, *, digest: str, blob: str
) -> dict[str, object]:
    facts = facts_of(entry)
    found: dict[str, object] = {blob: facts.blob, "size": facts.size}
    if entry.large:
        sha256 = hub.wrong_sha256.get((repo, name), facts.sha256)
        found["lfs"] = {digest: sha256, "size": facts.size, "pointerSize": facts.pointer_size}
    return found
