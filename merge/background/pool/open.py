"""The pool that options stand for."""

from __future__ import annotations

from merge.background.pool.local import LocalPool
from merge.background.pool.model import Pool
from merge.background.pool.options import EXECUTORS, ExecutorOptions


def open_pool(options: ExecutorOptions, *, uses_gpu: bool, threads: int | None) -> Pool:
    """Return a pool, to be used in a `with` block.

    Args:
        options: Which.
        uses_gpu: False where no worker needs a GPU although the cluster may have some.
        threads: Of each worker of a cluster; None: one.

    Raises:
        ValueError: there is no such executor.
    """
    if options.name == "local":
        return LocalPool()
    if options.name != "ray":
        raise ValueError(f"executor {options.name!r} is not one of {', '.join(EXECUTORS)}")
    from merge.background.pool.cluster import RayPool

    return RayPool(
        address=options.address,
        workers=options.jobs,
        gpus=None if uses_gpu else 0,
        threads=threads,
    )
