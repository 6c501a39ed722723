"""Requests and answers apart from the connection that carries them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from email.message import Message
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qs


class Piece(NamedTuple):
    """Bytes of a file of a repository, read while they are sent."""

    repo: str
    name: str
    path: Path
    start: int
    length: int


@dataclass(frozen=True)
class Request:
    """What a client asked for.

    Attributes:
        method: The method.
        path: The path, unquoted and without the query.
        query: The last value of every field of the query.
        headers: The headers, found whatever their case.
        chunks: The body, which can be read once.
    """

    method: str
    path: str
    query: Mapping[str, str]
    headers: Message
    chunks: Iterator[bytes]

    @property
    def token(self) -> str:
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    def has(self, flag: str) -> bool:
        """Return whether a field of the query is set to something true."""
        return self.query.get(flag, "").lower() in ("1", "true")

    def body(self) -> bytes:
        """Read the whole body."""
        return b"".join(self.chunks)

    def json(self) -> Any:
        """Read the whole body as JSON."""
        return json.loads(self.body())

    def form(self) -> dict[str, list[str]]:
        """Read the whole body as the fields of a form."""
        return parse_qs(self.body().decode())


@dataclass
class Answer:
    """What a client is told.

    Attributes:
        status: The status.
        headers: The headers, without Content-Length.
        body: The body.
        share: How much of the body is sent before the connection breaks off.
    """

    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes | Piece = b""
    share: float = 1.0

    @classmethod
    def of(cls, tree: object, **headers: str) -> Answer:
        """Make an answer of something that becomes JSON."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return cls(200, {"Content-Type": "application/json", **named}, json.dumps(tree).encode())

    @property
    def size(self) -> int:
        return self.body.length if isinstance(self.body, Piece) else len(self.body)


class RefusedError(Exception):
    """A request that is answered with an error.

    Attributes:
        answer: That answer.
    """

    def __init__(
        self,
        status: int,
        message: str = "",
        code: str = "",
        headers: Mapping[str, str] | None = None,
        **more: object,
    ) -> None:
        super().__init__(f"{status} {message}")
        line = " ".join(message.split())
        stated = {"X-Error-Code": code, "X-Error-Message": line, **(headers or {})}
        kept = {name: value for name, value in stated.items() if value}
        self.answer = Answer.of({"error": message, **more})
        self.answer.status = status
        self.answer.headers |= kept
