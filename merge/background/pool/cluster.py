"""A pool of workers on a Ray cluster, or on one that is started for it on this machine.

Ray itself runs in a child process, the driver. In this one, `ray.init` would take over SIGTERM, the
process group, `sys.excepthook` and the limit of open files; it would block for minutes where nobody
answers, and end the process when the cluster dies. The driver can be ended at any time, and ends by
itself when this process is gone, however it went.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import pickle
import re
import signal
import site
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO, Any, Self

from merge.background.child import child_command, import_folders
from merge.background.pool.failures import exception_of
from merge.background.pool.model import AnyJob, Make, Pool, check_keys, ignore_progress
from merge.background.pool.shared import Numbered, Shared
from merge.errors import ExecutorError

# How long until a cluster has to be joined, or started on a machine that may be busy.
_JOIN_S = 30.0
_START_S = 120.0
# How long the driver may take to end its workers and its cluster, and before it has any.
_END_S = 15.0
_EARLY_END_S = 1.0
# What a driver that died leaves to be read with --debug.
_LAST_LINES = 20
_CHUNK = 1 << 20
_CODE = "import sys; from merge.background.pool.driver import main; sys.exit(main())"


class RayPool(Pool):
    """Runs jobs on resident workers in Ray actors.

    Workers on this machine import from where this process does. On other machines of the cluster
    the package has to be installed, with the same version of Ray and the same minor version of
    Python. Workers stand in the folder that this process stands in, if their machine has it.

    A job whose worker dies, by a signal, for want of memory or with its machine, is run again, up
    to three times in all.

    Attributes:
        patience_s: How long no worker may find a place on a cluster that others use.
        missing_s: How long the cluster's head may accept no connection.
    """

    patience_s = 120.0
    missing_s = 10.0

    def __init__(
        self,
        *,
        address: str | None = None,
        workers: int | None = None,
        gpus: float | None = None,
        threads: int | None = None,
    ) -> None:
        """Prepare a pool; `with` joins or starts the cluster.

        Args:
            address: `host:port` of the cluster's head. None or "auto": $RAY_ADDRESS, or the cluster
                that runs on this machine, or else one is started; "local": one is started.
            workers: The most there may be; None: as many as find a GPU or CPU.
            gpus: How many GPUs a worker has, or the part of one; None: one if the cluster has any.
            threads: OMP_NUM_THREADS of each worker, and how many CPUs one without a GPU takes;
                None: one, as Ray has it.
        """
        self._address = None if address == "auto" else address
        self._options = {"workers": workers, "gpus": gpus, "threads": threads}
        self._home: Connection | None = None
        self._driver: subprocess.Popen[bytes] | None = None
        self._said: IO[bytes] | None = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._made_of: tuple[Any, Any] | None = None
        self._is_joined = False
        self._is_idle = False
        self._shares = 0

    def __enter__(self) -> Self:
        """Join the cluster or start it.

        Raises:
            ExecutorError: Ray is not installed, or the cluster cannot be reached.
        """
        _check_ray()
        try:
            self._start()
            asked = self._address or os.environ.get("RAY_ADDRESS")
            limit = _JOIN_S if asked and asked != "local" else _START_S
            self._receive(time.monotonic() + limit, f"{asked or 'it'} did not answer")
        except BaseException:
            self.close()
            raise
        self._is_joined = self._is_idle = True
        return self

    def run_jobs(
        self,
        make: Make[AnyJob],
        shared: Any,
        jobs: Sequence[AnyJob],
        *,
        on_result: Callable[[AnyJob, Any], None],
        on_progress: Callable[[int], None] = ignore_progress,
    ) -> None:
        """Run jobs on the workers, and return when all are done.

        An exception that is no MergeError comes home as a WorkerError, with the worker's traceback
        as its note.
        """
        if self._home is None:
            raise RuntimeError("the pool is closed")
        check_keys(jobs)
        if not jobs:
            return
        self._is_idle = False
        try:
            self._send(make, shared, jobs)
            for _ in jobs:
                kind, *words = self._receive()
                while kind == "steps":
                    on_progress(words[0])
                    kind, *words = self._receive()
                index, value = words
                on_result(jobs[index], pickle.loads(value))
        except BaseException:
            self.close()
            raise
        self._is_idle = True

    def share(self, value: Any) -> Shared:
        """Put a value into the cluster, from where each worker fetches it once."""
        if self._home is None:
            raise RuntimeError("the pool is closed")
        self._shares += 1
        try:
            self._home.send(("share", self._shares, pickle.dumps(value)))
        except OSError:
            # It is gone; what it said last can still be read.
            self._receive()
        return Numbered(self._shares)

    def close(self) -> None:
        """End the workers, and the cluster if it was started here."""
        home, self._home = self._home, None
        if home is not None:
            # Only workers that have nothing to do can be asked to close.
            if self._is_idle:
                with contextlib.suppress(OSError):
                    home.send(("end",))
            # Half of it, so that the driver's end can be waited for.
            with contextlib.suppress(OSError), socket.socket(fileno=os.dup(home.fileno())) as end:
                end.shutdown(socket.SHUT_WR)
        driver, self._driver = self._driver, None
        try:
            if home is not None and driver is not None:
                _wait_for_end(home, _END_S if self._is_joined else _EARLY_END_S)
        finally:
            if driver is not None:
                # The cluster that the driver started is of its session, too. Once it was waited
                # for, its number may be another's; Ray's own reaper saw its end.
                if driver.returncode is None:
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(driver.pid, signal.SIGKILL)
                driver.wait()
            for thing in (home, self._said):
                if thing is not None:
                    thing.close()
            if self._folder is not None:
                self._folder.cleanup()

    def _start(self) -> None:
        # Ray lets its workers import from where the driver stands, before all else.
        self._folder = tempfile.TemporaryDirectory(prefix="instruct-merge-ray-")
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 - until `close`
        here, there = socket.socketpair()
        with there:
            self._home = Connection(here.detach())
            options = {
                **self._options,
                "address": self._address,
                "patience_s": self.patience_s,
                "missing_s": self.missing_s,
                "folder": str(Path.cwd()),
                "imports": _added_folders(),
            }
            self._driver = subprocess.Popen(
                child_command(_CODE, [str(there.fileno()), json.dumps(options)]),
                stdin=subprocess.DEVNULL,
                stdout=self._said,
                stderr=self._said,
                pass_fds=(there.fileno(),),
                # A session of its own, so that Ctrl-C reaches us alone and we end it.
                start_new_session=True,
                cwd=self._folder.name,
                env={**os.environ, "RAY_USAGE_STATS_ENABLED": "0"},
            )

    def _send(self, make: Make[AnyJob], shared: Any, jobs: Sequence[AnyJob]) -> None:
        assert self._home is not None
        recipe = None
        if self._made_of is None or self._made_of[0] is not make or self._made_of[1] is not shared:
            recipe = pickle.dumps((make, shared))
        tickets = [(job.key, job.group, pickle.dumps(job)) for job in jobs]
        try:
            self._home.send(("run", recipe, tickets))
        except OSError:
            # It is gone; what it said last can still be read.
            self._receive()
        self._made_of = (make, shared)

    def _receive(self, until: float | None = None, late: str = "") -> tuple[Any, ...]:
        """Return the driver's next message that is no failure."""
        assert self._home is not None
        try:
            left = None if until is None else max(0.0, until - time.monotonic())
            if not self._home.poll(left):
                raise ExecutorError(f"the Ray cluster cannot be used: {late}")
            message: tuple[Any, ...] = self._home.recv()
        except (EOFError, OSError):
            raise self._death() from None
        if message[0] == "failed":
            raise exception_of(message[1], message[2])
        if message[0] == "lost":
            raise ExecutorError(message[1])
        return message

    def _death(self) -> ExecutorError:
        """Return what to raise for a driver that ended without a word."""
        assert self._driver is not None
        assert self._said is not None
        self._said.seek(0)
        lines = self._said.read().decode(errors="replace").strip().split("\n")[-_LAST_LINES:]
        # Python's last line tells; those of Ray's own log do not.
        reason = f": {lines[-1]}" if re.match(r"[\w.]+(Error|Exit|Exception)\b", lines[-1]) else ""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._driver.wait(_EARLY_END_S)
        status = self._driver.returncode
        error = ExecutorError(
            f"the process that talks to the Ray cluster ended (status {status}){reason}"
        )
        error.add_note("\n".join(["It said last:", *lines]))
        return error


def _check_ray() -> None:
    found = importlib.util.find_spec("ray")
    # A folder that happens to be called so has no origin.
    if found is None or found.origin is None:
        raise ExecutorError(
            "--executor ray needs the extra `ray`", hint="pip install 'instruct-merge[ray]'"
        )


def _wait_for_end(home: Connection, seconds: float) -> None:
    until = time.monotonic() + seconds
    with contextlib.suppress(OSError):
        # Bytes and not messages: an interruption may have left half of one.
        while home.poll(max(0.0, until - time.monotonic())) and os.read(home.fileno(), _CHUNK):
            pass


def _added_folders() -> list[str]:
    """Return where this process imports from beside its Python's own folders."""
    paths = sysconfig.get_paths()
    own = {paths[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    own |= {str(Path(paths["stdlib"], "lib-dynload")), *site.getsitepackages()}
    own.add(site.getusersitepackages())
    archive = f"python{sys.version_info[0]}{sys.version_info[1]}.zip"
    return [path for path in import_folders() if path not in own and not path.endswith(archive)]
