"""Cells on a Ray cluster of several nodes: the same results, whatever happens to a worker."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from merge import ExecutorOptions, Inputs, sweep
from merge.errors import ExecutorError

has_ray = importlib.util.find_spec("ray") is not None
pytestmark = pytest.mark.skipif(not has_ray, reason="ray is not installed")
AXES = ("weight=0,0.5,1", "steps=1,2")


@pytest.fixture(scope="module")
def recipe(tiny_sd15: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    models = {role: str(tiny_sd15 / role) for role in ("base", "distilled", "target")}
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(
        yaml.safe_dump({"name": "tiny", "models": models, "verify": {"resolution": 32}})
    )
    return path


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def workers() -> list[int]:
    """Return the processes of Ray's that have a worker of ours."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if path.read_bytes().startswith(b"ray::Resident"):
                found.append(int(path.parent.name))
    return found


def measured(result: Any) -> dict[tuple[str, ...], Any]:
    return {
        cell.words: (
            result.measured[cell.index].sha256,
            result.measured[cell.index].values,
            [(result.folder / name).read_bytes() for name in result.measured[cell.index].pictures],
        )
        for cell in result.cells
    }


@pytest.mark.usefixtures("one_thread")
def test_a_cluster_gives_what_this_process_gives_though_a_worker_is_killed(
    recipe: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {
        "inputs": Inputs(samples=4),
        "metrics": ("path", "endpoint", "residual", "l1"),
        "device": "cpu",
        "threads": 1,
    }
    local = sweep(recipe, AXES, out=tmp_path / "local", **options)
    killed: list[int] = []

    def kill_one(stage: str, done: int, total: int) -> None:
        if stage == "sweep" and done > total / 3 and not killed:
            killed.extend(workers()[:1])
            for number in killed:
                os.kill(number, signal.SIGKILL)

    from tests.background.ray_nodes import Nodes

    with Nodes(3) as nodes:
        executor = ExecutorOptions("ray", nodes.address)
        there = sweep(
            recipe,
            AXES,
            out=tmp_path / "ray",
            executor=executor,
            on_progress=kill_one,
            **options,
        )
    assert killed
    assert measured(there) == measured(local)
    assert there.reference is not None
    assert local.reference is not None
    assert there.reference.unet_rows == local.reference.unet_rows


def test_a_cluster_that_is_not_there_is_told_and_nothing_is_left(
    recipe: Path, tmp_path: Path
) -> None:
    with pytest.raises(ExecutorError, match="no Ray cluster answers") as caught:
        sweep(
            recipe,
            ["weight=0,1"],
            out=tmp_path / "out",
            inputs=Inputs(samples=2),
            executor=ExecutorOptions("ray", "127.0.0.1:1"),
            device="cpu",
        )
    assert "--executor local" in caught.value.hint
    assert not (tmp_path / "out").exists()
