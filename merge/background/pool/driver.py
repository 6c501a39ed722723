"""The process that talks to Ray: joins or starts a cluster, hires workers, hands out jobs.

It reads from its home what to share and to run, and writes there what became of it: `ready`,
`steps`, `result`, or, at last, `failed` (a job's or a worker's exception) or `lost` (Ray's). It
ends when home does.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import sys
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from merge.background.pool.staff import FailedError, LostError, Staff, Ticket, shorten

# How often the cluster's head is looked for.
_LOOK_S = 1.0
# How long a connection may take: to a machine that is off, nothing answers at all.
_CONNECT_S = 5.0
# What joining waits for, in Ray's own code, before it finds no node of the cluster here.
_REQUEST, _REQUEST_S = "RAY_gcs_server_request_timeout_seconds", "15"


class Driver:
    """Does what its home says until home is gone."""

    def __init__(self, home: Connection, options: dict[str, Any]) -> None:
        self._home = home
        self._options = options
        self._telling = threading.Lock()
        self._staff = Staff(options, self.tell, self._is_over)

    def work(self) -> None:
        """Connect, and then run jobs until home says that it is over."""
        connect(self._options["address"])
        import ray

        head = ray.get_runtime_context().gcs_address
        threading.Thread(target=self._watch, args=(head,), daemon=True).start()
        self.tell("ready")
        while (message := self._heard()) is not None:
            if message[0] == "end":
                self._staff.close_workers()
                break
            if message[0] == "share":
                self._staff.share(*message[1:])
                continue
            _, recipe, tickets = message
            if recipe is not None:
                self._staff.renew(recipe)
            self._staff.run([Ticket(i, *words) for i, words in enumerate(tickets)])

    def end(self) -> None:
        """End the workers, and the cluster if it was started here."""
        ray: Any = sys.modules.get("ray")
        if ray is not None:
            with contextlib.suppress(Exception):
                self._staff.dismiss()
                ray.shutdown()
        # Of no use but to stand in; home removes it only if it ends in peace.
        with contextlib.suppress(OSError):
            Path.cwd().rmdir()
        self._home.close()

    def tell(self, kind: str, *words: Any) -> None:
        """Write to home, if it is there."""
        with self._telling, contextlib.suppress(OSError):
            self._home.send((kind, *words))

    def _heard(self) -> tuple[Any, ...] | None:
        try:
            message: tuple[Any, ...] = self._home.recv()
        except (EOFError, OSError):
            return None
        return message

    def _is_over(self) -> bool:
        # During a call home has nothing to say but that it goes.
        return self._home.poll(0)

    def _watch(self, head: str) -> None:
        """End this process when the cluster's head is gone: Ray takes a minute, and says nothing.

        From a thread, since the main one may wait in Ray for an answer that never comes.
        """
        seen = time.monotonic()
        while True:
            time.sleep(_LOOK_S)
            if is_listening(head):
                seen = time.monotonic()
            elif time.monotonic() - seen > self._options["missing_s"]:
                self.tell("lost", f"the Ray cluster at {head} is gone: its head does not answer")
                os._exit(1)


def connect(asked: str | None) -> None:
    """Join a cluster, or start one on this machine.

    Args:
        asked: The head's `host:port`, or "local"; None for what Ray finds.

    Raises:
        LostError: the cluster cannot be joined.
    """
    named = asked or os.environ.get("RAY_ADDRESS")
    if named and "://" in named:
        raise LostError(
            f"{named} is no address of a cluster's head; it is `host:port`, and this machine has to"
            " be a node of the cluster: `ray start --address=host:port` makes it one"
        )
    # Read when Ray is imported.
    is_ours = _REQUEST not in os.environ
    os.environ.setdefault(_REQUEST, _REQUEST_S)
    import ray
    from ray._private.services import canonicalize_bootstrap_address

    address = None
    try:
        # What init itself would take; it waits for minutes for a head that is not there.
        address = canonicalize_bootstrap_address(asked)
        if address is not None and not is_listening(address):
            if named:
                raise LostError(f"no Ray cluster answers at {named}")
            # A note that a cluster left behind which was killed.
            address = None
        if address is None:
            if is_ours:
                # A cluster of our own may be slow, on a machine that is busy.
                del os.environ[_REQUEST]
            # Ray's own way is to write one into the home folder, for every cluster to come.
            os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        ray.init(
            # Not the found address: Ray gives the token in the home folder to what it finds only.
            address="local" if address is None else asked,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
        )
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        what = "start Ray on this machine"
        if address is not None:
            what = f"join the Ray cluster at {address}, of which this machine has to be a node"
        said = "; ".join(shorten(e) for e in (error, error.__cause__) if e is not None)
        raise LostError(f"cannot {what}: {said}") from error


def is_listening(address: str) -> bool:
    """Return True if something accepts connections at `host:port`."""
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_S):
            return True
    except (OSError, ValueError):
        return False


def main() -> int:
    """Run the driver; its words are the file descriptor of home and the options as JSON."""
    number = int(sys.argv[1])
    # Not for the cluster's processes: home waits for the last one that holds it.
    os.set_inheritable(number, False)
    driver = Driver(Connection(number), json.loads(sys.argv[2]))
    try:
        driver.work()
    except FailedError as failed:
        driver.tell("failed", failed.failure, failed.key)
    except LostError as lost:
        driver.tell("lost", str(lost))
    except Exception as error:
        driver.tell("lost", f"the Ray cluster cannot be used: {shorten(error)}")
    finally:
        driver.end()
    return 0
