"""Write the trained models and a few pictures to edit as the folders that the demo's recipes name.

    python scripts/demo/export.py            # outputs/demo-training/large -> recipes/demo

recipes/demo/ receives base/ and distilled/ (UNet folders), lcm_lora.safetensors (kohya keys),
target/ (a whole InstructPix2Pix pipeline) in float16, and pictures/: under 55 MB in all.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import models
import numpy as np
import torch
import world
from choice import load_choice
from PIL import Image
from presets import PRESETS
from safetensors.torch import save
from train import ROOT, work_folder
from training import Run, load_text, load_vae

from merge import extract_lora, load_recipe

_EXAMPLES_SEED = 4
EXAMPLES = ("plant flowers", "make it night", "repaint the houses", "add balloons", "build houses")
EXAMPLES += ("turn the ground into snow",)
_EXTRACTED_RANK = 32


def write_models(run: Run, out: Path) -> None:
    """Write base, distilled, LoRA and target."""
    base = models.cut_image_channels(run.load("base")["unet"])
    for name, channels, state in (
        ("base", 4, base),
        ("distilled", 4, run.load("distilled")["unet"]),
    ):
        unet = run.make_unet(channels)
        unet.load_state_dict(state)
        models.save_diffusers_model(unet, out / name)
    target = run.make_unet(8)
    target.load_state_dict(run.load("target")["unet"])
    vae, _ = load_vae(run)
    text_encoder, _ = load_text(run)
    models.save_pipeline(out / "target", target, vae, text_encoder)
    path = out / "lcm_lora.safetensors"
    if "lora" in run.preset.budgets:
        lora = run.load("lora")
        write_lora(path, lora["keys"], lora["factors"], base)
    else:
        words = [f"models.{name}.path={out / name}" for name in ("base", "distilled", "target")]
        recipe = load_recipe("demo", ["weight=1", *words])
        extract_lora(recipe, path, rank=_EXTRACTED_RANK, device="cpu", overwrite=True)


def write_lora(
    path: Path,
    keys: list[str],
    factors: list[torch.Tensor],
    base: dict[str, torch.Tensor],
) -> None:
    """Write a LoRA as LCM-LoRA is published: kohya keys, one alpha a module, float16."""
    tensors = {}
    for key, up, down in zip(keys, factors[::2], factors[1::2], strict=True):
        name = "lora_unet_" + key.removesuffix(".weight").replace(".", "_")
        kernel = base[key].shape[1:]  # a convolution keeps its kernel in `down`
        tensors[f"{name}.lora_up.weight"] = up.view(*up.shape, *[1] * (len(kernel) - 1))
        tensors[f"{name}.lora_down.weight"] = down.view(len(down), *kernel)
        tensors[f"{name}.alpha"] = torch.tensor(float(len(down)))
    cast = {key: value.half().contiguous().cpu() for key, value in sorted(tensors.items())}
    path.write_bytes(save(cast, metadata={"format": "pt"}))


def write_card(out: Path) -> None:
    """Say what the folder is."""
    (out / "README.md").write_text(
        """---
license: apache-2.0
library_name: diffusers
---

Small models that the recipes `demo` and `demo-lora` merge: `base` (text-to-image), `distilled` and
`lcm_lora.safetensors` (few-step versions of it) and `target` (InstructPix2Pix), float16, for
pictures of 32 px. Trained from nothing on drawn pictures by `scripts/demo/train.py`; how, and what
the merge is worth: `scripts/demo/RESULTS.md`.
""",
        encoding="utf-8",
    )


def write_pictures(out: Path) -> None:
    """Write pictures to edit, the list of edits, and for closed edits the right answer."""
    edits = world.sample_edits(np.random.default_rng(_EXAMPLES_SEED), 4000)
    folder = out / "pictures"
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        "# The edits of the demo's recipes, and the same ones in two steps:",
        "# instruct-merge verify FOLDER --edits this-file",
    ]
    in_two_steps = []
    before, after = world.render(edits.source), world.render(edits.outcome)
    for instruction in EXAMPLES:
        found = [i for i, text in enumerate(edits.instructions) if text == instruction]
        # The busiest picture shows best that everything else is kept.
        best = max(found, key=lambda i: _variety(edits.source.tiles[i]))
        name = instruction.replace(" ", "-")
        _save(before[best], folder / f"{name}.png")
        item = [f"- image: pictures/{name}.png", f"  instruction: {instruction}"]
        if not edits.is_open[best]:
            _save(after[best], folder / f"{name}-right.png")
            item.append(f"  expected: [pictures/{name}-right.png]")
        lines += item
        in_two_steps += [*item, f"  timesteps: {list(load_choice().timesteps[2] or ())}"]
    lines += in_two_steps
    (out / "edits.yaml").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _variety(tiles: np.ndarray) -> tuple[int, int]:
    half = world.GRID // 2
    kinds = len(np.unique(tiles[:half])) + len(np.unique(tiles[half:]))
    return kinds, -abs(int((tiles > 0).sum()) - 10)


def _save(picture: np.ndarray, path: Path) -> None:
    Image.fromarray((picture * 255).round().astype(np.uint8)).save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "recipes" / "demo")
    parser.add_argument("--preset", choices=list(PRESETS), default="large")
    parser.add_argument("--work", type=Path, help="default: outputs/demo-training/PRESET")
    arguments = parser.parse_args()
    work = arguments.work or work_folder(arguments.preset)
    run: Any = Run(work, "cpu", PRESETS[arguments.preset])
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_models(run, arguments.out)
    write_card(arguments.out)
    write_pictures(arguments.out)
    size = sum(path.stat().st_size for path in arguments.out.rglob("*") if path.is_file())
    print(f"{arguments.out}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
