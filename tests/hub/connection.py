"""One connection: which request is answered by what, and what is sent of the answer."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

from tests.hub import downloads, uploads
from tests.hub.faults import Fault
from tests.hub.messages import Answer, Piece, RefusedError, Request

if TYPE_CHECKING:
    from tests.hub.server import HubServer

_CHUNK = 2**16


class Transfer(NamedTuple):
    """Bytes of a file that were sent."""

    repo: str
    name: str
    start: int
    length: int


def _route(method: str, pattern: str) -> tuple[str, re.Pattern[str]]:
    model = pattern.replace("ID", "([^/]+/[^/]+?)").replace("REV", "([^/]+)")
    return method, re.compile(model)


# Matched against the quoted path: a revision such as refs/pr/1 has no slashes there.
_ROUTES: dict[tuple[str, re.Pattern[str]], Callable[..., Answer]] = {
    _route("GET", "/api/agent-harnesses"): downloads.harnesses,
    _route("GET", "/api/whoami-v2"): downloads.whoami,
    _route("GET", "/api/models/ID"): downloads.info,
    _route("GET", "/api/models/ID/revision/REV"): downloads.info,
    _route("GET", "/api/models/ID/tree/REV(?:/(.+))?"): downloads.tree,
    _route("POST", "/api/models/ID/paths-info/REV"): downloads.paths_info,
    _route("GET", "/api/models/ID/refs"): downloads.refs,
    _route("GET", "/api/models/ID/commits/REV"): downloads.commits,
    _route("GET", r"/api/models/ID/discussions/(\d+)"): downloads.discussion,
    _route("GET", "/api/models/ID/xet-(read|write)-token/REV"): downloads.xet_token,
    _route("GET", "/ID/resolve/REV/(.+)"): downloads.resolve,
    _route("POST", "/api/repos/create"): uploads.create,
    _route("POST", "/api/models/ID/branch/REV"): uploads.branch,
    _route("POST", "/api/validate-yaml"): uploads.validate_yaml,
    _route("POST", "/api/models/ID/preupload/REV"): uploads.preupload,
    _route("POST", "/ID.git/info/lfs/objects/batch"): uploads.lfs_batch,
    _route("PUT", "/ID.git/lfs/([0-9a-f]{64})"): uploads.lfs_put,
    _route("POST", "/ID.git/lfs/([0-9a-f]{64})/verify"): uploads.lfs_verify,
    _route("POST", "/api/models/ID/commit/REV"): uploads.commit,
    _route("POST", "/api/models/ID/discussions"): uploads.open_discussion,
}


class Handler(BaseHTTPRequestHandler):
    """Reads one request, looks up what goes wrong with it, and answers."""

    server: HubServer

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        query = {name: values[-1] for name, values in parse_qs(parts.query).items()}
        path = unquote(parts.path)
        self.server.requests.append((self.command, path))
        if token := self.headers.get("Authorization"):
            self.server.authorizations.add(token)
        fault = self.server.struck(self.command, path) or Fault("", "", times=0)
        is_reading = self.command in ("GET", "HEAD")
        chunks = self._chunks(1.0 if is_reading or fault.cut is None else fault.cut)
        request = Request(self.command, path, query, self.headers, chunks)
        if fault.then:
            fault.then()
        if fault.cut is not None and not is_reading:
            request.body()
        elif fault.status:
            request.body()
            self._send(Answer(fault.status, dict(fault.headers), fault.body))
        else:
            answer = self._answer(parts.path, request)
            answer.headers |= fault.headers
            if fault.cut is not None:
                answer.share = fault.cut
            if not fault.lost:
                self._send(answer)

    do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815

    def _answer(self, quoted: str, request: Request) -> Answer:
        method = "GET" if self.command == "HEAD" else self.command
        try:
            for (wanted, pattern), respond in _ROUTES.items():
                if wanted == method and (match := pattern.fullmatch(quoted)):
                    words = [unquote(word) for word in match.groups() if word is not None]
                    return respond(self.server, request, *words)
            raise RefusedError(400, f"Nothing answers {method} {request.path}")
        except RefusedError as refused:
            return refused.answer
        finally:
            # A client that is still sending would not see an answer before its end.
            request.body()

    def _chunks(self, share: float) -> Iterator[bytes]:
        """Read the body of the request, or only its beginning."""
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            while size := int(self.rfile.readline().split(b";")[0] or b"0", 16):
                yield self.rfile.read(size)
                self.rfile.readline()
                # Its end is not known before it comes: one chunk is some share of it.
                if share < 1:
                    return
            return
        left = int(int(self.headers.get("Content-Length", 0)) * share)
        while left and (chunk := self.rfile.read(min(left, _CHUNK))):
            left -= len(chunk)
            yield chunk

    def _send(self, answer: Answer) -> None:
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(answer.size))
        self.end_headers()
        if self.command == "HEAD":
            return
        count = int(answer.size * answer.share)
        if not isinstance(answer.body, Piece):
            self.wfile.write(answer.body[:count])
            return
        piece = answer.body
        self.server.transfers.append(Transfer(piece.repo, piece.name, piece.start, count))
        with piece.path.open("rb") as file:
            file.seek(piece.start)
            while count and (chunk := file.read(min(count, _CHUNK))):
                count -= len(chunk)
                self.wfile.write(chunk)

    def log_message(self, *arguments: object) -> None:
        pass
