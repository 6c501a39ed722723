"""The one command for a machine with a GPU: it runs from a checkout, skips by name, sums up."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.bench import gpu_check

ROOT = Path(__file__).parents[2]


def test_without_a_device_it_says_so() -> None:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "scripts/bench/gpu_check.py"]
    child = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (child.returncode, child.stdout) == (
        0,
        "gpu-check: skipped, torch finds no CUDA device\n",
    )


def test_every_file_with_a_cuda_test_is_found() -> None:
    names = {path.name for path in gpu_check.test_files("gpu")}
    assert {"test_gpu_engine.py", "test_gpu_forms.py", "test_editor.py"} <= names


def test_children_see_what_lies_on_the_path(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert gpu_check.environment()["PYTHONPATH"] == f"{gpu_check.ROOT}{os.pathsep}{tmp_path}"


@pytest.mark.parametrize(
    ("text", "outcome", "detail"),
    [
        ("def test_it(): pass", "passed", "1 passed"),
        ("def test_it(): assert False", "failed", "1 failed"),
        ("import no_such_wheel\ndef test_it(): pass", "skipped", "needs no_such_wheel, which"),
        ("def test_it(): import no_such_wheel", "failed", "1 failed"),
    ],
)
def test_a_part_is_called_what_became_of_it(
    tmp_path: Path, text: str, outcome: str, detail: str
) -> None:
    path = tmp_path / "test_part.py"
    path.write_text(text)
    part = gpu_check.run_tests(path, "not gpu")
    assert part.outcome == outcome
    assert detail in part.detail


def test_all_parts_run_and_a_failure_is_the_exit_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_check, "test_files", lambda mark: [])
    benchmarks = {"a": ["-c", "import sys; sys.exit('broken')"], "b": ["-c", "print('ratio 2')"]}
    monkeypatch.setattr(gpu_check, "BENCHMARKS", benchmarks)
    out = tmp_path / "summary.json"
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--device", "--out", str(out)])
    assert gpu_check.main() == 1
    told = capsys.readouterr().out
    assert "a: broken" in told
    assert "b: ratio 2" in told
    rows = json.loads(out.read_text())
    assert [(row["name"], row["outcome"]) for row in rows] == [("a", "failed"), ("b", "passed")]
