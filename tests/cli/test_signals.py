"""SIGINT and SIGTERM at awkward moments: never lost, never a hang, never a disturbed clean-up."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from merge import load_recipe
from merge.cli.main import main
from merge.engine.units import Unit, WorkQueue
from merge.run.stages import run_recipe
from merge.writer.tensors import TensorFileWriter
from tests.mini import write_models, write_recipe

PREAMBLE = """
    import os, signal, sys, time
    from merge.cli.signals import Terminated, UnwindingSignals
    raise_signal = signal.raise_signal
"""


def run_script(body: str) -> subprocess.CompletedProcess[str]:
    script = textwrap.dedent(PREAMBLE) + textwrap.dedent(body)
    return subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=30, check=False
    )


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_swallowed_signal_is_raised_again(name: str) -> None:
    done = run_script(f"""
        with UnwindingSignals() as signals:
            try:
                for _ in range(3):
                    try:
                        raise_signal(signal.{name})
                        time.sleep(5)
                        print("lost")
                    except BaseException:
                        pass  # as the import of some extension modules does
                time.sleep(5)
                print("lost")
            except (KeyboardInterrupt, Terminated) as error:
                signals.end()
                print(type(error).__name__)
    """)
    expected = "KeyboardInterrupt" if name == "SIGINT" else "Terminated"
    assert (done.stdout, done.stderr, done.returncode) == (f"{expected}\n", "", 0)


def test_a_signal_lost_in_a_finalizer_is_raised_again() -> None:
    done = run_script("""
        class Finalized:
            def __del__(self):
                raise_signal(signal.SIGTERM)

        with UnwindingSignals() as signals:
            try:
                Finalized()
                time.sleep(5)
                print("lost")
            except Terminated:
                signals.end()
                print("unwound")
    """)
    assert done.stdout == "unwound\n"
    assert "Exception ignored in" in done.stderr


def test_an_import_is_finished_first(tmp_path: Path) -> None:
    (tmp_path / "heavy.py").write_text(
        "import signal, time\n"
        "signal.raise_signal(signal.SIGTERM)\n"
        "time.sleep(0.3)\n"
        "print('imported')\n"
    )
    done = run_script(f"""
        sys.path.insert(0, {str(tmp_path)!r})
        with UnwindingSignals() as signals:
            try:
                import heavy
                time.sleep(5)
                print("lost")
            except Terminated:
                signals.end()
                print("unwound")
    """)
    assert (done.stdout, done.stderr) == ("imported\nunwound\n", "")


def test_clean_up_is_not_disturbed() -> None:
    done = run_script("""
        from contextlib import ExitStack, contextmanager

        @contextmanager
        def resource():
            try:
                yield
            finally:
                for _ in range(4):
                    raise_signal(signal.SIGINT)
                    time.sleep(0.1)
                print("generator", flush=True)

        class Resource:
            def __enter__(self):
                return self
            def __exit__(self, *exception):
                raise_signal(signal.SIGTERM)
                time.sleep(0.3)
                print("exit", flush=True)

        with UnwindingSignals() as signals:
            try:
                with Resource(), ExitStack() as stack:
                    stack.enter_context(resource())
                    try:
                        raise_signal(signal.SIGTERM)
                        print("lost")
                    except BaseException:
                        time.sleep(0.3)
                        try:
                            {}["another error in between"]
                        except KeyError:
                            time.sleep(0.2)
                        print("except", flush=True)
                        raise
            except Terminated:
                signals.end()
                time.sleep(0.3)
                print("unwound")
        raise_signal(signal.SIGINT)
        print("exits with its own code")
    """)
    words = ["except", "generator", "exit", "unwound", "exits with its own code"]
    assert (done.stdout.splitlines(), done.stderr) == (words, "")


def test_without_a_signal_everything_is_as_before() -> None:
    done = run_script("""
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)
        before = [signal.getsignal(number) for number in numbers]
        with UnwindingSignals() as signals:
            assert [signal.getsignal(number) for number in numbers] != before
        assert [signal.getsignal(number) for number in numbers] == before
        assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
    """)
    assert (done.stderr, done.returncode) == ("", 0)


def interrupted_in_start(monkeypatch: pytest.MonkeyPatch, prefix: str) -> None:
    """Let Ctrl-C come where it comes most easily: in Thread.start, when the thread runs."""
    start = threading.Thread.start

    def start_and_interrupt(thread: threading.Thread) -> None:
        start(thread)
        if thread.name.startswith(prefix):
            raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "start", start_and_interrupt)


@pytest.mark.parametrize("prefix", ["digest", "merge", "files"])
def test_a_signal_while_a_thread_starts_leaves_no_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prefix: str
) -> None:
    write_models(tmp_path)
    # Only a whole pipeline has files to copy beside the merge.
    recipe = load_recipe("demo" if prefix == "files" else write_recipe(tmp_path))
    interrupted_in_start(monkeypatch, prefix)
    with pytest.raises(KeyboardInterrupt):
        run_recipe(recipe, tmp_path / "out", verify=False)
    left = [thread for thread in threading.enumerate() if thread.name.startswith(prefix)]
    for thread in left:
        thread.join(timeout=10)
    assert not [thread for thread in left if thread.is_alive()]
    assert not (tmp_path / "out").exists()


def test_every_worker_has_left_the_file_before_it_is_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_models(tmp_path)
    recipe = load_recipe(write_recipe(tmp_path))
    at_work = threading.Event()
    closed_at_work = []
    take, start, close = WorkQueue.take, threading.Thread.start, TensorFileWriter.close

    def slow_take(queue: WorkQueue) -> Iterator[Unit]:
        for unit in take(queue):
            at_work.set()
            time.sleep(0.3)
            yield unit
            at_work.clear()

    def start_and_interrupt(thread: threading.Thread) -> None:
        start(thread)
        if thread.name.startswith("merge"):
            assert at_work.wait(10)
            raise KeyboardInterrupt

    def checked_close(writer: TensorFileWriter) -> None:
        closed_at_work.append(at_work.is_set())
        close(writer)

    monkeypatch.setattr(WorkQueue, "take", slow_take)
    monkeypatch.setattr(threading.Thread, "start", start_and_interrupt)
    monkeypatch.setattr(TensorFileWriter, "close", checked_close)
    with pytest.raises(KeyboardInterrupt):
        run_recipe(recipe, tmp_path / "out", verify=False, threads=1)
    assert closed_at_work == [False]


# Python's own start is not the tool's: the child says when its handlers are in place.
READY = """
import sys
from merge.cli.signals import UnwindingSignals

enter = UnwindingSignals.__enter__

def enter_and_tell(self):
    enter(self)
    print("ready", flush=True)
    return self

UnwindingSignals.__enter__ = enter_and_tell
from merge.__main__ import main
main()
"""


def start_run(recipe: str | Path, out: Path) -> subprocess.Popen[str]:
    """Start a run, and return once a signal is the tool's to handle."""
    words = ["run", str(recipe), "--out", str(out), "--overwrite"]
    child = subprocess.Popen(
        [sys.executable, "-c", READY, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    return child


def length_of(recipe: str | Path, out: Path) -> float:
    """Return how long a run takes that nothing interrupts, in seconds of this machine now."""
    child = start_run(recipe, out)
    started = time.perf_counter()
    child.communicate()
    assert child.returncode == 0
    return time.perf_counter() - started


def interrupt_at(recipe: str | Path, out: Path, moments: random.Random, longest_s: float) -> bool:
    """Send a signal at a random moment of a run; return False when it came too late."""
    number, code, word = moments.choice(
        [(signal.SIGINT, 130, "interrupted: "), (signal.SIGTERM, 143, "terminated: ")]
    )
    child = start_run(recipe, out)
    time.sleep(moments.random() * longest_s)
    is_late = child.poll() is not None
    child.send_signal(number)
    _, err = child.communicate(timeout=120)
    assert "Traceback" not in err
    if child.returncode != 0:
        assert (child.returncode, word in err) == (code, True), err
    # A moment before the end nothing is left to interrupt.
    return not is_late and child.returncode == code


def test_a_signal_at_any_moment_ends_the_run(tmp_path: Path) -> None:
    write_models(tmp_path)
    recipe = write_recipe(tmp_path)
    moments = random.Random(1)
    longest_s = length_of(recipe, tmp_path / "out")
    ended = [interrupt_at(recipe, tmp_path / "out", moments, longest_s) for _ in range(5)]
    # However much faster the machine has become: at the first moment nothing is done yet.
    ended.append(interrupt_at(recipe, tmp_path / "out", moments, 0.0))
    assert any(ended)


def test_a_signal_in_the_closing_edits_tells_that_the_output_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("merge.run.stages.verify_output", interrupt)
    out = tmp_path / "my output"
    with pytest.raises(SystemExit) as stop:
        main(["run", "demo", "--out", str(out)])
    assert stop.value.code == 130
    told = capsys.readouterr().err
    assert f"interrupted: {out} is complete, but not verified\n" in told
    assert f"hint: `instruct-merge verify '{out}'` does that\n" in told
    assert sorted(tmp_path.iterdir()) == [out]


def test_an_interrupted_repetition_is_gone_on_with_or_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    def command(*words: str) -> tuple[object, str]:
        with pytest.raises(SystemExit) as stop:
            main(words)
        return stop.value.code, capsys.readouterr().err

    write_models(tmp_path)
    first, again = str(tmp_path / "first"), str(tmp_path / "again")
    run_recipe(load_recipe(write_recipe(tmp_path)), first, verify=False)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with monkeypatch.context() as patch:
        patch.setattr("merge.run.finish.build_manifest", interrupt)
        code, told = command("reproduce", first)
        assert (code, told.splitlines()[-1]) == (130, "interrupted: nothing half-written is left")
        assert not list(Path().iterdir())
        code, told = command("reproduce", first, "--out", again)
        assert code == 130
        (kept,) = tmp_path.glob("again.partial-*")
        assert f"interrupted: {kept} is kept\n" in told
        words = ["reproduce", first, "--out", again, "--resume"]
        assert f"hint: `instruct-merge {' '.join(words)}` goes on with it\n" in told
    code, told = command(*words)
    assert (code, kept.exists()) == (0, False)
    assert "reproduced: " in told
    code, told = command("reproduce", first, "--resume")
    assert (code, "--resume needs --out" in told) == (2, True)


@pytest.mark.slow
def test_a_signal_at_any_of_many_moments_ends_the_run(tmp_path: Path) -> None:
    write_models(tmp_path)
    moments = random.Random(2)
    for recipe, count in (write_recipe(tmp_path), 200), ("demo", 50):
        longest_s = length_of(recipe, tmp_path / "out")
        ended = [interrupt_at(recipe, tmp_path / "out", moments, longest_s) for _ in range(count)]
        assert sum(ended) > count // 3
