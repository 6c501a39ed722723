"""Compile `merge/engine/fused.c` while the package is built or installed for editing.

A hook of the build backend. Without a C compiler the package is whole all the same: torch then
computes what the library would, in some more passes over memory. `CC` names another compiler, also
one for another machine: the wheel's tag says what its library runs on.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from packaging.tags import sys_tags

# GCC and clang know them, on Linux and macOS; Python loads a .so on both.
FLAGS = ("-O3", "-ffp-contract=off", "-fPIC", "-shared")

# From `e_machine` of an ELF header to a tag's last part.
MACHINES = {62: "x86_64", 183: "aarch64"}
# The oldest glibc that a manylinux tag stands for on both of them. Source: PEP 599.
OLDEST = (2, 17)


class FusedHook(BuildHookInterface):
    """Puts the library beside its source and into the wheel."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile, and mark the wheel as one for this platform where that succeeded."""
        if self.target_name != "wheel":
            return
        source = Path(self.root) / "merge" / "engine" / "fused.c"
        library = source.with_name("_fused.so")
        if not compile_library(source, library):
            library.unlink(missing_ok=True)
            self.app.display_warning("no C compiler: merges will use torch alone, and be slower")
            return
        # Git ignores it, and what Git ignores is otherwise left out.
        build_data["artifacts"].append("merge/engine/_fused.so")
        build_data["pure_python"] = False
        # ctypes loads it: it knows nothing of Python's versions.
        build_data["tag"] = f"py3-none-{platform_of(library)}"


def compile_library(source: Path, library: Path) -> bool:
    """Compile a C file into a shared library; return False where that is not possible."""
    compiler = os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc"
    with tempfile.TemporaryDirectory() as folder:
        # Elsewhere first: a library that a running process has loaded must not change under it.
        made = Path(folder) / library.name
        command = [*shlex.split(compiler), *FLAGS, "-o", str(made), str(source)]
        try:
            subprocess.run(command, check=True, capture_output=True)
            library.unlink(missing_ok=True)
            library.write_bytes(made.read_bytes())
        except (OSError, subprocess.CalledProcessError):
            return False
    return True


def platform_of(library: Path) -> str:
    """Return the platform tag of a wheel that holds this library and no other.

    With glibc alone that is the manylinux tag of the newest symbol version that it asks for; else
    this machine's own tag, which PyPI takes on macOS and not on Linux. Source: PEP 600.
    """
    data = library.read_bytes()
    machine = MACHINES.get(int.from_bytes(data[18:20], "little"))
    versions = re.findall(rb"(?<=\0)GLIBC_(\d+)\.(\d+)", data)
    needed = set(re.findall(rb"(?<=\0)lib[\w+-]+\.so[.\d]*(?=\0)", data))
    if not data.startswith(b"\x7fELF") or not machine or not versions or needed != {b"libc.so.6"}:
        return next(sys_tags()).platform
    major, minor = max(OLDEST, *((int(one), int(other)) for one, other in versions))
    return f"manylinux_{major}_{minor}_{machine}"
