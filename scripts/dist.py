"""Make what is published: a source archive, a wheel with the compiled sums, and one without.

The wheels are built from the archive, so it holds all that they need. pip takes the wheel whose tag
fits a machine best: the compiled one where its library runs, else the pure one, `any`. With that
one torch makes the sums, the same bits but slower, also on macOS and arm64 Linux, where they would
compile: `pip install --no-binary instruct-merge instruct-merge` does that. With
`--cross aarch64-linux-gnu-gcc` there is a compiled wheel for arm64 Linux, too.

The same sources and compiler make the same bytes: times are SOURCE_DATE_EPOCH or the backend's own.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def build(folder: Path, root: Path = ROOT, cross: Sequence[str] = ()) -> list[Path]:
    """Build into a folder; return the archive, the compiled wheels and the pure one.

    Args:
        folder: Where they go; what is there under their names is replaced.
        root: The sources.
        cross: Compilers for other machines, for a wheel each.

    Raises:
        SystemExit: A wheel that should be compiled is not.
    """
    folder = folder.absolute()
    archive = _backend(root, folder, "sdist")
    wheels = []
    with tempfile.TemporaryDirectory() as place:
        with tarfile.open(archive) as opened:
            opened.extractall(place, filter="data")
        (source,) = Path(place).iterdir()
        for variables in ({}, *({"CC": compiler} for compiler in cross)):
            wheels.append(_backend(source, folder, "wheel", **variables))
            if wheels[-1].stem.endswith("-any"):
                sys.exit(
                    f"{variables.get('CC', 'this machine')}: nothing was compiled; is CC right?"
                )
        wheels.append(_backend(source, folder, "wheel", HATCH_BUILD_NO_HOOKS="true"))
    return [archive, *wheels]


def _backend(root: Path, folder: Path, target: str, **variables: str) -> Path:
    """Let the build backend make one file; return it."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as place:
        command = [sys.executable, "-m", "hatchling", "build", "-t", target, "-d", place]
        environment = {**os.environ, **variables}
        subprocess.run(command, cwd=root, env=environment, check=True, stderr=subprocess.PIPE)
        (made,) = Path(place).iterdir()
        return made.replace(folder / made.name)


def check(files: Sequence[Path]) -> None:
    """Check metadata, and the tags of compiled wheels for Linux, by others than who made them.

    Raises:
        SystemExit: One would be refused, or promises machines that it does not run on.
    """
    subprocess.run([sys.executable, "-m", "twine", "check", "--strict", *files], check=True)
    for wheel in files:
        platform = wheel.stem.rpartition("-")[2]
        if platform.startswith("linux"):
            sys.exit(
                f"{wheel.name}: PyPI takes no {platform}; does the compiler link to glibc alone?"
            )
        if not platform.startswith("manylinux"):
            continue
        shown = subprocess.run(
            [sys.executable, "-m", "auditwheel", "show", wheel],
            check=True, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        print(shown.stdout.strip())
        if f'"{platform}"' not in shown.stdout:
            sys.exit(f"{wheel.name}: auditwheel finds another platform")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "dist")
    parser.add_argument("--cross", action="append", default=[], metavar="CC")
    words = parser.parse_args()
    files = build(words.out, cross=words.cross)
    check(files)
    for file in files:
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        print(f"{digest}  {file.stat().st_size / 1e6:.1f} MB  {file}")


if __name__ == "__main__":
    main()
