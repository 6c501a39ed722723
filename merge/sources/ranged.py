"""Parts of files that are still on the Hub: headers without the weights that follow them."""

from __future__ import annotations

import bisect
import re
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from merge.errors import IntegrityError, NoRangesError
from merge.reader.byte_reader import ByteReader, FileStamp, Opener
from merge.reader.checkpoint import FileReader
from merge.sources.hub_errors import hub_errors, naming
from merge.sources.model import HubFile, SourceFile

# A LoRA keeps its alphas between its matrices and a pickle its headers between its records: some
# hundred requests that take a round trip each.
_WORKERS = 16
_ATTEMPTS = 5
_TIMEOUT_S = 30.0
_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")


def opener_of(files: Sequence[SourceFile], role: str) -> Opener:
    """Return what opens these files: on this disk when they are here, else on the Hub.

    A file of the Hub is opened once and keeps what was read, so that reading its header and its
    scalars later asks for each byte once.

    Args:
        files: Of one model.
        role: The model's, in messages.
    """
    by_path = {file.path: file for file in files}
    remote: dict[Path, RangedFile] = {}

    def open_file(path: Path, expected: FileStamp | None = None) -> ByteReader:
        file = by_path[path]
        if file.is_present or file.hub is None:
            return FileReader(path, expected)
        if path not in remote:
            remote[path] = RangedFile(path, file.size_bytes, file.hub, role)
        return remote[path]

    return open_file


class RangedFile(ByteReader):
    """Positioned reads of one file of the Hub, by requests for ranges of bytes."""

    def __init__(self, path: Path, size_bytes: int, hub: HubFile, role: str) -> None:
        """Prepare to read; nothing is asked for yet.

        Args:
            path: Where the file will be in the cache; for messages.
            size_bytes: As the Hub's listing has it.
            hub: Which file.
            role: Of its model, in messages.
        """
        self.path = path
        self.stamp = FileStamp(0, 0, size_bytes, 0)
        self._hub = hub
        self._role = role
        # Where each part begins, sorted, and the part: its size, and its bytes once they came.
        self._starts: list[int] = []
        self._parts: dict[int, tuple[int, Future[bytes]]] = {}
        self._pool: ThreadPoolExecutor | None = None

    def close(self) -> None:
        """End the threads; what was read stays, and reading on is allowed."""
        if self._pool is not None:
            self._pool.shutdown(wait=True)
            self._pool = None

    def read(self, offset: int, size: int) -> bytes:
        """Return bytes from a position.

        Raises:
            IntegrityError: the file ends before, or is not of the listed size.
            OfflineError: the Hub does not answer, or not with a range.
        """
        if offset < 0 or offset + size > self.stamp.size_bytes:
            raise IntegrityError(f"{self.path} ends at byte {self.stamp.size_bytes}")
        if size == 0:
            return b""
        start = self._covering(offset, size)
        if start is None:
            part: Future[bytes] = Future()
            part.set_result(self._request(offset, size))
            start = self._keep(offset, size, part)
        return self._parts[start][1].result()[offset - start : offset - start + size]

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill a buffer from a position."""
        buffer[:] = self.read(offset, len(buffer))

    def will_need(self, offset: int, size: int) -> None:
        """Start to fetch a part; what is read inside of it later waits for it."""
        size = min(size, self.stamp.size_bytes - offset)
        if size <= 0 or self._covering(offset, size) is not None:
            return
        if self._pool is None:
            self._pool = ThreadPoolExecutor(_WORKERS)
        self._keep(offset, size, self._pool.submit(self._request, offset, size))

    def _covering(self, offset: int, size: int) -> int | None:
        """Return where a part begins that holds these bytes, or will."""
        index = bisect.bisect_right(self._starts, offset) - 1
        if index < 0:
            return None
        start = self._starts[index]
        return start if offset + size <= start + self._parts[start][0] else None

    def _keep(self, offset: int, size: int, part: Future[bytes]) -> int:
        if offset not in self._parts:
            bisect.insort(self._starts, offset)
        self._parts[offset] = (size, part)
        return offset

    def _request(self, offset: int, size: int) -> bytes:
        import httpx2

        with naming(self._role), hub_errors(self._hub.repo, self._hub.commit):
            for attempt in range(_ATTEMPTS):
                try:
                    return self._request_once(offset, size)
                except httpx2.TransportError:
                    # The client tries again when it cannot connect; here an answer broke off.
                    if attempt == _ATTEMPTS - 1:
                        raise
                    time.sleep(0.5 * 2**attempt)
        raise AssertionError("the loop returns or raises")

    def _request_once(self, offset: int, size: int) -> bytes:
        import httpx2
        from huggingface_hub import constants, hf_hub_url
        from huggingface_hub.errors import OfflineModeIsEnabled
        from huggingface_hub.utils import (  # type: ignore[attr-defined]
            build_hf_headers,
            hf_raise_for_status,
            http_stream_backoff,
        )

        if constants.HF_HUB_OFFLINE:
            raise OfflineModeIsEnabled("offline")
        url = hf_hub_url(self._hub.repo, self._hub.name, revision=self._hub.commit)
        headers = {
            **build_hf_headers(),
            "Range": f"bytes={offset}-{offset + size - 1}",
            # A compressed answer would be of other bytes.
            "Accept-Encoding": "identity",
        }
        broken: httpx2.TransportError | None = None
        data = b""
        with http_stream_backoff("GET", url, headers=headers, timeout=_TIMEOUT_S) as response:
            hf_raise_for_status(response)
            match = _RANGE.fullmatch(response.headers.get("Content-Range", ""))
            if response.status_code != 206 or match is None:
                # The answer is the whole file, which is not read.
                raise NoRangesError(
                    f"the Hub sends {self._hub.name} of {self._hub.repo} only as a whole",
                    hint="`hf download` gets it into the cache, where its header can be read",
                )
            try:
                data = response.read()
            except httpx2.TransportError as error:
                # Raised outside: the client's context manager would try to answer it and fails.
                broken = error
        if broken is not None:
            raise broken
        first, last, total = map(int, match.groups())
        if total != self.stamp.size_bytes:
            raise IntegrityError(
                f"{self._hub.name} of {self._hub.repo} has {total:,} bytes, and the listing of the "
                f"repository says {self.stamp.size_bytes:,}",
                hint="run again; the Hub contradicts itself",
            )
        if (first, last) != (offset, offset + size - 1) or len(data) != size:
            raise httpx2.RemoteProtocolError(f"asked for {size} bytes at {offset}, got {match[0]}")
        return data
