"""Score the demo's models exactly, on edits that training never saw.

    python scripts/demo/evaluate.py                            # everything: RESULTS.md, plot, JSON
    python scripts/demo/evaluate.py --model outputs/demo --count 100 --at-least 0.8

An edit is right when every tile of the picture is close to a sprite that the instruction allows
there (see world.py). All settings get the same edits and the same noise.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import transformers
import world
from PIL import Image
from safetensors.numpy import load_file

from merge import EditSettings, edit_many, load_editor, load_recipe, run_recipe
from merge.editor import EditRequest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
MODELS = ROOT / "recipes" / "demo"
COUNT = 1_000
_TEST_SEED = 3
_BATCH = 100
_Z = 1.96  # two-sided 95 %
GUIDANCE = 1.5
WEIGHT = 0.5  # the recipes'; chosen on validation edits, not on these
WEIGHTS = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5)  # 0 is the target itself


@dataclass(frozen=True, slots=True)
class Setting:
    """One line of the table.

    Attributes:
        model: `target`, `demo` (full delta) or `demo-lora`.
        steps: num_inference_steps.
        weight: Of the delta; None for the target.
        channel_rule: What happened to conv_in.
        scheduler: `own` is the target's DDIM, `lcm` the export's.
        guidance_scale: Of the instruction; image guidance is off.
    """

    model: str
    steps: int
    weight: float | None = None
    channel_rule: str = "skip"
    scheduler: str = "lcm"
    guidance_scale: float = GUIDANCE


@dataclass(frozen=True, slots=True)
class Result:
    """What a setting scored.

    Attributes:
        setting: What was run.
        right: One flag an edit.
        distance: RMS distance to the nearest right answer, one an edit.
        unet_rows: Rows that the UNet evaluated for one edit.
    """

    setting: Setting
    right: tuple[bool, ...]
    distance: tuple[float, ...]
    unet_rows: int


SETTINGS = (
    Setting("target", 50, scheduler="own"),
    *(Setting("target", steps) for steps in (4, 2, 1)),
    *(Setting("demo", steps, WEIGHT) for steps in (4, 2, 1)),
    *(Setting("demo-lora", steps, WEIGHT) for steps in (4, 2, 1)),
    *(Setting("demo", steps, weight) for steps in (4, 2) for weight in WEIGHTS),
    *(Setting("demo", 4, weight, "first") for weight in WEIGHTS),
)


def score(folder: Path, setting: Setting, edits: world.Edits) -> Result:
    """Run the edits with a checkpoint and score them."""
    transformers.utils.logging.disable_progress_bar()
    editor = load_editor(folder, device="cpu", scheduler=setting.scheduler)
    settings = EditSettings(steps=setting.steps, guidance_scale=setting.guidance_scale)
    sources = (world.render(edits.source) * 255).round().astype(np.uint8)
    requests = (
        EditRequest(Image.fromarray(source), instruction, seed)
        for seed, (source, instruction) in enumerate(zip(sources, edits.instructions, strict=True))
    )
    pictures, rows = [], 0
    for result in edit_many(editor, requests, settings, batch_size=_BATCH):
        pictures.append(np.asarray(result.to_pil(), dtype=np.float32) / 255)
        rows = result.unet_rows
    scores = world.score(edits, np.stack(pictures))
    return Result(setting, tuple(scores.is_right.tolist()), tuple(scores.distance.tolist()), rows)


def interval(right: int, count: int) -> tuple[float, float]:
    """Return Wilson's 95 % interval of a share."""
    share, z2 = right / count, _Z * _Z
    middle = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = _Z * math.sqrt(share * (1 - share) / count + z2 / (4 * count**2)) / (1 + z2 / count)
    return middle - half, middle + half


def difference(a: Result, b: Result) -> tuple[float, float]:
    """Return how much larger a's share is than b's, and the half width of its 95 % interval."""
    gaps = np.array(a.right, dtype=float) - np.array(b.right, dtype=float)
    return float(gaps.mean()), float(_Z * gaps.std(ddof=1) / math.sqrt(len(gaps)))


def run_all(count: int, cache: Path, jobs: int) -> list[Result]:
    """Score every setting, `jobs` at a time, each kept in `cache` as soon as it is there."""
    cache.mkdir(parents=True, exist_ok=True)
    edits = _test_edits(count)
    settings = list(dict.fromkeys(SETTINGS))
    results = []
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        score_kept = functools.partial(_score_kept, count=count, cache=cache)
        for result in pool.map(score_kept, settings):
            results.append(result)
            print(_line(result, edits.is_open), flush=True)
    return results


def _test_edits(count: int) -> world.Edits:
    return world.sample_edits(np.random.default_rng(_TEST_SEED), count)


def _score_kept(setting: Setting, count: int, cache: Path) -> Result:
    torch.set_num_threads(1)
    name = "-".join(str(value) for value in asdict(setting).values())
    path = cache / f"{name}-{count}.json"
    if not path.exists():
        with tempfile.TemporaryDirectory() as scratch:
            folder = _checkpoint(setting, Path(scratch))
            result = score(folder, setting, _test_edits(count))
        path.write_text(json.dumps(asdict(result)), encoding="utf-8")
    kept = json.loads(path.read_text(encoding="utf-8"))
    return Result(**{**kept, "setting": Setting(**kept["setting"])})


def _checkpoint(setting: Setting, scratch: Path) -> Path:
    if setting.weight is None:
        return MODELS / "target"
    out = scratch / "merged"
    words = [f"weight={setting.weight}", f"channel_rule={setting.channel_rule}"]
    run_recipe(load_recipe(setting.model, words), out, device="cpu", threads=1, verify=False)
    return out


def _line(result: Result, is_open: np.ndarray) -> str:
    setting = result.setting
    right = np.array(result.right)
    return (
        f"{setting.model:10} {setting.steps:3} steps  weight {setting.weight}  "
        f"{setting.channel_rule:5}  right {right.mean():.1%}  open {right[is_open].mean():.1%}  "
        f"closed {right[~is_open].mean():.1%}  distance {np.mean(result.distance):.3f}"
    )


def norms() -> dict[str, float]:
    """Measure how far target and distilled are from the base, over the tensors of one shape."""
    name = "diffusion_pytorch_model.safetensors"
    base, distilled, target = (
        load_file(MODELS / part / name) for part in ("base", "distilled", "target/unet")
    )
    wide = [key for key in base if base[key].shape == target[key].shape]

    def length(tensors: Iterator[np.ndarray]) -> float:
        return math.sqrt(sum(np.square(t.astype(np.float64)).sum() for t in tensors))

    whole = length(base[key] for key in wide)
    return {
        "target": length(target[k].astype(np.float64) - base[k] for k in wide) / whole,
        "distilled": length(distilled[k].astype(np.float64) - base[k] for k in wide) / whole,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="score this export only, at 4 steps")
    parser.add_argument("--count", type=int, default=COUNT, help="edits")
    parser.add_argument("--at-least", type=float, default=0.0, help="exit 9 below this share")
    parser.add_argument("--guidance-scale", type=float, default=GUIDANCE)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="settings at a time")
    parser.add_argument("--cache", type=Path, default=ROOT / "outputs" / "demo-evaluation")
    arguments = parser.parse_args()
    if arguments.model is None:
        import report

        results = run_all(arguments.count, arguments.cache, arguments.jobs)
        report.write(results, norms(), arguments.count)
        return
    edits = _test_edits(arguments.count)
    setting = Setting("given", 4, guidance_scale=arguments.guidance_scale)
    result = score(arguments.model, setting, edits)
    right = sum(result.right)
    low, high = interval(right, arguments.count)
    print(
        f"{right} of {arguments.count} unseen edits are right in 4 steps: "
        f"{right / arguments.count:.0%} (95 % interval {low:.0%} to {high:.0%})"
    )
    if right < arguments.at_least * arguments.count:
        sys.exit(9)


if __name__ == "__main__":
    # Under its own name, so that report.py and worker processes see the same classes.
    import evaluate

    evaluate.main()
