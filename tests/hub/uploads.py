"""The requests that write: repositories, large files, commits and pull requests."""

from __future__ import annotations

import base64
import json
import re
from typing import TYPE_CHECKING, Any

import yaml

from tests.hub import xet
from tests.hub.messages import Answer, RefusedError, Request
from tests.hub.repositories import Commit, Entry, Repository, facts_of, is_large

if TYPE_CHECKING:
    from tests.hub.server import HubServer

_MOVED = "A commit has happened since. Please refresh and try again."


def create(hub: HubServer, request: Request) -> Answer:
    """Make a repository."""
    asked = request.json()
    hub.must_write(request)
    repo = f"{asked.get('organization') or hub.user}/{asked['name']}"
    url = f"{hub.url}/{repo}"
    with hub.repositories.lock:
        if hub.repositories.get(repo):
            raise RefusedError(409, "You already created this model repo", url=url)
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        made = hub.repositories.create(repo, private=private)
    return Answer.of({"url": url, "name": repo, "id": made.id})


def branch(hub: HubServer, request: Request, repo: str, name: str) -> Answer:
    """Make a branch."""
    start = (request.json() or {}).get("startingPoint") or "main"
    repository, commit = hub.snapshot(request, repo, start, write=True)
    if f"refs/heads/{name}" in repository.refs:
        raise RefusedError(409, "Reference already exists")
    repository.refs[f"refs/heads/{name}"] = commit.id
    return Answer.of({})


def validate_yaml(hub: HubServer, request: Request) -> Answer:
    """Check the head of a model card, as far as its syntax goes."""
    errors, warnings = _check_card(request.json()["content"])
    if errors:
        raise RefusedError(400, errors[0], errors=_messages(errors), warnings=[])
    return Answer.of({"errors": [], "warnings": _messages(warnings)})


def preupload(hub: HubServer, request: Request, repo: str, revision: str) -> Answer:
    """Say how each file is to come in, and what its path holds at present."""
    asked = request.json()["files"]
    _, commit = hub.snapshot(request, repo, revision, write=True)
    present = commit.files
    return Answer.of(
        {
            "files": [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if is_large(file["path"], file["size"]) else "regular",
                    "shouldIgnore": False,
                    "oid": _stated_id(present.get(file["path"])),
                }
                for file in asked
            ]
        }
    )


def lfs_batch(hub: HubServer, request: Request, repo: str) -> Answer:
    """Say where to put the large files that are not there yet."""
    asked = request.json()
    hub.reach(request, repo, write=True)
    objects = []
    for wanted in asked["objects"]:
        place = f"{hub.url}/{repo}.git/lfs/{wanted['oid']}"
        found = {"oid": wanted["oid"], "size": wanted["size"]}
        if not hub.repositories.held(repo, wanted["oid"]):
            found["actions"] = {"upload": {"href": place}, "verify": {"href": f"{place}/verify"}}
        objects.append(found)
    return Answer.of({"transfer": "basic", "objects": objects})


def lfs_put(hub: HubServer, request: Request, repo: str, oid: str) -> Answer:
    """Take the bytes of a large file; the address alone is the permission."""
    kept = hub.repositories.keep(repo, request.chunks)
    if kept.name != oid:
        raise RefusedError(400, f"The bytes have the digest {kept.name}, not {oid}")
    return Answer(200, {"ETag": f'"{oid}"'})


def lfs_verify(hub: HubServer, request: Request, repo: str, oid: str) -> Answer:
    """Confirm that a large file has come in as announced."""
    stated = request.json()
    hub.reach(request, repo, write=True)
    kept = hub.repositories.held(repo, oid)
    if not kept or kept.stat().st_size != stated["size"]:
        raise RefusedError(422, "The object is not there, or has another size")
    return Answer.of({})


def open_discussion(hub: HubServer, request: Request, repo: str) -> Answer:
    """Open a pull request without commits."""
    asked = request.json()
    _, main = hub.snapshot(request, repo, "main", write=True)
    repository = hub.reach(request, repo)
    with hub.repositories.lock:
        pull = repository.open_pull(asked["title"], main.id)
    return Answer.of({"num": pull.number, "url": _pull_url(hub, repo, pull.number)})


def commit(hub: HubServer, request: Request, repo: str, revision: str) -> Answer:
    """Carry out one commit, all of it or nothing."""
    lines = [json.loads(line) for line in request.body().splitlines() if line.strip()]
    header = next(line["value"] for line in lines if line["key"] == "header")
    repository, head = hub.snapshot(request, repo, revision, write=True)
    expected = header.get("parentCommit") or ""
    opens = request.has("create_pr")
    if not opens and not repository.is_movable(revision):
        raise RefusedError(404, f"{revision} is no branch", "RevisionNotFound")
    _fetch_chunked(hub, repo, lines)
    with hub.repositories.lock:
        head = repository.find(revision) or head
        base = _find_parent(repository, head, expected, opens=opens)
        files = _carry_out(hub, repo, base, lines)
        ref = repository.ref(revision)
        answer: dict[str, object] = {"success": True, "hookOutput": ""}
        if opens:
            pull = repository.open_pull(header["summary"], base.id)
            ref = f"refs/pr/{pull.number}"
            answer["pullRequestUrl"] = _pull_url(hub, repo, pull.number)
        made = repository.add(ref, files, header["summary"], header.get("description", ""))
    answer |= {"commitOid": made.id, "commitUrl": f"{hub.url}/{repo}/commit/{made.id}"}
    return Answer.of(answer)


def _find_parent(repository: Repository, head: Commit, expected: str, *, opens: bool) -> Commit:
    """Return the commit that a new one follows, which must be the one that the client knows."""
    if not expected or head.id.startswith(expected):
        return head
    if opens:
        for known in repository.commits.values():
            if known.id.startswith(expected):
                return known
    raise RefusedError(412, _MOVED)


def _carry_out(
    hub: HubServer, repo: str, base: Commit, lines: list[dict[str, Any]]
) -> dict[str, Entry]:
    files = base.files
    for line in lines:
        kind, value = line["key"], line["value"]
        if kind == "header":
            continue
        name = value["path"]
        if kind == "file":
            data = base64.b64decode(value["content"])
            if name == "README.md" and (errors := _check_card(data.decode())[0]):
                raise RefusedError(400, f"Invalid metadata in README.md: {errors[0]}")
            files[name] = Entry(hub.repositories.keep(repo, [data]), large=False)
        elif kind == "lfsFile":
            kept = hub.repositories.held(repo, value["oid"])
            if not kept or kept.stat().st_size != value.get("size", kept.stat().st_size):
                raise RefusedError(400, f"The bytes of {name} have not come in")
            files[name] = Entry(kept, large=True)
        elif kind == "deletedFile":
            if not files.pop(name, None):
                raise RefusedError(404, "A file with this name doesn't exist", "EntryNotFound")
        elif kind == "deletedFolder":
            start = name.rstrip("/") + "/"
            gone = [file for file in files if file.startswith(start)]
            if not gone:
                raise RefusedError(404, "A file with this name doesn't exist", "EntryNotFound")
            for file in gone:
                del files[file]
        else:
            raise RefusedError(400, f"Unknown operation {kind}")
    return files


def _fetch_chunked(hub: HubServer, repo: str, lines: list[dict[str, Any]]) -> None:
    """Fetch the files that came in by way of the store for content in chunks."""
    oids = [line["value"]["oid"] for line in lines if line["key"] == "lfsFile"]
    missing = {oid for oid in oids if not hub.repositories.held(repo, oid)}
    if missing:
        for path in xet.rebuild(hub.xet_store, missing, hub.repositories.folder(repo)):
            hub.chunked.add(path.name)


def _stated_id(entry: Entry | None) -> str | None:
    """Return what the client compares with its own file to leave out what has not changed."""
    if not entry:
        return None
    facts = facts_of(entry)
    return facts.sha256 if entry.large else facts.blob


def _check_card(text: str) -> tuple[list[str], list[str]]:
    """Return the errors and the warnings about the head of a model card."""
    match = re.match(r"---\r?\n(.*?)\r?\n?---\s*(?:\n|$)", text, re.DOTALL)
    if not match or not match[1].strip():
        return [], ["empty or missing yaml metadata in repo card"]
    try:
        head = yaml.safe_load(match[1])
    except yaml.YAMLError as error:
        return [str(error)], []
    return ([] if isinstance(head, dict) else ["the metadata must be a mapping"]), []


def _messages(texts: list[str]) -> list[dict[str, str]]:
    return [{"message": text} for text in texts]


def _pull_url(hub: HubServer, repo: str, number: int) -> str:
    return f"{hub.url}/{repo}/discussions/{number}"
