"""Time full-size merges against what a user would otherwise run, and against a plain copy.

    python scripts/bench/merge.py                     # everything this machine can hold
    python scripts/bench/merge.py sd15 sd15-lora      # some configurations
    python scripts/bench/merge.py --device cuda

One table, and one JSON: results/merge.json, where a configuration that is not named stays as it was
measured on a machine of the same kind. Every side runs in a fresh process, in turn, pair after
pair, and ratios are taken within a pair, since machines drift:

    naive         load_file of the three UNets, the float32 formula, save_file
    mergekit, sd-mecha   their whole commands, once rivals.py --setup has made their environments
    fuse          diffusers: load the UNet, fuse_lora, save_pretrained
    matmul        the float64 products of a LoRA alone, by as many threads
    transfers     our pipeline with its arithmetic taken out (CUDA only)
    stage         our merge alone: reading, adding and writing, without hashes
    command       `instruct-merge run` as a user starts it: start-up, SHA-256 of every input and of
                  the output, fsync
    floor         the same bytes read and written by as many threads, nothing in between

The output goes to tmpfs where it fits, so that no disk is measured. The naive result and ours are
compared bit by bit. Synthetic models are made under outputs/bench and, unless --keep is given,
removed when no configuration needs them any more.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
# Python puts this script's folder first, where `merge` would be this script.
sys.path[0] = str(ROOT)
# This folder's own modules.
sys.path.insert(1, str(Path(__file__).resolve().parent))

import machine  # noqa: E402
import rivals  # noqa: E402
import tables  # noqa: E402
from sides import CHILDREN, MODELS, PREVIOUS, input_files  # noqa: E402

MODELS_FOLDER = ROOT / "outputs" / "bench"
# What is read at once to bring a file into the page cache.
_CACHED_BYTES = 16 * 1024 * 1024
Runs = dict[str, list[dict[str, Any]]]


@dataclasses.dataclass(frozen=True)
class Configuration:
    """One thing to measure.

    Attributes:
        arch: `sd15` or `sdxl`.
        dtype: Of the inputs; the output is float16, or bfloat16 from bfloat16.
        is_lora: True for a LoRA instead of a full delta.
        is_cold: True when the inputs are taken out of the page cache before every run.
        threads: Of our sides and of the copy; None for every core, up to eight.
        pairs: How often everything runs, if the user does not say.
    """

    arch: str = "sd15"
    dtype: str = "float16"
    is_lora: bool = False
    is_cold: bool = False
    threads: int | None = None
    pairs: int = 3

    @property
    def models(self) -> Path:
        """Return where its models are."""
        name = self.arch if self.dtype == "float16" else f"{self.arch}-{self.dtype}"
        return MODELS_FOLDER / name


CONFIGURATIONS = {
    "sd15": Configuration(),
    "sd15-1-thread": Configuration(threads=1, pairs=7),
    "sd15-2-threads": Configuration(threads=2, pairs=7),
    "sd15-4-threads": Configuration(threads=4, pairs=7),
    "sd15-cold": Configuration(is_cold=True),
    "sd15-lora": Configuration(is_lora=True),
    "sd15-lora-cold": Configuration(is_lora=True, is_cold=True),
    "sd15-bfloat16": Configuration(dtype="bfloat16"),
    "sd15-float32": Configuration(dtype="float32"),
    "sdxl": Configuration("sdxl", pairs=2),
    "sdxl-cold": Configuration("sdxl", is_cold=True, pairs=2),
    "sdxl-lora": Configuration("sdxl", is_lora=True, pairs=2),
}


def main() -> None:
    options = parse_options()
    if options.child:
        print(json.dumps(CHILDREN[options.child](options)))
        return
    name = "merge" if options.device == "cpu" else f"merge-{options.device.split(':')[0]}"
    facts = machine.machine_facts(options.device)
    others = measured_before(options.out or machine.RESULTS / f"{name}.json", facts)
    results: dict[str, Any] = {}
    for wanted in choose(options):
        configuration = CONFIGURATIONS[wanted]
        prepare(configuration)
        results[wanted] = measure(wanted, configuration, options)
        # After each, so that what was measured stays when the next one fails.
        found = others | results
        ordered = {each: found[each] for each in CONFIGURATIONS if each in found}
        machine.write_results(name, {"machine": facts, "configurations": ordered}, options.out)
        if not options.keep:
            remove_unneeded(options, wanted)
    tables.print_tables(results)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(CONFIGURATIONS))
    parser.add_argument("--pairs", type=int, help="default: 3, of SDXL 2, of threads 7")
    parser.add_argument("--device", default="cpu", help="of our sides: cpu or cuda")
    parser.add_argument("--keep", action="store_true", help="keep the models that were made")
    parser.add_argument("--out", type=Path, help="the JSON")
    # Of the child processes.
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--models", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--scratch", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--lora", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--narrowing", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if unknown := set(options.names) - set(CONFIGURATIONS):
        parser.error(f"{', '.join(unknown)}: choose from {', '.join(CONFIGURATIONS)}")
    return options


def measured_before(path: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """Return what a JSON holds already, if it is from a machine like this one."""
    tree = json.loads(path.read_text()) if path.is_file() else {}
    configurations: dict[str, Any] = tree.get("configurations", {})
    return configurations if tree.get("machine") == facts else {}


def choose(options: argparse.Namespace) -> list[str]:
    """Return the configurations to measure: the named ones, else all that make sense here."""
    if options.names:
        return list(options.names)
    cores = os.cpu_count() or 1
    return [
        name
        for name, found in CONFIGURATIONS.items()
        if (found.threads is None or 1 <= found.threads <= cores) and cores > 1
        if options.device == "cpu" or (found.threads is None and not found.is_cold)
    ]


def prepare(configuration: Configuration) -> None:
    """Make the models of a configuration unless they are there."""
    if (configuration.models / "lora.safetensors").is_file():
        return
    script = ROOT / "scripts" / "make_synthetic.py"
    command = [sys.executable, str(script), str(configuration.models)]
    command += ["--arch", configuration.arch, "--dtype", configuration.dtype]
    subprocess.run(command, check=True)
    (configuration.models / ".made-for-benchmark").touch()
    # Else they would be written to the disk beside the first runs.
    os.sync()


def remove_unneeded(options: argparse.Namespace, done: str) -> None:
    """Remove the models of a configuration if it was the last that uses them."""
    models = CONFIGURATIONS[done].models
    names = choose(options)
    later = names[names.index(done) + 1 :]
    is_ours = (models / ".made-for-benchmark").exists()
    if is_ours and all(CONFIGURATIONS[name].models != models for name in later):
        shutil.rmtree(models)


# One configuration -----------------------------------------------------------------------------


def measure(name: str, configuration: Configuration, options: argparse.Namespace) -> dict[str, Any]:
    """Run every side of a configuration some times."""
    files = input_files(configuration.models, is_lora=configuration.is_lora)
    read = sum(path.stat().st_size for path in files)
    target = files[0].stat().st_size
    sides = list(choose_sides(configuration, options.device, read))
    # Where ours is compared with the naive result, both are there.
    needed = target * (2.1 if "naive" in sides else 1.02)
    # What is read has to stay in the page cache beside what is written.
    cached = 0 if configuration.is_cold else read
    with machine.scratch_folder(needed, cached_bytes=cached, within=0.92) as scratch:
        run = _Run(configuration, options, scratch, files)
        rows: Runs = {side: [] for side in sides}
        pairs = options.pairs or configuration.pairs
        # Not counted: a virtual machine's host has to find the memory that is touched first.
        run.measure("floor")
        for pair in range(pairs):
            for side in sides:
                print(f"{name}, {pair + 1}/{pairs}: {side}", file=sys.stderr)
                rows[side].append(run.measure(side))
                if pair == 0 and "naive" in sides:
                    run.compare(side)
        is_tmpfs = scratch.is_relative_to("/dev/shm")
    settings = {
        **dataclasses.asdict(configuration),
        "date": machine.today(),
        "pairs": pairs,
        "threads": run.threads,
        "device": options.device,
        "read_bytes": read,
        "output_on": "tmpfs" if is_tmpfs else "disk",
    }
    return {"settings": settings, "ratios": tables.ratios(rows), "runs": rows}


def choose_sides(configuration: Configuration, device: str, read_bytes: int) -> Iterator[str]:
    """Yield what is run; the stage and the copy last, so that both follow an output of ours."""
    is_plain = not configuration.is_cold and configuration.threads is None
    if configuration.is_lora:
        yield from ("fuse", "matmul") if is_plain else ()
    elif is_plain and configuration.dtype == "float16":
        # The inputs, the result, and the result once more in the output file on tmpfs.
        needed, available = read_bytes / 3 * 5, machine.available_bytes()
        if needed < available:
            yield from ("naive", *filter(rivals.is_there, rivals.RIVALS))
        else:
            print(
                f"naive and the rivals are left out: they need {needed / 1e9:.0f} GB of memory "
                f"and {available / 1e9:.0f} GB are available",
                file=sys.stderr,
            )
    yield "command"
    if device != "cpu" and not configuration.is_lora:
        yield "transfers"
    yield from ("stage", "floor")


class _Run:
    """The processes of one configuration."""

    def __init__(
        self,
        configuration: Configuration,
        options: argparse.Namespace,
        scratch: Path,
        files: list[Path],
    ) -> None:
        self.configuration = configuration
        self.device = options.device
        self.scratch = scratch
        self.files = files
        self.threads = configuration.threads or min(os.cpu_count() or 1, 8)
        self.output = scratch / "out.safetensors"
        self.reference = scratch / "reference.safetensors"
        self.previous = scratch / PREVIOUS

    def measure(self, side: str) -> dict[str, Any]:
        """Run one side and return its seconds and memory, and the bytes that it wrote."""
        self._clear(keeps_one=side in ("matmul", "transfers", "stage", "floor"))
        self._set_cache()
        row = self._run(side)
        row["written_bytes"] = sum(path.stat().st_size for path in self._outputs())
        return row

    def _outputs(self) -> list[Path]:
        kept = (self.reference, self.previous)
        return [path for path in self.scratch.rglob("*.safetensors") if path not in kept]

    def _clear(self, *, keeps_one: bool) -> None:
        """Remove what the side before wrote, or leave that to the next side."""
        if keeps_one and (found := self._outputs()):
            max(found, key=lambda path: path.stat().st_size).replace(self.previous)
        for path in self.scratch.iterdir():
            if path != self.reference and not (keeps_one and path == self.previous):
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def compare(self, side: str) -> None:
        """Keep the naive result, and compare ours with it."""
        if side == "naive":
            self.output.replace(self.reference)
        elif side == "stage":
            self._run("compare")

    def _set_cache(self) -> None:
        """Bring the inputs into the page cache, or out of it."""
        for path in self.files:
            with path.open("rb", buffering=0) as file:
                if self.configuration.is_cold:
                    os.fsync(file.fileno())
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                    continue
                while file.read(_CACHED_BYTES):
                    pass

    def _run(self, side: str) -> dict[str, Any]:
        is_rival = side in rivals.RIVALS
        # Packages may lie on the caller's path and be installed nowhere.
        given = os.environ.get("PYTHONPATH", "")
        paths = os.pathsep.join(filter(None, (str(ROOT), given)))
        environment = {**os.environ, "PYTHONPATH": paths}
        if is_rival:
            environment.pop("PYTHONPATH")
        command = self._command(side)
        started = time.perf_counter()
        child = subprocess.Popen(
            [str(word) for word in command],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL if is_rival else None,
            env=environment,
        )
        assert child.stdout is not None
        output = child.stdout.read()
        _, status, usage = os.wait4(child.pid, 0)
        wall = time.perf_counter() - started
        if status:
            raise SystemExit(f"{side} failed")
        row: dict[str, Any] = {
            "process_s": wall,
            "cpu_s": usage.ru_utime + usage.ru_stime,
            # macOS counts bytes, Linux kibibytes.
            "peak_mb": usage.ru_maxrss / 1e6 * (1 if sys.platform == "darwin" else 1024),
        }
        if side == "command":
            row["stages"] = json.loads((self.scratch / "out" / "run.json").read_text())["seconds"]
            return row | {"stage_s": row["stages"]["merge"]}
        return row | ({"stage_s": wall} if is_rival else json.loads(output))

    def _command(self, side: str) -> list[Any]:
        models = self.configuration.models
        if side in rivals.RIVALS:
            return rivals.command(side, models, self.scratch, self.threads)
        recipe = self._write_recipe()
        common = ["--threads", self.threads, "--device", self.device]
        if side == "command":
            command = [sys.executable, "-m", "merge", "run", recipe]
            return [*command, "--out", self.scratch / "out", "--no-verify", "-q", *common]
        command = [sys.executable, __file__, "--child", side, *common]
        command += ["--models", models, "--scratch", self.scratch]
        # How many times smaller the output is than the target.
        command += ["--narrowing", 2 if self.configuration.dtype == "float32" else 1]
        return [*command, *(["--lora"] if self.configuration.is_lora else [])]

    def _write_recipe(self) -> Path:
        folder = self.configuration.models
        models = {name: str(folder / name) for name in MODELS}
        if self.configuration.is_lora:
            models = {"target": models["target"], "distilled": str(folder / "lora.safetensors")}
        is_bfloat16 = self.configuration.dtype == "bfloat16"
        out_dtype = "bfloat16" if is_bfloat16 else "float16"
        path = self.scratch / "recipe.yaml"
        # JSON is YAML.
        path.write_text(json.dumps({"name": "bench", "models": models, "out_dtype": out_dtype}))
        return path


if __name__ == "__main__":
    main()
