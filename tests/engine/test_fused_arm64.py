"""The compiled sums on AArch64: the bits of x86-64 and of numpy, under an emulator.

`fused_harness.c` is compiled for both machines and runs the library of each on the same cases.
"""

from __future__ import annotations

import itertools
import platform
import shutil
import struct
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from merge.engine.fused import LIBRARY
from merge.plan.memory import panel_elements

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(platform.machine() != "x86_64", reason="compares with x86-64"),
]

SOURCE = LIBRARY.with_name("fused.c")
HARNESS = Path(__file__).with_name("fused_harness.c")
# The oldest processor that is emulated: nothing newer than ARMv8.0 may be needed.
EMULATOR = ("qemu-aarch64", "-cpu", "cortex-a53", "-L", "/usr/aarch64-linux-gnu")
COMPILERS = {
    "gcc": "aarch64-linux-gnu-gcc",
    "clang": "clang --target=aarch64-linux-gnu",
}
CODES = {"F16": 0, "BF16": 1, "F32": 2}
BITS = {"F16": np.uint16, "BF16": np.uint16, "F32": np.uint32}
KINDS = {"delta": 0, "product": 1, "low rank": 2}


def floats(code: str, bits: np.ndarray) -> np.ndarray:
    """Widen bits to float32, exactly."""
    if code == "BF16":
        return (bits.astype(np.uint32) << 16).view(np.float32)
    return bits.view(np.float16 if code == "F16" else np.float32).astype(np.float32)


def rounded(code: str, values: np.ndarray) -> np.ndarray:
    """Round float32 to bits, to nearest even; what is no number is left undefined."""
    if code == "F32":
        return values.view(np.uint32)
    if code == "F16":
        return values.astype(np.float16).view(np.uint16)
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


@dataclass(frozen=True)
class Case:
    """One call: its arrays are bits of stored values, and float64 for what is multiplied."""

    kind: str
    out: str
    codes: tuple[str, ...]
    arrays: tuple[np.ndarray, ...]
    factor: float
    offset: int = 0

    @property
    def shape(self) -> tuple[int, int, int]:
        if self.kind != "low rank":
            return 0, 0, 0
        return (len(self.arrays[2]), *self.arrays[0].shape)

    def encoded(self) -> bytes:
        codes = [CODES[code] for code in (*self.codes, *("F16",) * (3 - len(self.codes)))]
        numbers = (KINDS[self.kind], CODES[self.out], *codes, self.offset, self.arrays[0].size)
        head = struct.pack("<10qd", *numbers, *self.shape, self.factor)
        return head + b"".join(array.tobytes() for array in self.arrays)

    def sums(self) -> np.ndarray:
        """Return the float32 sums; of a low-rank product only whether they are numbers is exact."""
        target = floats(self.codes[0], self.arrays[0])
        if self.kind == "delta":
            distilled, base = map(floats, self.codes[1:], self.arrays[1:])
            return target + (distilled - base) * np.float32(self.factor)
        product = self.arrays[1] if self.kind == "product" else self.arrays[1] @ self.arrays[2]
        return target + (product * self.factor).astype(np.float32)


@dataclass(frozen=True)
class Result:
    panels: bytes
    flags: int
    spoilt: int
    bits: np.ndarray


def decode(data: bytes, cases: Iterable[Case]) -> Iterator[Result]:
    at = 0
    for case in cases:
        rank, _, columns = case.shape
        end = at + panel_elements(rank, columns) * 8
        flags, spoilt = struct.unpack_from("<2q", data, end)
        bits = np.frombuffer(data, BITS[case.out], case.arrays[0].size, end + 16)
        yield Result(data[at:end], flags, spoilt, bits)
        at = end + 16 + bits.nbytes
    assert at == len(data)


# Cases -------------------------------------------------------------------------------------------


def near(rng: np.random.Generator, code: str, *shape: int) -> np.ndarray:
    """Bits of values of the size of weights, with zeros of both signs and subnormals."""
    values = rng.standard_normal(shape) * 2.0 ** rng.integers(-26, 5, shape)
    bits = rounded(code, values.astype(np.float32)).reshape(-1)
    bits[::13], bits[1::13], bits[2::13] = 0, 1 << (8 * bits.itemsize - 1), 3
    return bits.reshape(shape)


def patterns(rng: np.random.Generator) -> Iterator[Case]:
    """Every 16-bit value in every role, and float32 of every size; infinite ones and NaN, too."""
    for out, code, role, factor in itertools.product(CODES, CODES, range(3), (0.3, -1.0, 1e30)):
        every = np.arange(65536, dtype=np.uint16)
        if code == "F32":
            every = rng.integers(0, 2**32, 65536, dtype=np.uint32)
        for other in ("near", "any"):
            arrays = [near(rng, code, 65536) for _ in range(3)]
            if other == "any":
                arrays = [rng.permutation(every) for _ in range(3)]
            arrays[role] = every
            yield Case("delta", out, (code,) * 3, tuple(arrays), factor)


def ties(rng: np.random.Generator) -> Iterator[Case]:
    """What lies halfway between neighbours, and next to that, and next to the ranges' ends."""
    every = np.arange(65536, dtype=np.uint16)
    with np.errstate(invalid="ignore"):
        halves = (floats("F16", every) + floats("F16", np.roll(every, -1))) * np.float32(0.5)
    brain = (every.astype(np.uint32) << 16) | 0x8000
    for middle, step, out in itertools.product((halves.view(np.uint32), brain), (-1, 0, 1), CODES):
        same = near(rng, "F32", 65536)
        target = (middle.astype(np.int64) + step).astype(np.uint32)
        yield Case("delta", out, ("F32",) * 3, (target, same, same), -1.0)
        # The same as a delta, twice as large, to a target of zero.
        zero = np.zeros_like(target)
        yield Case("delta", out, ("F32",) * 3, (zero, target, zero), 0.5)


def tails(rng: np.random.Generator) -> Iterator[Case]:
    """Every length and every pairing of dtypes, at starts of every alignment."""
    for count, codes, out in itertools.product(
        (*range(50), 1021), itertools.product(CODES, repeat=3), CODES
    ):
        arrays = tuple(near(rng, code, count) for code in codes)
        yield Case("delta", out, codes, arrays, 0.7, int(rng.choice((0, 0, *range(1, 32)))))


def outside(rng: np.random.Generator) -> Iterator[Case]:
    """One value that is too large or no number, at every place."""
    large = {"F16": (65519.996, 65520.0), "BF16": (3.396177e38, 3.3961776e38), "F32": (3.4e38,)}
    for out, place in itertools.product(CODES, range(35)):
        for value, role in itertools.product((*large[out], np.inf, np.nan), range(3)):
            arrays = [np.zeros(35, np.float32) for _ in range(3)]
            arrays[role][place] = rng.choice((-1, 1)) * np.float32(value)
            bits = tuple(array.view(np.uint32) for array in arrays)
            yield Case("delta", out, ("F32",) * 3, bits, 1.0)


def products(rng: np.random.Generator) -> Iterator[Case]:
    """Float64 deltas: of every length, of every size, and next to what float32 ties at."""
    for count, code, out in itertools.product((*range(40), 5000), CODES, CODES):
        product = rng.standard_normal(count) * 2.0 ** rng.integers(-30, 3, count)
        arrays = (near(rng, code, count), product)
        yield Case("product", out, (code,), arrays, 0.3, int(rng.integers(32)))
    for out, factor in itertools.product(CODES, (1.0, -0.3, 2.0**-140, 2.0**120)):
        product = rng.integers(0, 2**64, 65536, dtype=np.uint64).view(np.float64)
        wide = floats("F32", rng.integers(0, 2**32, 65536, dtype=np.uint32)).astype(np.float64)
        # Halfway between two float32, normal or subnormal, or one unit beside that.
        tie = (wide.view(np.int64) + 2**28 + rng.integers(-1, 2, 65536)).view(np.float64)
        for values in (product, wide, tie):
            target = near(rng, "F32", 65536) if factor < 0 else np.zeros(65536, np.uint32)
            yield Case("product", out, ("F32",), (target, values), factor)


def low_rank(rng: np.random.Generator) -> Iterator[Case]:
    """Shapes that leave every rest of a tile, and larger ones; then factors that are too large."""
    shapes = [*itertools.product(range(1, 14), (1, 2, 5, 7, 8, 9, 16, 23), (1, 2, 7))]
    shapes += [(64, 320, 128), (320, 77, 16), (3, 8, 1000), (5, 0, 3), (4, 9, 0)]
    for (rows, columns, rank), code, out in itertools.product(shapes, CODES, CODES):
        up = rng.standard_normal((rows, rank)) * 2.0 ** rng.integers(-12, 2, (rows, rank))
        arrays = (near(rng, code, rows, columns), up, rng.standard_normal((rank, columns)))
        offset = int(rng.choice((0, 0, *range(1, 32))))
        yield Case("low rank", out, (code,), arrays, 0.25 / 3, offset)
    for out, value, place in itertools.product(CODES, (np.nan, np.inf, -1e200), range(13)):
        up, down = np.ones((13, 3)), np.ones((3, 19))
        up[place, 1], down[1, place] = value, value
        arrays = (np.zeros((13, 19), np.uint16), up, down)
        yield Case("low rank", out, ("F16",), arrays, 0.5)


CASES = [patterns, ties, tails, outside, products, low_rank]


# Comparing ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Machine:
    """A library and the program that runs it."""

    library: Path
    command: tuple[str, ...]

    def results(self, folder: Path, cases: list[Case]) -> Iterator[Result]:
        given, found = folder / "cases", folder / f"results-{self.library.name}"
        given.write_bytes(b"".join(case.encoded() for case in cases))
        subprocess.run([*self.command, self.library, given, found], check=True, timeout=600)
        return decode(found.read_bytes(), cases)


def build_script() -> ModuleType:
    return pytest.importorskip("scripts.build_fused", reason="hatchling is not installed")


def make_machine(
    folder: Path, monkeypatch: pytest.MonkeyPatch, compiler: str, *emulator: str, source: Path
) -> Machine:
    """Compile as an installation does with this `CC`."""
    words = compiler.split()
    for program in (words[0], *emulator[:1]):
        if shutil.which(program) is None:
            pytest.skip(f"there is no {program}")
    monkeypatch.setenv("CC", compiler)
    folder.mkdir()
    assert build_script().compile_library(source, folder / f"{folder.name}.so")
    program = folder / "harness"
    subprocess.run([*words, "-O1", "-Wall", "-Werror", "-o", program, HARNESS, "-ldl"], check=True)
    return Machine(folder / f"{folder.name}.so", (*emulator, str(program)))


def assert_same(case: Case, one: Result, other: Result) -> None:
    """Compare all but the bits of what is no number, which nobody reads."""
    assert (one.flags, one.spoilt) == (other.flags, 0)
    assert one.panels == other.panels
    with np.errstate(all="ignore"):
        sums = case.sums().reshape(-1)
        is_number = ~np.isnan(sums)
        np.testing.assert_array_equal(one.bits[is_number], other.bits[is_number])
        if case.kind != "low rank":
            expected = rounded(case.out, sums)
            np.testing.assert_array_equal(one.bits[is_number], expected[is_number])


@pytest.mark.parametrize("make_cases", CASES)
@pytest.mark.parametrize("name", COMPILERS)
def test_aarch64_has_the_bits_of_x86(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, make_cases: type[Iterator[Case]]
) -> None:
    arm = make_machine(tmp_path / "arm", monkeypatch, COMPILERS[name], *EMULATOR, source=SOURCE)
    x86 = make_machine(tmp_path / "x86", monkeypatch, "cc", source=SOURCE)
    with np.errstate(all="ignore"):
        cases = list(make_cases(np.random.default_rng(0)))
    for case, found, expected in zip(
        cases, arm.results(tmp_path, cases), x86.results(tmp_path, cases), strict=True
    ):
        assert_same(case, found, expected)


@pytest.mark.parametrize("mode", ["off", "fast"])
def test_a_fused_multiply_add_on_aarch64_would_be_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    build = build_script()
    flags = tuple(flag.replace("=off", f"={mode}") for flag in build.FLAGS)
    assert f"-ffp-contract={mode}" in flags
    monkeypatch.setattr(build, "FLAGS", flags)
    for path in SOURCE.parent.glob("*.[ch]"):
        # Compilers fuse a product that is used once.
        text = path.read_text().replace("deltas = either(deltas, delta);", "")
        (tmp_path / path.name).write_text(text)
    source = tmp_path / SOURCE.name
    arm = make_machine(tmp_path / "arm", monkeypatch, COMPILERS["gcc"], *EMULATOR, source=source)
    rng = np.random.default_rng(0)
    arrays = tuple(near(rng, "F32", 1021) for _ in range(3))
    cases = [Case("delta", "F32", ("F32",) * 3, arrays, 0.7)]
    (found,) = arm.results(tmp_path, cases)
    assert np.array_equal(found.bits, rounded("F32", cases[0].sums())) == (mode == "off")
