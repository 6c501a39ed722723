"""What is published: its tags and contents, and what it does in empty environments."""

from __future__ import annotations

import hashlib
import importlib
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

from merge import __version__, load_recipe, run_recipe
from merge.engine.fused import LIBRARY, load_library

NAME = f"instruct_merge-{__version__}"
LIBRARY_NAME = "merge/engine/_fused.so"
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
needs_compiler = pytest.mark.skipif(
    load_library() is None or shutil.which("cc") is None, reason="fused.c is not compiled here"
)


def script(name: str) -> ModuleType:
    pytest.importorskip("hatchling", reason="hatchling is not installed")
    return importlib.import_module(f"scripts.{name}")


# Tags --------------------------------------------------------------------------------------------


@needs_compiler
@pytest.mark.skipif(sys.platform != "linux", reason="this is no Linux")
def test_a_library_is_tagged_by_the_symbols_that_it_asks_for(tmp_path: Path) -> None:
    build = script("build_fused")
    library = tmp_path / "library.so"
    assert build.compile_library(LIBRARY.with_name("fused.c"), library)
    machine = os.uname().machine
    assert build.platform_of(library) == f"manylinux_2_17_{machine}"
    data = library.read_bytes()
    for old, new, expected in (
        (
            b"\0GLIBC_2.",
            b"\0GLIBC_3.",
            f"manylinux_3_{14 if machine == 'x86_64' else 17}_{machine}",
        ),
        (b"\0GLIBC_2.", b"\0OTHER_2.", f"linux_{machine}"),
        (b"\0libc.so.6\0", b"\0libx.so.6\0", f"linux_{machine}"),
        (b"\x7fELF", b"\x7fELM", f"linux_{machine}"),
    ):
        assert old in data
        library.write_bytes(data.replace(old, new))
        assert build.platform_of(library) == expected
    elsewhere = bytearray(data)
    elsewhere[18:20] = (183 if machine == "x86_64" else 62).to_bytes(2, "little")
    library.write_bytes(elsewhere)
    other = "aarch64" if machine == "x86_64" else "x86_64"
    assert build.platform_of(library) == f"manylinux_2_17_{other}"


# Files -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What `make dist` makes, by kind."""
    made = script("dist").build(tmp_path_factory.mktemp("dist"))
    return dict(zip(("archive", "compiled", "pure"), made, strict=True))


@pytest.mark.slow
@needs_compiler
def test_three_files_are_made_under_names_that_pypi_takes(files: dict[str, Path]) -> None:
    assert files["archive"].name == f"{NAME}.tar.gz"
    assert files["pure"].name == f"{NAME}-py3-none-any.whl"
    platform = "manylinux_2_17" if sys.platform == "linux" else "macosx"
    assert files["compiled"].name.startswith(f"{NAME}-py3-none-{platform}_")
    for kind, path in list(files.items())[1:]:
        with zipfile.ZipFile(path) as wheel:
            words = wheel.read(f"{NAME}.dist-info/WHEEL").decode().splitlines()
        assert f"Tag: {'-'.join(path.stem.split('-')[2:])}" in words
        assert f"Root-Is-Purelib: {'true' if kind == 'pure' else 'false'}" in words


@pytest.mark.slow
@needs_compiler
def test_wheels_hold_the_package_and_the_archive_what_builds_it(files: dict[str, Path]) -> None:
    contents = {}
    for kind in ("compiled", "pure"):
        with zipfile.ZipFile(files[kind]) as wheel:
            contents[kind] = set(wheel.namelist())
        assert {name.split("/")[0] for name in contents[kind]} == {"merge", f"{NAME}.dist-info"}
    assert contents["compiled"] - contents["pure"] == {LIBRARY_NAME}
    assert contents["pure"] < contents["compiled"]
    with tarfile.open(files["archive"]) as archive:
        names = {name.removeprefix(f"{NAME}/") for name in archive.getnames()}
    engine = LIBRARY.parent
    assert {f"merge/engine/{path.name}" for path in engine.glob("*.[ch]")} < names
    assert {"scripts/build_fused.py", "tests/fused_harness.c", "pyproject.toml", "LICENSE"} < names
    assert LIBRARY_NAME not in names
    recipes = {name for name in names if name.startswith("recipes/") and "." in name}
    assert {name.replace("recipes/", "merge/bundled/", 1) for name in recipes} < contents["pure"]


@pytest.mark.slow
@needs_compiler
def test_the_same_sources_make_the_same_bytes(files: dict[str, Path], tmp_path: Path) -> None:
    # From another folder, where files are newer and permissions others.
    with tarfile.open(files["archive"]) as archive:
        archive.extractall(tmp_path, filter="data")
    root = tmp_path / NAME
    for path in root.rglob("*"):
        path.chmod(0o700 if path.is_dir() else 0o600)
    again = script("dist").build(tmp_path / "again", root)
    for first, second in zip(files.values(), again, strict=True):
        assert first.name == second.name
        digests = {hashlib.sha256(path.read_bytes()).hexdigest() for path in (first, second)}
        assert len(digests) == 1, first.name


@pytest.mark.slow
def test_without_a_compiler_no_file_passes_for_the_compiled_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", "false")
    with pytest.raises(SystemExit, match="this machine: nothing was compiled"):
        script("dist").build(tmp_path)


# Installations -----------------------------------------------------------------------------------


def run(*words: object, folder: Path) -> str:
    """Run a program in an empty folder, without what leads Python to the checkout."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment["HF_HUB_OFFLINE"] = "1"
    done = subprocess.run(
        [str(word) for word in words], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def borrow(environment: Path) -> None:
    """Lend an environment what is installed in this one.

    Borrowed folders are searched last, and their own .pth files are not read: an installation for
    editing that this environment has does not come along.
    """
    (site,) = environment.glob("lib/python*/site-packages")
    borrowed = [path for path in sys.path if Path(path).name == "site-packages"]
    (site / "borrowed.pth").write_text("\n".join(borrowed))


def install(file: Path, folder: Path) -> Path:
    """Install into a fresh environment that borrows all else; return its programs' folder."""
    run(sys.executable, "-m", "venv", folder / "venv", folder=folder)
    borrow(folder / "venv")
    programs = folder / "venv" / "bin"
    run(
        programs / "python", "-m", "pip", "install", "--quiet", "--no-deps", "--no-index",
        "--ignore-installed", "--no-build-isolation", "--disable-pip-version-check", file,
        folder=folder,
    )  # fmt: skip
    return programs


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize(
    ("platform", "kind"),
    [
        ("manylinux_2_17_x86_64", "compiled"),
        ("manylinux_2_17_aarch64", "pure"),
        ("macosx_14_0_arm64", "pure"),
        ("", "archive"),
    ],
)
@pytest.mark.skipif(sys.platform != "linux" or os.uname().machine != "x86_64", reason="not x86-64")
def test_pip_takes_the_compiled_wheel_where_it_runs(
    files: dict[str, Path], tmp_path: Path, platform: str, kind: str
) -> None:
    run(sys.executable, "-m", "venv", tmp_path / "venv", folder=tmp_path)
    # pip asks an archive for its name by the build backend, which is borrowed.
    borrow(tmp_path / "venv")
    words = ["--only-binary", ":all:", "--platform", platform]
    if not platform:
        words = ["--no-binary", "instruct-merge", "--no-build-isolation"]
    run(
        tmp_path / "venv" / "bin" / "python", "-m", "pip", "download", "--quiet", "--no-deps",
        "--no-index", "--disable-pip-version-check", "--find-links", files["pure"].parent,
        "--dest", "taken", *words, "instruct-merge",
        folder=tmp_path,
    )  # fmt: skip
    assert [path.name for path in (tmp_path / "taken").iterdir()] == [files[kind].name]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    out = tmp_path_factory.mktemp("here") / "out"
    return (run_recipe(load_recipe("demo"), out, verify=False).folder / WEIGHTS).read_bytes()


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("kind", ["archive", "compiled", "pure"])
def test_an_installed_file_merges_anywhere(
    files: dict[str, Path], weights: bytes, tmp_path: Path, kind: str
) -> None:
    programs = install(files[kind], tmp_path)
    python, command = programs / "python", programs / "instruct-merge"
    place = run(python, "-c", "import merge; print(merge.__file__)", folder=tmp_path)
    assert Path(place).is_relative_to(tmp_path / "venv")
    assert __version__ in run(python, "-m", "merge", "--version", folder=tmp_path)
    sums = "torch alone" if kind == "pure" else "one pass, compiled"
    assert sums in run(command, "env", folder=tmp_path)
    run(command, "run", "demo", "--device", "cpu", "--out", "out", folder=tmp_path)
    # Whatever made the sums, the bytes are those of the checkout.
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == weights
