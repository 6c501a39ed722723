"""Which pool is meant: this process, or a Ray cluster."""

from __future__ import annotations

from dataclasses import dataclass

EXECUTORS = ("local", "ray")


@dataclass(frozen=True)
class ExecutorOptions:
    """Where jobs run.

    Attributes:
        name: `local` or `ray`.
        address: Of a Ray cluster; `auto`: the one that this machine belongs to, or a new one here.
        jobs: The most workers of a cluster; None: as many as it has room for.
    """

    name: str = "local"
    address: str = "auto"
    jobs: int | None = None
