"""Every CUDA test and benchmark in one go, and one summary; nothing has to be installed.

    PYTHONPATH=WHEELS python scripts/bench/gpu_check.py

Runs from a checkout with the python that has CUDA; packages that it lacks may lie on PYTHONPATH as
unpacked or zipped wheels. A test file whose packages are not there is skipped by name. All parts
run, whatever fails; the exit status then is 1.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "scripts" / "bench" / "results"
BENCHMARKS = {
    "merge": ["scripts/bench/merge.py", "sd15", "sd15-lora", "--device", "cuda"],
    "edit": [
        *("scripts/bench/edit.py", "--device", "cuda", "--dtype", "float16"),
        *("--width", "320", "--size", "512", "--compile"),
    ],
    "sweep": ["scripts/bench/sweep.py", "--device", "cuda", "--tune"],
}
_MISSING = re.compile(r"ModuleNotFoundError: No module named '([\w.]+)'")
_COUNTS = re.compile(r"(\d+) (passed|failed|skipped|error)")


@dataclass
class Part:
    """What became of one test file or benchmark.

    Attributes:
        name: The file's, or the benchmark's.
        outcome: `passed`, `failed` or `skipped`.
        detail: Counts, the missing package, or the last line.
        seconds: Wall time.
    """

    name: str
    outcome: str
    detail: str
    seconds: float


def main() -> int:
    options = parse_options()
    if not options.device and not has_cuda():
        print("gpu-check: skipped, torch finds no CUDA device")
        return 0
    parts = [run_tests(path, options.mark) for path in test_files(options.mark)]
    parts += [run_benchmark(name, words) for name, words in BENCHMARKS.items() if options.bench]
    print(summary(parts))
    if options.out is not None:
        options.out.write_text(json.dumps([asdict(part) for part in parts], indent=2) + "\n")
        print(f"written: {options.out}")
    return int(any(part.outcome == "failed" for part in parts))


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mark", default="gpu", help="which tests")
    parser.add_argument("--device", action="store_true", help="do not look for CUDA first")
    parser.add_argument("--no-bench", dest="bench", action="store_false", help="tests alone")
    parser.add_argument("--out", type=Path, default=RESULTS / "gpu-check.json", help="summary")
    return parser.parse_args()


def has_cuda() -> bool:
    code = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    return subprocess.run([sys.executable, "-c", code], env=environment()).returncode == 0


def test_files(mark: str) -> list[Path]:
    """Return the test files that have such tests, without importing any."""
    paths = sorted((ROOT / "tests").rglob("test_*.py"))
    return [path for path in paths if f"mark.{mark}" in path.read_text(encoding="utf-8")]


def environment() -> dict[str, str]:
    """Return the environment of children: this checkout first, then what the caller's path has."""
    given = os.environ.get("PYTHONPATH", "")
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), given)))}


def run_tests(path: Path, mark: str) -> Part:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-m",
        mark,
        str(path),
    ]
    code, output, seconds = run(command)
    missing = _MISSING.search(output)
    counts = ", ".join(f"{number} {what}" for number, what in _COUNTS.findall(output[-500:]))
    if code and missing and "error" in output and " passed" not in output[-500:]:
        return Part(path.name, "skipped", f"needs {missing[1]}, which is not there", seconds)
    # 5: no test of the file has the mark.
    return Part(path.name, "failed" if code not in (0, 5) else "passed", counts, seconds)


def run_benchmark(name: str, words: list[str]) -> Part:
    code, output, seconds = run([sys.executable, *words])
    lines = [line for line in output.splitlines() if line.strip()]
    return Part(name, "failed" if code else "passed", lines[-1] if lines else "", seconds)


def run(command: list[str]) -> tuple[int, str, float]:
    """Run a command, pass its output on as it comes, and return it too."""
    started = time.perf_counter()
    lines = []
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as child:
        assert child.stdout is not None
        for line in child.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    return child.returncode, "".join(lines), time.perf_counter() - started


def summary(parts: list[Part]) -> str:
    rows = [f"{p.outcome:<8}{p.seconds:>7.0f} s  {p.name}: {p.detail}" for p in parts]
    total = sum(part.seconds for part in parts)
    return "\n".join(["", "gpu-check", *rows, f"{len(parts)} parts in {total:.0f} s"])


if __name__ == "__main__":
    sys.exit(main())
