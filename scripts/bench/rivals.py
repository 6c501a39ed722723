"""Other tools' commands for the same merge, each in an environment of its own.

    python scripts/bench/rivals.py --setup            # outputs/bench/envs/{mergekit,sd-mecha}

`merge.py --rivals` runs them beside ours. They are given what they can do: a target whose first
layer is cut to four channels, since both refuse a real InstructPix2Pix target. mergekit computes
and saves in float16, where it is fastest, sd-mecha computes in float32 and saves float16.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
ENVIRONMENTS = ROOT / "outputs" / "bench" / "envs"
WEIGHTS = "diffusion_pytorch_model.safetensors"
RIVALS = {"mergekit": "mergekit", "sd-mecha": "sd-mecha"}
TORCH = "torch==2.13.0"

MECHA = """
import sys
import torch, sd_mecha
target, distilled, base, out, threads = sys.argv[1:]
models = [sd_mecha.model(path) for path in (target, distilled, base)]
recipe = sd_mecha.add_difference(*models, alpha=1.0)
sd_mecha.merge(
    recipe, output=out, merge_device="cpu", merge_dtype=torch.float32,
    output_dtype=torch.float16, threads=int(threads),
)
"""


def setup() -> None:
    """Make an environment for each rival; those that are there stay."""
    for name, package in RIVALS.items():
        folder = ENVIRONMENTS / name
        if (folder / "bin" / "python").exists():
            continue
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet"]
        subprocess.run([*pip, TORCH], check=True)
        subprocess.run([*pip, package], check=True)


def is_there(name: str) -> bool:
    """Return True when a rival's environment was made."""
    return (ENVIRONMENTS / name / "bin" / "python").exists()


def command(name: str, models: Path, scratch: Path, threads: int) -> list[str]:
    """Return the command line of a rival's whole merge, and write what it reads."""
    environment = ENVIRONMENTS / name / "bin"
    if name == "mergekit":
        job = scratch / "job.yml"
        # The target as base: T + (D - T) - (B - T).
        tree = {
            "merge_method": "task_arithmetic",
            "base_model": str(narrow_target(models)),
            "models": [
                {"model": str(models / role / WEIGHTS), "parameters": {"weight": weight}}
                for role, weight in (("distilled", 1.0), ("base", -1.0))
            ],
            "dtype": "float16",
        }
        job.write_text(json.dumps(tree))
        out = scratch / "mergekit"
        return [str(environment / "mergekit-pytorch"), str(job), str(out), "-i"]
    script = scratch / "mecha.py"
    script.write_text(MECHA)
    files = [narrow_target(models), *(models / role / WEIGHTS for role in ("distilled", "base"))]
    words = [str(environment / "python"), str(script), *map(str, files)]
    return [*words, str(scratch / "mecha.safetensors"), str(threads)]


def narrow_target(models: Path) -> Path:
    """Write, once, the target with the first layer of a text-to-image model."""
    path = models / "target4.safetensors"
    if not path.exists():
        from safetensors.torch import load_file, save_file

        tensors = load_file(models / "target" / WEIGHTS)
        tensors["conv_in.weight"] = tensors["conv_in.weight"][:, :4].contiguous()
        save_file(tensors, path, {"format": "pt"})
    return path


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--setup", action="store_true", help="make the environments")
    options = parser.parse_args()
    if options.setup:
        setup()
    for name in RIVALS:
        print(f"{name}: {'there' if is_there(name) else 'not installed'}")


if __name__ == "__main__":
    main()
