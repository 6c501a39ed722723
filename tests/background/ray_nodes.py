"""A Ray cluster of several nodes on this machine, in a process of its own.

Of its own, since Ray takes over signals and warns of what is none of the tests' business.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Self

import merge

_CODE = """
import sys
from ray.cluster_utils import Cluster
cluster = Cluster(
    initialize_head=True,
    head_node_args={"num_cpus": int(sys.argv[1]), "include_dashboard": False},
)
nodes = [cluster.head_node]
print("at", cluster.address, flush=True)
for line in sys.stdin:
    word, number = line.split()
    if word == "add":
        nodes.append(cluster.add_node(num_cpus=int(number)))
    else:
        cluster.remove_node(nodes[int(number)], allow_graceful=False)
    print("done", flush=True)
cluster.shutdown()
"""


class Nodes:
    """A cluster in a `with` block; the head is node 0."""

    def __init__(self, *cpus: int) -> None:
        self._folder = ray_folder()
        self._child = subprocess.Popen(
            [sys.executable, "-c", _CODE, str(cpus[0])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
            env={**environment(), "RAY_TMPDIR": self._folder.name},
        )
        self.address = self._answer()
        for count in cpus[1:]:
            self.add(count)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        # Its end is the end of what it says.
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._child.communicate(timeout=20)
        # Agents of nodes that were killed stay.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._child.pid, signal.SIGKILL)
        self._child.wait()
        self._folder.cleanup()

    def add(self, cpus: int) -> None:
        self._ask(f"add {cpus}")

    def kill(self, number: int) -> None:
        """Kill a node's raylet, and for the head what the whole cluster hangs on."""
        self._ask(f"kill {number}")

    def _ask(self, words: str) -> None:
        assert self._child.stdin is not None
        self._child.stdin.write(f"{words}\n")
        self._child.stdin.flush()
        self._answer()

    def _answer(self) -> str:
        assert self._child.stdout is not None
        line = self._child.stdout.readline()
        assert line, "the cluster did not start"
        return line.split()[-1]


def ray_folder() -> tempfile.TemporaryDirectory[str]:
    """Return a folder for Ray's sockets and logs, whose name is short enough for sockets."""
    return tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True)


def environment() -> dict[str, str]:
    """Return variables with which a child finds this checkout, and Ray reports nothing."""
    here = str(Path(merge.__file__).parents[1])
    names = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    return {**names, "PYTHONPATH": here, "RAY_USAGE_STATS_ENABLED": "0"}
