from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from merge.background.pool.cluster import RayPool
from merge.background.pool.failures import WorkerError, exception_of, failure_of
from merge.background.pool.local import LocalPool
from merge.background.pool.model import Pool
from merge.background.pool.schedule import Schedule
from merge.errors import DeviceError, ExecutorError, MergeError, PlanError, RecipeError
from tests.background.pool_jobs import CustomError, Do, make
from tests.background.ray_nodes import Nodes, environment, ray_folder

Results = dict[str, dict[str, Any]]
# Not importorskip: this process is to do without it.
needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="needs the extra `ray`")


def run(pool: Pool, shared: dict[str, Any], jobs: list[Do]) -> Results:
    """Run jobs and return their results, each of which came home once."""
    results: Results = {}

    def keep(job: Do, result: dict[str, Any]) -> None:
        assert job.key not in results
        assert job.key == result["key"]
        results[job.key] = result

    pool.run_jobs(make, shared, jobs, on_result=keep)
    assert set(results) == {job.key for job in jobs}
    return results


def lines_of(log: Path) -> list[str]:
    return [line.split(" ", 1)[1] for line in log.read_text().splitlines()]


# Which job is next -----------------------------------------------------------------------------


def test_a_worker_stays_with_its_group_then_takes_a_free_one_then_steals() -> None:
    waiting = Schedule([Do(f"{group}{i}", group) for i in range(3) for group in "abc"])
    first = waiting.take(None)
    assert first == Do("a0", "a")
    assert waiting.take(None, {"a"}) == Do("b0", "b")
    assert waiting.take("a", {"a", "b"}) == Do("a1", "a")
    assert waiting.take("a", {"b"}) == Do("a2", "a")
    assert waiting.take("a", {"b"}) == Do("c0", "c")
    # Nobody's group is left: the last of the largest.
    assert waiting.take("c", {"b"}) == Do("c1", "c")
    assert waiting.take("a", {"b", "c"}) == Do("b2", "b")
    waiting.put_back(first)
    assert len(waiting) == 3
    assert waiting.take("a", {"b", "c"}) == first
    assert [waiting.take("b", {"b", "c"}), waiting.take("b", {"c"})] == [
        Do("b1", "b"),
        Do("c2", "c"),
    ]
    assert waiting.take("b") is None
    assert not waiting


# Here ------------------------------------------------------------------------------------------


def test_locally_groups_come_one_after_another_and_the_worker_stays(tmp_path: Path) -> None:
    shared = {"base": 3, "log": str(tmp_path / "log")}
    with LocalPool() as pool:
        order = list(run(pool, shared, [Do("1", "b"), Do("2", "a"), Do("3", "b"), Do("4", "a")]))
        again = run(pool, shared, [Do("5", "a")])
        other = run(pool, dict(shared), [Do("6", "a")])
    assert order == ["1", "3", "2", "4"]
    assert again["5"]["count"] == 5
    assert other["6"]["count"] == 1
    lines = lines_of(tmp_path / "log")
    assert lines[:2] == ["made", "run 1"]
    assert lines[-5:] == ["run 5", "closed", "made", "run 6", "closed"]


def test_locally_an_error_is_the_jobs_own_and_ends_it() -> None:
    done: list[str] = []
    with LocalPool() as pool:
        with pytest.raises(LookupError, match="it is not there"):
            pool.run_jobs(
                make,
                {"base": 1},
                [Do("1"), Do("2", what="other"), Do("3")],
                on_result=lambda job, _: done.append(job.key),
            )
        assert done == ["1"]
        with pytest.raises(RuntimeError, match="the pool is closed"):
            run(pool, {"base": 1}, [Do("3")])


def test_keys_differ() -> None:
    with LocalPool() as pool, pytest.raises(ValueError, match="two jobs have the key 'x'"):
        run(pool, {}, [Do("x", "a"), Do("y"), Do("x", "b")])


# Exceptions as data ----------------------------------------------------------------------------


def raised(error: Exception) -> Exception:
    try:
        raise error
    except Exception as caught:
        return exception_of(failure_of(caught), "k")


@pytest.mark.parametrize(
    "error",
    [
        MergeError("no"),
        DeviceError("no such device", hint="another"),
        RecipeError("two problems", ["one", "two"]),
        CustomError(1, two=2),
    ],
)
def test_an_error_of_ours_comes_home_as_it_was(error: MergeError) -> None:
    home = raised(error)
    assert type(home) is type(error)
    assert str(home) == str(error)
    assert {**vars(home), "__notes__": 0} == {**vars(error), "__notes__": 0}
    assert home.exit_code == error.exit_code
    assert "in raised" in home.__notes__[0]


def test_an_error_of_an_unknown_class_comes_home_as_what_it_inherits_from() -> None:
    class HereError(PlanError):
        pass

    home = raised(HereError("it does not fit", ["a key"], hint="mend it"))
    assert type(home) is PlanError
    assert str(home) == "it does not fit\n  a key\nhint: mend it"


def test_any_other_error_comes_home_with_its_name_and_traceback() -> None:
    home = raised(KeyError("there"))
    assert isinstance(home, WorkerError)
    assert str(home) == "job 'k': KeyError: 'there'"
    assert "Traceback" in home.__notes__[0]


# Without a cluster -----------------------------------------------------------------------------


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ExecutorError, match="needs the extra `ray`") as caught, RayPool():
        pass
    assert caught.value.hint == "pip install 'instruct-merge[ray]'"


def test_the_pool_imports_no_ray() -> None:
    code = (
        "import sys, merge.background.pool.cluster, merge.background.pool.driver,"
        " merge.background.pool.local; print('ray' in sys.modules)"
    )
    child = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment()
    )
    assert child.stdout == "False\n", child.stderr


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@needs_ray
@pytest.mark.parametrize("from_environment", [False, True])
def test_a_dead_address_is_told_soon(
    monkeypatch: pytest.MonkeyPatch, from_environment: bool
) -> None:
    address = f"127.0.0.1:{free_port()}"
    if from_environment:
        monkeypatch.setenv("RAY_ADDRESS", address)
    begun = time.monotonic()
    pool = RayPool(address="auto" if from_environment else address)
    with pytest.raises(ExecutorError, match=f"no Ray cluster answers at {address}") as caught, pool:
        pass
    assert time.monotonic() - begun < 10
    assert "--executor local" in caught.value.hint
    assert "--resume" in caught.value.hint


@needs_ray
def test_what_listens_and_says_nothing_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("merge.background.pool.cluster._JOIN_S", 4.0)
    with socket.socket() as silent:
        silent.bind(("0.0.0.0", 0))
        silent.listen()
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        with (
            pytest.raises(ExecutorError, match=f"{address} did not answer"),
            RayPool(address=address),
        ):
            pass


@needs_ray
@pytest.mark.parametrize("address", ["ray://10.0.0.1:10001", "nonsense"])
def test_what_is_no_address_is_told(address: str) -> None:
    with pytest.raises(ExecutorError, match=address), RayPool(address=address):
        pass


# On a cluster ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    with Nodes(1, 1, 1) as nodes:
        yield nodes


@needs_ray
def test_a_job_that_kills_every_worker_is_given_up(nodes: Nodes, tmp_path: Path) -> None:
    shared = {"base": 2, "log": str(tmp_path / "log")}
    home = []
    with (
        pytest.raises(ExecutorError, match="job 'bad' was given up, its worker died 3 times"),
        RayPool(address=nodes.address, workers=1) as pool,
    ):
        pool.run_jobs(
            make,
            shared,
            [Do("good"), Do("bad", what="kill"), Do("never")],
            on_result=lambda job, _: home.append(job.key),
        )
    assert home == ["good"]
    assert lines_of(tmp_path / "log").count("run bad") == 3


@needs_ray
@pytest.mark.parametrize(
    ("shared", "what", "error", "words"),
    [
        ({"base": 1}, "custom", CustomError, "1 and 2\n  first\n  second\nhint: add them"),
        ({"base": 1}, "other", WorkerError, "job 'bad': LookupError: it is not there"),
        ({"fails": True}, "nothing", DeviceError, "no such device\nhint: another one"),
    ],
)
def test_a_workers_error_comes_home(
    nodes: Nodes, shared: dict[str, Any], what: str, error: type[Exception], words: str
) -> None:
    with (
        pytest.raises(error) as caught,
        RayPool(address=nodes.address, workers=1) as pool,
    ):
        run(pool, shared, [Do("bad", what=what), Do("next", seconds=60)])
    assert str(caught.value) == words
    assert "pool_jobs.py" in caught.value.__notes__[0]


@needs_ray
@pytest.mark.slow
def test_workers_that_cannot_start_are_given_up(nodes: Nodes) -> None:
    with (
        pytest.raises(ExecutorError, match="3 workers could not start"),
        RayPool(address=nodes.address, workers=1) as pool,
    ):
        run(pool, {"dies": True}, [Do("one")])


@needs_ray
@pytest.mark.slow
def test_a_cluster_without_room_is_told(nodes: Nodes) -> None:
    with (
        pytest.raises(ExecutorError, match="no node of the Ray cluster has a GPU"),
        RayPool(address=nodes.address, gpus=1) as pool,
    ):
        run(pool, {"base": 1}, [Do("one")])


@pytest.fixture(scope="module")
def pool(nodes: Nodes) -> Iterator[RayPool]:
    """A pool with workers that stay; its tests come last, since they take all CPUs."""
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)]
    pool = RayPool(address=nodes.address, threads=3)
    pool.missing_s = 2.0
    with pool:
        assert before == [
            signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)
        ]
        yield pool


@needs_ray
def test_ray_gives_what_local_gives_with_workers_that_stay(pool: RayPool, tmp_path: Path) -> None:
    shared = {"base": 3, "log": str(tmp_path / "log")}
    jobs = [Do(f"{group}{i}", group, seconds=0.3, steps=3) for i in range(4) for group in "abc"]
    steps = []
    results: Results = {}
    pool.run_jobs(
        make,
        shared,
        jobs,
        on_result=lambda job, result: results.update({job.key: result}),
        on_progress=steps.append,
    )
    again = run(pool, shared, [Do("again")])
    pids = {result["pid"] for result in results.values()}
    assert again["again"]["pid"] in pids
    assert lines_of(tmp_path / "log").count("made") == len(pids) == 3
    assert os.getpid() not in pids
    assert sum(steps) == 36
    assert {result["threads"] for result in results.values()} == {"3"}
    assert {result["folder"] for result in results.values()} == {str(Path.cwd())}
    with LocalPool() as local:
        here = run(local, {"base": 3}, jobs)
    assert {key: r["value"] for key, r in here.items()} == {
        key: r["value"] for key, r in results.items()
    }
    assert "ray" not in sys.modules


@needs_ray
def test_a_job_whose_worker_is_killed_is_run_again(pool: RayPool, tmp_path: Path) -> None:
    shared = {"base": 2, "log": str(tmp_path / "log")}
    jobs = [Do(f"k{i}", "ab"[i % 2], seconds=0.1) for i in range(8)]
    jobs[3] = Do("killed", "b", "kill once", once=str(tmp_path / "once"), seconds=0.2, steps=2)
    run(pool, shared, jobs)
    lines = lines_of(tmp_path / "log")
    assert lines.count("run killed") == 2
    assert all(lines.count(f"run {job.key}") == 1 for job in jobs if job.key != "killed")


def kill_after(file: Path, nodes: Nodes, number: int) -> None:
    """Kill a node as soon as a file is there."""
    while not file.exists():
        time.sleep(0.05)
    nodes.kill(number)


@needs_ray
def test_a_node_that_goes_takes_no_result_with_it(
    pool: RayPool, nodes: Nodes, tmp_path: Path
) -> None:
    once = tmp_path / "once"
    jobs = [Do(f"n{i}", "abc"[i % 3], seconds=0.2) for i in range(9)]
    # Works until the node is gone, if it is on this node.
    jobs += [Do(f"w{i}", f"w{i}", seconds=3) for i in range(3)]

    killer = threading.Thread(target=kill_after, args=(once, nodes, 2))
    killer.start()
    results: Results = {}

    def keep(job: Do, result: dict[str, Any]) -> None:
        once.touch()
        assert job.key not in results
        results[job.key] = result

    shared = {"base": 2, "log": str(tmp_path / "log")}
    pool.run_jobs(make, shared, jobs, on_result=keep)
    killer.join()
    assert len(results) == len(jobs)
    # Each worker that was made, and every job at least once.
    assert len(lines_of(tmp_path / "log")) >= len(jobs) + 3


@needs_ray
def test_a_head_that_is_killed_ends_the_call(pool: RayPool, nodes: Nodes, tmp_path: Path) -> None:
    once = tmp_path / "once"
    killer = threading.Thread(target=kill_after, args=(once, nodes, 0))
    killer.start()
    begun = time.monotonic()
    with pytest.raises(ExecutorError) as caught:
        run(pool, {"base": 1}, [Do("long", what="wait once", once=str(once))])
    assert time.monotonic() - begun < 30
    killer.join()
    assert "--resume" in caught.value.hint


# Interrupted -----------------------------------------------------------------------------------

_SWEEP = """
import sys
from merge.background.pool.cluster import RayPool
from merge.cli.signals import Terminated, UnwindingSignals
from tests.background.pool_jobs import Do, make
with UnwindingSignals():
    try:
        with RayPool(address="local") as pool:
            job = Do("long", what="wait once", once=sys.argv[1])
            pool.run_jobs(make, {"base": 1}, [job], on_result=print)
    except (KeyboardInterrupt, Terminated) as error:
        print("unwound", type(error).__name__)
"""


def processes_with(variable: str) -> list[str]:
    """Return the commands of the processes whose environment has a variable of this value."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if variable.encode() in (folder / "environ").read_bytes():
                found.append((folder / "cmdline").read_text().replace("\0", " "))
        except OSError:
            continue
    return found


@needs_ray
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_an_interruption_leaves_no_process(tmp_path: Path, number: signal.Signals) -> None:
    once = tmp_path / "once"
    with ray_folder() as folder:
        child = subprocess.Popen(
            [sys.executable, "-c", _SWEEP, str(once)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**environment(), "RAY_TMPDIR": folder},
        )
        until = time.monotonic() + 60
        while not once.exists() and child.poll() is None and time.monotonic() < until:
            time.sleep(0.05)
        begun = time.monotonic()
        child.send_signal(number)
        said, errors = child.communicate(timeout=60)
        assert time.monotonic() - begun < 20
        if number == signal.SIGINT:
            assert said == "unwound KeyboardInterrupt\n", errors
        assert errors == ""
        until = time.monotonic() + 20
        while processes_with(f"RAY_TMPDIR={folder}") and time.monotonic() < until:
            time.sleep(0.2)
        assert processes_with(f"RAY_TMPDIR={folder}") == []
