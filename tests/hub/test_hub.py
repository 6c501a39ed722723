"""The tests' own Hub: whether the real client takes it for one, unharmed and with every fault."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.hub import Fault, HubServer, Transfer

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
FILES = {
    "README.md": b"---\nlicense: mit\n---\n# Model\n",
    "unet/config.json": b'{"in_channels": 8}\n',
    WEIGHTS: bytes(range(256)) * 400,
    "vae/diffusion_pytorch_model.safetensors": b"vae" * 5000,
}

# Reads one expression a line, and writes what it gives and how long the client wanted to wait.
CLIENT = """
import hashlib, json, sys, time
waits = []
time.sleep = waits.append
from huggingface_hub import *
from huggingface_hub.utils import http_backoff

def ranged(repo, name, asked):
    url = hf_hub_url(repo, name)
    reply = http_backoff("GET", url, headers={"Range": asked}, retry_on_status_codes=())
    return [reply.status_code, reply.headers.get("Content-Range"), reply.content.hex()]

def head(repo, name):
    found = get_hf_file_metadata(hf_hub_url(repo, name))
    return [found.commit_hash, found.etag, found.size]

def facts(repo):
    files = model_info(repo, files_metadata=True).siblings
    return {f.rfilename: [f.blob_id, f.size, f.lfs and f.lfs.sha256] for f in files}

def listed(entries):
    return {e.path: getattr(e, "size", None) and [e.blob_id, e.size, e.lfs and e.lfs.sha256]
            for e in entries}

def changes(repo):
    return {e.path: e.last_commit.oid for e in list_repo_tree(repo, recursive=True, expand=True)}

for line in sys.stdin:
    waits.clear()
    try:
        answer = {"value": eval(json.loads(line))}
    except Exception as error:
        kinds = [kind.__name__ for kind in type(error).__mro__]
        status = getattr(getattr(error, "response", None), "status_code", 0)
        answer = {"error": {"kinds": kinds, "status": status, "message": str(error)}}
    print(json.dumps({**answer, "waits": list(waits)}, default=str), flush=True)
"""


class Failure(NamedTuple):
    """What an expression raised: the names of its classes, the Hub's status and the message."""

    kinds: list[str]
    status: int
    message: str


class Client:
    """The real client in a process of its own.

    Attributes:
        waits: The seconds between the tries of the last expression; none of them is waited.
    """

    def __init__(self, hub: HubServer, home: Path, *, xet: bool = False) -> None:
        self.waits: list[float] = []
        self._log = (home.parent / f"{home.name}.log").open("w")
        self._child = subprocess.Popen(
            [sys.executable, "-c", CLIENT, hub.url],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=hub.environment(home, xet=xet),
        )

    def _ask(self, expression: str) -> dict[str, Any]:
        assert self._child.stdin
        assert self._child.stdout
        self._child.stdin.write(json.dumps(expression) + "\n")
        self._child.stdin.flush()
        answer: dict[str, Any] = json.loads(self._child.stdout.readline())
        self.waits = answer["waits"]
        return answer

    def __call__(self, expression: str) -> Any:
        """Return what an expression gives."""
        answer = self._ask(expression)
        assert "error" not in answer, answer
        return answer["value"]

    def failing(self, expression: str) -> Failure:
        """Return what an expression raises."""
        return Failure(**self._ask(expression)["error"])

    def download(self, repo: str, folder: Path, **options: object) -> dict[str, bytes]:
        """Download a repository with an empty cache, and return its files."""
        found = self(f"snapshot_download({repo!r}, cache_dir={str(folder)!r}, **{options!r})")
        return read(Path(found))

    def close(self) -> None:
        assert self._child.stdin
        assert self._child.stdout
        self._child.stdin.close()
        self._child.wait(timeout=60)
        self._child.stdout.close()
        self._log.close()


def read(folder: Path) -> dict[str, bytes]:
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubServer]:
    root = tmp_path_factory.mktemp("hub")
    write(root / "org/model", FILES)
    with HubServer(root) as server:
        yield server


@pytest.fixture
def hub(started: HubServer) -> Iterator[HubServer]:
    """The one server of all tests, whose address the clients' processes know."""
    for record in (started.downloads, started.transfers, started.requests):
        record.clear()
    yield started
    left = [fault for fault in started.faults if fault.left]
    started.faults.clear()
    started.tokens.clear()
    started.gated.clear()
    assert not left


@pytest.fixture(scope="module")
def plain(started: HubServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    client = Client(started, tmp_path_factory.mktemp("plain") / "home")
    yield client
    client.close()


@pytest.fixture(scope="module")
def xet(started: HubServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    client = Client(started, tmp_path_factory.mktemp("xet") / "home", xet=True)
    yield client
    client.close()


@pytest.fixture(params=["plain", "xet"])
def client(request: pytest.FixtureRequest) -> Client:
    """A client of each kind."""
    found: Client = request.getfixturevalue(request.param)
    return found


def made(hub: HubServer, client: Client, folder: Path, **options: object) -> str:
    """Make a repository of a test's own and upload files to it that no other has."""
    repo = f"user/{folder.parent.name}"
    create(client, repo, **options)
    client(upload(repo, write(folder, files_of(repo))))
    return repo


def files_of(repo: str) -> dict[str, bytes]:
    own = {name: repo.encode() + data for name, data in FILES.items() if name.endswith("tensors")}
    return {**FILES, **own}


def create(client: Client, repo: str, **options: object) -> None:
    client(f"create_repo({repo!r}, **{options!r})")


def upload(repo: str, folder: Path, **options: object) -> str:
    return f"upload_folder(repo_id={repo!r}, folder_path={str(folder)!r}, **{options!r}).oid"


def counted(hub: HubServer, method: str, part: str) -> int:
    return sum(asked == method and part in path for asked, path in hub.requests)


# Downloads -------------------------------------------------------------------------------------


def test_a_placed_folder_is_downloaded(hub: HubServer, plain: Client, tmp_path: Path) -> None:
    assert plain.download("org/model", tmp_path) == FILES
    assert hub.names("org/model") == FILES.keys()
    sent = {transfer.name: transfer for transfer in hub.transfers}
    assert sent[WEIGHTS] == Transfer("org/model", WEIGHTS, 0, len(FILES[WEIGHTS]))
    assert plain.waits == []


def test_only_the_bytes_of_a_range_are_sent(hub: HubServer, plain: Client) -> None:
    data, size = FILES[WEIGHTS], len(FILES[WEIGHTS])
    for asked, start, end in [
        ("bytes=0-7", 0, 8),
        ("bytes=100-", 100, size),
        ("bytes=-20", size - 20, size),
        (f"bytes={size - 5}-{size + 5}", size - 5, size),
    ]:
        status, content_range, found = plain(f"ranged('org/model', {WEIGHTS!r}, {asked!r})")
        assert (status, content_range) == (206, f"bytes {start}-{end - 1}/{size}")
        assert bytes.fromhex(found) == data[start:end]
        assert hub.transfers.pop() == ("org/model", WEIGHTS, start, end - start)
    status, content_range, _ = plain(f"ranged('org/model', {WEIGHTS!r}, 'bytes={size}-')")
    assert (status, content_range) == (416, f"bytes */{size}")
    assert hub.transfers == []


def test_stated_ids_are_those_that_git_gives(hub: HubServer, plain: Client) -> None:
    data = FILES[WEIGHTS]
    digest = hashlib.sha256(data).hexdigest()
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{digest}\nsize {len(data)}\n"
    small, large = "unet/config.json", WEIGHTS
    assert plain(f"head('org/model', {small!r})") == [
        *(hub.commit("org/model"), git_id(FILES[small]), len(FILES[small]))
    ]
    assert plain(f"head('org/model', {large!r})") == [hub.commit("org/model"), digest, len(data)]
    stated = plain("facts('org/model')")
    assert stated["README.md"] == [git_id(FILES["README.md"]), 29, None]
    assert stated[large] == [git_id(pointer.encode()), len(data), digest]
    # The client asks for these in three ways.
    assert plain("listed(list_repo_tree('org/model', recursive=True))") == {
        **stated,
        "unet": None,
        "vae": None,
    }
    assert plain("listed(get_paths_info('org/model', ['unet', 'README.md', 'none']))") == {
        "unet": None,
        "README.md": stated["README.md"],
    }


def git_id(data: bytes) -> str:
    words = ["git", "hash-object", "--stdin"]
    return subprocess.run(words, input=data, capture_output=True).stdout.decode().strip()


def test_a_branch_moves_and_a_tag_stays(hub: HubServer, plain: Client, tmp_path: Path) -> None:
    write(hub.root / "org/moving", FILES)
    first = hub.commit("org/moving", "v1")
    second = hub.move("org/moving", write(tmp_path / "next", {"README.md": b"next"}))
    assert hub.commit("org/moving") == second != first
    assert plain.download("org/moving", tmp_path / "main") == {"README.md": b"next"}
    assert plain.download("org/moving", tmp_path / "v1", revision="v1") == FILES
    assert plain.download("org/moving", tmp_path / "id", revision=first) == FILES
    assert plain("[one.commit_id for one in list_repo_commits('org/moving')]") == [second, first]
    assert plain("list_repo_refs('org/moving').tags[0].target_commit") == first
    assert plain("changes('org/moving')") == {"README.md": second}
    assert plain.failing("model_info('org/moving', revision='v9')").kinds[0] == (
        "RevisionNotFoundError"
    )
    assert plain.failing("hf_hub_download('org/moving', 'none')").kinds[0] == (
        "RemoteEntryNotFoundError"
    )


# Uploads ---------------------------------------------------------------------------------------


def test_what_is_uploaded_is_downloaded(
    hub: HubServer, client: Client, plain: Client, tmp_path: Path
) -> None:
    repo = made(hub, client, tmp_path / "folder")
    assert counted(hub, "POST", "/commit/main") == 1
    # Twice without Xet: a folder's upload is also a commit's there, and each checks the card.
    assert counted(hub, "POST", "validate-yaml") == (2 if client is plain else 1)
    found = plain.download(repo, tmp_path / "cache")
    assert found.pop(".gitattributes").startswith(b"*.safetensors filter=lfs")
    assert found == files_of(repo)
    digests = {hashlib.sha256(data).hexdigest() for data in found.values()}
    assert len(digests & hub.chunked) == (0 if client is plain else 2)
    # The same again is no commit.
    before = hub.commit(repo)
    assert client(upload(repo, tmp_path / "folder")) == before
    assert counted(hub, "POST", "/commit/main") == 1


def test_a_folder_of_many_files_is_several_commits_only_with_xet(
    hub: HubServer, client: Client, plain: Client, tmp_path: Path
) -> None:
    repo = f"user/{tmp_path.name}"
    create(client, repo)
    many = {f"{n}.bin" if n % 50 == 0 else f"{n}.txt": f"{repo} {n}".encode() for n in range(300)}
    client(upload(repo, write(tmp_path / "many", many), commit_message="Many"))
    titles = ["Many"] if client is plain else ["Many (part 2)", "Many"]
    found = client(f"[one.title for one in list_repo_commits({repo!r})]")
    assert found == [*titles, "initial commit"]
    assert {**many, ".gitattributes": b""} == {**hub.read(repo), ".gitattributes": b""}


def test_files_are_replaced_and_deleted(hub: HubServer, client: Client, tmp_path: Path) -> None:
    repo = made(hub, client, tmp_path / "folder")
    folder = write(tmp_path / "next", {"README.md": b"---\nlicense: mit\n---\nnext"})
    client(upload(repo, folder, delete_patterns="unet/*"))
    left = hub.read(repo)
    assert left.keys() == {".gitattributes", "README.md", "vae/diffusion_pytorch_model.safetensors"}
    assert left["README.md"].endswith(b"next")
    assert client.failing(f"delete_file('none.txt', {repo!r})").status == 404
    client(f"delete_folder('vae', {repo!r})")
    assert hub.read(repo).keys() == {".gitattributes", "README.md"}


def test_a_commit_on_a_branch_that_has_moved_is_refused(
    hub: HubServer, client: Client, tmp_path: Path
) -> None:
    repo = made(hub, client, tmp_path / "folder")
    known = hub.commit(repo)
    folder = write(tmp_path / "next", {"new.txt": b"new"})
    assert client(upload(repo, folder, parent_commit=known)) == hub.commit(repo) != known
    moved = hub.move(repo, write(tmp_path / "other", {"other.txt": b"other"}))
    failure = client.failing(upload(repo, folder, parent_commit=known))
    assert (failure.kinds[0], failure.status) == ("HfHubHTTPError", 412)
    assert "A commit has happened since" in failure.message
    assert (hub.commit(repo), hub.read(repo)) == (moved, {"other.txt": b"other"})


def test_a_pull_request_leaves_the_branch_alone(
    hub: HubServer, client: Client, plain: Client, tmp_path: Path
) -> None:
    repo = made(hub, client, tmp_path / "folder")
    main = hub.commit(repo)
    folder = write(tmp_path / "next", {"new.bin": tmp_path.name.encode()})
    made_by = upload(repo, folder, create_pr=True).removesuffix(".oid")
    expression = f"(lambda found: [found.oid, found.pr_url, found.pr_revision])({made_by})"
    oid, url, revision = client(expression)
    assert (url, revision) == (f"{hub.url}/{repo}/discussions/1", "refs/pr/1")
    assert hub.commit(repo) == main
    assert hub.commit(repo, "refs/pr/1") == oid
    # With Xet the request is opened first, and the commit made on it.
    assert counted(hub, "POST", "/discussions") == (0 if client is plain else 1)
    expected = {**hub.read(repo), "new.bin": tmp_path.name.encode()}
    assert client.download(repo, tmp_path / "cache", revision="refs/pr/1") == expected
    # A second upload can go on with it.
    more = write(tmp_path / "more", {"more.txt": b"more"})
    client(upload(repo, more, revision="refs/pr/1"))
    assert hub.read(repo, "refs/pr/1") == {**expected, "more.txt": b"more"}


def test_other_branches(hub: HubServer, plain: Client, tmp_path: Path) -> None:
    repo = made(hub, plain, tmp_path / "folder")
    main = hub.commit(repo)
    plain(f"create_branch({repo!r}, branch='fp16')")
    assert plain.failing(f"create_branch({repo!r}, branch='fp16')").status == 409
    folder = write(tmp_path / "next", {"new.txt": b"new"})
    oid = plain(upload(repo, folder, revision="fp16"))
    assert (hub.commit(repo, "fp16"), hub.commit(repo)) == (oid, main)
    assert plain.failing(upload(repo, folder, revision="none")).kinds[0] == "RevisionNotFoundError"
    assert plain.failing(upload(repo, folder, revision=main)).kinds[0] == "RevisionNotFoundError"


def test_a_model_card_is_checked(hub: HubServer, plain: Client, tmp_path: Path) -> None:
    repo = made(hub, plain, tmp_path / "folder")
    before = hub.commit(repo)
    folder = write(tmp_path / "next", {"README.md": b"---\nlicense: [mit\n---\n"})
    failure = plain.failing(upload(repo, folder))
    assert failure.kinds[0] == "ValueError"
    assert "Invalid metadata in README.md" in failure.message
    assert hub.commit(repo) == before


def test_a_repository_that_exists(hub: HubServer, plain: Client, tmp_path: Path) -> None:
    repo = made(hub, plain, tmp_path / "folder")
    assert plain.failing(f"create_repo({repo!r})").status == 409
    assert plain(f"create_repo({repo!r}, exist_ok=True)") == f"{hub.url}/{repo}"
    # The client asks again, at once and for ever, after this one message.
    busy = b"Cannot create repo: another conflicting operation is in progress"
    hub.faults.append(Fault("POST", "/repos/create", status=409, body=busy, times=2))
    create(plain, f"{repo}-2")
    assert plain.waits == []


# Tokens ----------------------------------------------------------------------------------------


def test_strangers_neither_write_nor_see_what_is_private(
    hub: HubServer, client: Client, tmp_path: Path
) -> None:
    repo = made(hub, client, tmp_path / "folder", private=True)
    assert client(f"model_info({repo!r}).private")
    before, expected = hub.commit(repo), hub.read(repo)
    hub.tokens = {"hf_reader": "read", "hf_writer": "write"}
    folder = write(tmp_path / "next", {"new.txt": b"new"})
    download = f"hf_hub_download({repo!r}, 'README.md')"
    for words in (f"model_info({repo!r})", download, upload(repo, folder)):
        failure = client.failing(words)
        assert (failure.kinds[0], failure.status) == ("RepositoryNotFoundError", 401)
    assert client.download(repo, tmp_path / "cache", token="hf_reader") == expected
    failure = client.failing(upload(repo, folder, token="hf_reader"))
    assert (failure.kinds[0], failure.status) == ("HfHubHTTPError", 403)
    assert "Authorization error." in failure.message
    assert client.failing("model_info('none/none', token='hf_reader')").status == 404
    assert hub.commit(repo) == before
    client(upload(repo, folder, token="hf_writer"))
    assert hub.read(repo) == {**expected, "new.txt": b"new"}


def test_who_a_token_belongs_to(hub: HubServer, plain: Client, tmp_path: Path) -> None:
    hub.tokens = {"hf_reader": "read", "hf_writer": "write"}
    found = plain("whoami(token='hf_reader')")
    assert (found["name"], found["auth"]["accessToken"]["role"]) == (hub.user, "read")
    assert plain.failing("whoami(token='hf_nobody')").status == 401
    repo = f"user/{tmp_path.name}"
    statuses = {None: 401, "hf_nobody": 401, "hf_reader": 403}
    for token, status in statuses.items():
        assert plain.failing(f"create_repo({repo!r}, token={token!r})").status == status
    create(plain, repo, token="hf_writer")
    # Everybody may read what is public.
    assert plain(f"model_info({repo!r}).sha") == hub.commit(repo)
    assert hub.authorizations >= {"Bearer hf_reader", "Bearer hf_writer"}


# Faults ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("token", "status"), [(False, 401), ("hf_any", 403)])
def test_a_gated_repository(
    hub: HubServer, plain: Client, tmp_path: Path, token: str | bool, status: int
) -> None:
    fault = Fault("HEAD|GET", "/resolve/", status=status, headers={"X-Error-Code": "GatedRepo"})
    hub.faults.append(fault)
    words = (
        f"hf_hub_download('org/model', {WEIGHTS!r}, token={token!r}, cache_dir={str(tmp_path)!r})"
    )
    failure = plain.failing(words)
    assert (failure.kinds[0], failure.status) == ("GatedRepoError", status)
    assert fault.left == 0
    hub.gated.add("org/model")
    again = plain.failing(words)
    assert (again.kinds, again.status) == (failure.kinds, failure.status)


def fetch(name: str, folder: Path, repo: str = "org/model") -> str:
    found = f"hf_hub_download({repo!r}, {name!r}, cache_dir={str(folder)!r})"
    return f"hashlib.sha256(open({found}, 'rb').read()).hexdigest()"


@pytest.mark.parametrize(
    ("fault", "waits"),
    [
        (Fault("GET", "/resolve/", status=429, headers={"Retry-After": "7"}), [8.0]),
        (Fault("GET", "/resolve/", status=429, times=3), [1, 2, 4]),
        (Fault("GET", "/resolve/", cut=0.99), [1]),
        (Fault("GET", "/resolve/", cut=0.99, times=2), [1, 1]),
        (Fault("GET", "/resolve/", lost=True), [1]),
    ],
    ids=["retry-after", "429", "cut", "cut twice", "lost"],
)
def test_a_download_is_tried_again(
    hub: HubServer, plain: Client, tmp_path: Path, fault: Fault, waits: list[float]
) -> None:
    hub.faults.append(fault)
    assert plain(fetch(WEIGHTS, tmp_path)) == hashlib.sha256(FILES[WEIGHTS]).hexdigest()
    assert (fault.left, plain.waits) == (0, waits)
    # All of it again each time: the client writes 10 MiB at once.
    assert {transfer.start for transfer in hub.transfers} == {0}


def test_a_large_download_goes_on_where_it_was_cut(
    hub: HubServer, plain: Client, tmp_path: Path
) -> None:
    data = bytes(range(256)) * (21 * 2**12)
    write(hub.root / "org/large", {"large.bin": data})
    fault = Fault("GET", "/resolve/", cut=0.99)
    hub.faults.append(fault)
    found = plain(fetch("large.bin", tmp_path, "org/large"))
    assert found == hashlib.sha256(data).hexdigest()
    assert (fault.left, plain.waits) == (0, [1])
    starts = {transfer.start: transfer.length for transfer in hub.transfers}
    assert starts == {0: int(0.99 * len(data)), 20 * 2**20: 2**20}


@pytest.mark.parametrize("status", [500, 503])
def test_a_server_error_ends_a_download(
    hub: HubServer, plain: Client, tmp_path: Path, status: int
) -> None:
    fault = Fault("GET", f"/resolve/.*{WEIGHTS}", status=status)
    hub.faults.append(fault)
    failure = plain.failing(fetch(WEIGHTS, tmp_path))
    assert (failure.kinds[0], failure.status, fault.left) == ("HfHubHTTPError", status, 0)
    assert plain.waits == []


@pytest.mark.parametrize(
    ("method", "path", "status", "times", "waits", "error"),
    [
        # The first try has no retries, so that a copy in the cache serves at once.
        ("HEAD", "/resolve/", 500, 1, [], ""),
        ("HEAD", "/resolve/", 429, 2, [1], ""),
        ("GET", "/tree/", 503, 2, [1, 2], ""),
        # Not tried again at all, and taken for a network that is down.
        ("GET", "/revision/", 500, 1, [], "LocalEntryNotFoundError"),
        ("GET", "/revision/", 429, 1, [], "LocalEntryNotFoundError"),
        ("GET", "/revision/", 403, 1, [], "LocalEntryNotFoundError"),
        ("GET", "/revision/", 401, 1, [], "HfHubHTTPError"),
        ("HEAD", "/resolve/", 403, 1, [], "LocalEntryNotFoundError"),
    ],
)
def test_facts_that_are_not_to_be_had(
    hub: HubServer,
    plain: Client,
    tmp_path: Path,
    method: str,
    path: str,
    status: int,
    times: int,
    waits: list[float],
    error: str,
) -> None:
    fault = Fault(method, f"org/model{path}", status=status, times=times)
    hub.faults.append(fault)
    # One file, since the requests of several come in any order.
    only = {"cache_dir": str(tmp_path), "allow_patterns": "README.md"}
    words = f"snapshot_download('org/model', **{only!r})"
    if error:
        assert plain.failing(words).kinds[0] == error
    else:
        assert read(Path(plain(words))) == {"README.md": FILES["README.md"]}
    assert (fault.left, plain.waits) == (0, waits)


def test_a_wrong_etag_is_not_noticed(hub: HubServer, plain: Client, tmp_path: Path) -> None:
    wrong = "0" * 64
    fault = Fault("HEAD", "/resolve/", headers={"X-Linked-Etag": f'"{wrong}"'})
    hub.faults.append(fault)
    assert plain(fetch(WEIGHTS, tmp_path)) == hashlib.sha256(FILES[WEIGHTS]).hexdigest()
    assert fault.left == 0
    (blob,) = tmp_path.rglob(wrong)
    assert blob.read_bytes() == FILES[WEIGHTS]


def test_a_branch_that_moves_between_two_files(
    hub: HubServer, plain: Client, tmp_path: Path
) -> None:
    write(hub.root / "org/unsteady", FILES)
    folder = write(tmp_path / "next", {**FILES, "README.md": b"next"})
    first = hub.commit("org/unsteady")
    paths = "[hf_hub_download('org/unsteady', name, cache_dir=%r) for name in (%r, 'README.md')]"
    fault = Fault("GET", "/resolve/", then=lambda: hub.move("org/unsteady", folder))
    hub.faults.append(fault)
    one, other = plain(paths % (str(tmp_path / "files"), WEIGHTS))
    second = hub.commit("org/unsteady")
    assert fault.left == 0
    assert f"/{first}/" in one
    assert f"/{second}/" in other
    assert Path(other).read_bytes() == b"next"
    # A download of everything keeps to the commit that it began with.
    fault = Fault("GET", "/resolve/", after=2, then=lambda: hub.move("org/unsteady", folder))
    hub.faults.append(fault)
    found = plain(f"snapshot_download('org/unsteady', cache_dir={str(tmp_path / 'all')!r})")
    assert found.endswith(second)
    assert hub.commit("org/unsteady") != second


@pytest.mark.parametrize("status", [500, 503, 429])
def test_an_upload_that_is_tried_again(
    hub: HubServer, client: Client, tmp_path: Path, status: int
) -> None:
    fault = Fault("POST", "/preupload/", status=status, times=2)
    hub.faults.append(fault)
    repo = made(hub, client, tmp_path / "folder")
    assert (fault.left, client.waits) == (0, [1, 2])
    assert files_of(repo).items() <= hub.read(repo).items()


@pytest.mark.parametrize(
    "fault",
    [
        Fault("POST", "/objects/batch", status=500),
        Fault("PUT", "/lfs/", cut=0.5),
        Fault("PUT", "/lfs/", status=500),
        Fault("PUT", "/lfs/", lost=True),
        Fault("POST", "/verify", lost=True),
    ],
    ids=["batch", "cut", "put", "lost", "verify"],
)
def test_a_large_file_is_sent_again(
    hub: HubServer, plain: Client, tmp_path: Path, fault: Fault
) -> None:
    hub.faults.append(fault)
    repo = made(hub, plain, tmp_path / "folder")
    assert (fault.left, plain.waits) == (0, [1])
    assert files_of(repo).items() <= hub.read(repo).items()


def test_a_file_too_large_for_one_packet_is_cut(
    hub: HubServer, plain: Client, tmp_path: Path
) -> None:
    repo = f"user/{tmp_path.name}"
    create(plain, repo)
    data = bytes(range(256)) * 2**15
    fault = Fault("PUT", "/lfs/", cut=0.5)
    hub.faults.append(fault)
    plain(upload(repo, write(tmp_path / "folder", {"large.bin": data})))
    assert (fault.left, plain.waits) == (0, [1])
    assert hub.read(repo)["large.bin"] == data


def test_without_xet_a_commit_is_tried_once(
    hub: HubServer, client: Client, plain: Client, tmp_path: Path
) -> None:
    repo = made(hub, client, tmp_path / "folder")
    before = hub.commit(repo)
    folder = write(tmp_path / "next", {"new.txt": b"new"})
    fault = Fault("POST", "/commit/", status=500)
    hub.faults.append(fault)
    if client is plain:
        failure = client.failing(upload(repo, folder))
        assert (failure.kinds[0], failure.status) == ("HfHubHTTPError", 500)
        assert hub.commit(repo) == before
    else:
        assert client(upload(repo, folder)) == hub.commit(repo) != before
    assert fault.left == 0


def test_the_answer_to_a_commit_is_lost(
    hub: HubServer, client: Client, plain: Client, tmp_path: Path
) -> None:
    repo = made(hub, client, tmp_path / "folder")
    before = hub.commit(repo)
    folder = write(tmp_path / "next", {"new.txt": b"new"})
    hub.faults.append(Fault("POST", "/commit/", lost=True))
    failure = client.failing(upload(repo, folder, parent_commit=before))
    # The commit is there. With Xet the second try finds that the branch has moved.
    assert hub.read(repo)["new.txt"] == b"new"
    assert failure.kinds[0] == ("RemoteProtocolError" if client is plain else "HfHubHTTPError")
    assert failure.status == (0 if client is plain else 412)
    assert counted(hub, "POST", "/commit/") == (2 if client is plain else 3)


def test_a_branch_that_moves_during_an_upload(
    hub: HubServer, client: Client, tmp_path: Path
) -> None:
    repo = made(hub, client, tmp_path / "folder")
    known = hub.commit(repo)
    folder = write(tmp_path / "next", {"new.txt": b"new"})
    other = write(tmp_path / "other", {"other.txt": b"other"})
    fault = Fault("POST", "/commit/", then=lambda: hub.move(repo, other))
    hub.faults.append(fault)
    assert client.failing(upload(repo, folder, parent_commit=known)).status == 412
    assert hub.read(repo) == {"other.txt": b"other"}
    # Without the parent the upload goes on top of what it does not know.
    client(upload(repo, folder))
    assert hub.read(repo) == {"other.txt": b"other", "new.txt": b"new"}


def test_with_xet_a_refused_commit_of_many_files_is_tried_in_parts(
    hub: HubServer, client: Client, plain: Client, tmp_path: Path
) -> None:
    repo = f"user/{tmp_path.name}"
    create(client, repo)
    known = hub.commit(repo)
    hub.move(repo, write(tmp_path / "other", {"other.txt": b"other"}))
    folder = write(tmp_path / "many", {f"{n}.txt": b"text" for n in range(21)})
    assert client.failing(upload(repo, folder, parent_commit=known)).status == 412
    assert counted(hub, "POST", "/commit/") == (1 if client is plain else 7)
    assert hub.read(repo) == {"other.txt": b"other"}


def test_without_a_token_for_the_chunks_nothing_is_committed(
    hub: HubServer, xet: Client, tmp_path: Path
) -> None:
    # Not a 500: the library below the client tries that again for minutes.
    fault = Fault("GET", "/xet-write-token/", status=403)
    hub.faults.append(fault)
    repo = f"user/{tmp_path.name}"
    create(xet, repo)
    failure = xet.failing(upload(repo, write(tmp_path / "folder", files_of(repo))))
    # No error of the Hub's: Python's own.
    assert (failure.kinds[:2], fault.left) == (["ConnectionError", "OSError"], 0)
    assert "403 Forbidden" in failure.message
    assert hub.read(repo).keys() == {".gitattributes"}
