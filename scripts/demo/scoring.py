"""Score checkpoints exactly: every setting gets the same edits and the same noise.

An edit is right when every tile of the picture is close to a sprite that the instruction allows
there (see world.py).
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import multiprocessing
import tempfile
from collections.abc import Iterator, Sequence
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
from merge.editor.result import EditRequest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
LARGE, SMALL = "large", "small"
# Those that come with the recipes, and earlier ones of a third of the size to compare with.
MODELS = {LARGE: ROOT / "recipes" / "demo", SMALL: HERE / "small"}
# What decides a setting's pictures.
_PARTS = {
    "target": ("target",),
    "demo": ("target", "base", "distilled"),
    "demo-lora": ("target", "lcm_lora.safetensors"),
}
_BATCH = 100
_Z = 1.96  # two-sided 95 %


@dataclass(frozen=True, slots=True)
class Setting:
    """One line of a table.

    Attributes:
        model: `target`, `demo` (full delta) or `demo-lora`.
        steps: num_inference_steps.
        weight: Of the delta; None for the target.
        timesteps: Explicit ones; None for the scheduler's own.
        guidance_scale: Of the instruction; image guidance is off.
        channel_rule: What happened to conv_in.
        scheduler: `own` is the target's DDIM, `lcm` the export's.
        size: `large` or `small`.
    """

    model: str
    steps: int
    weight: float | None = None
    timesteps: tuple[int, ...] | None = None
    guidance_scale: float = 1.0
    channel_rule: str = "skip"
    scheduler: str = "lcm"
    size: str = LARGE


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

    @property
    def share(self) -> float:
        """Return the share of right edits."""
        return sum(self.right) / len(self.right)

    @property
    def bounds(self) -> tuple[float, float]:
        """Return the 95 % interval of the share."""
        return interval(sum(self.right), len(self.right))


def draw_edits(seed: int, count: int) -> world.Edits:
    """Draw edits that training never saw."""
    return world.sample_edits(np.random.default_rng(seed), count)


def edit_pictures(
    folder: Path, setting: Setting, edits: world.Edits, seeds: Sequence[int] | None = None
) -> tuple[np.ndarray, int]:
    """Edit with a checkpoint.

    Args:
        folder: The checkpoint.
        setting: Steps, guidance, scheduler.
        edits: What to do.
        seeds: Of the noise, one an edit; default: 0, 1, 2 and on.

    Returns:
        Pictures `(n, 32, 32, 3)` in 0 to 1, and the UNet rows of one edit.
    """
    transformers.utils.logging.disable_progress_bar()
    editor = load_editor(folder, device="cpu", scheduler=setting.scheduler)
    settings = EditSettings(
        steps=setting.steps, guidance_scale=setting.guidance_scale, timesteps=setting.timesteps
    )
    sources = (world.render(edits.source) * 255).round().astype(np.uint8)
    requests = (
        EditRequest(Image.fromarray(source), instruction, seed)
        for seed, source, instruction in zip(
            range(len(sources)) if seeds is None else seeds,
            sources,
            edits.instructions,
            strict=True,
        )
    )
    pictures, rows = [], 0
    for result in edit_many(editor, requests, settings, batch_size=_BATCH):
        pictures.append(np.asarray(result.to_pil(), dtype=np.float32) / 255)
        rows = result.unet_rows
    return np.stack(pictures), rows


def score(folder: Path, setting: Setting, edits: world.Edits) -> Result:
    """Run the edits with a checkpoint and score them."""
    pictures, rows = edit_pictures(folder, setting, edits)
    scores = world.score(edits, pictures)
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


def score_all(
    settings: Sequence[Setting], seed: int, count: int, cache: Path, jobs: int
) -> list[Result]:
    """Score settings, `jobs` at a time, each shown and kept in `cache` as soon as it is there.

    What is kept counts for the same models and the same edits only.
    """
    cache.mkdir(parents=True, exist_ok=True)
    is_open = draw_edits(seed, count).is_open
    results = []
    kept = functools.partial(_score_kept, seed=seed, count=count, cache=cache)
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        for result in pool.map(kept, settings):
            results.append(result)
            print(_describe(result, is_open), flush=True)
    return results


def _score_kept(setting: Setting, seed: int, count: int, cache: Path) -> Result:
    torch.set_num_threads(1)
    digests = [_digest(MODELS[setting.size] / name) for name in _PARTS[setting.model]]
    key = json.dumps([asdict(setting), seed, count, digests])
    path = cache / f"{hashlib.sha256(key.encode()).hexdigest()[:20]}.json"
    if not path.exists():
        with tempfile.TemporaryDirectory() as scratch:
            result = score(checkpoint(setting, Path(scratch)), setting, draw_edits(seed, count))
        path.write_text(json.dumps(asdict(result)), encoding="utf-8")
    kept = json.loads(path.read_text(encoding="utf-8"))
    return Result(setting, tuple(kept["right"]), tuple(kept["distance"]), kept["unet_rows"])


@functools.cache
def _digest(model: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(model.rglob("*.safetensors")) if model.is_dir() else [model]:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def checkpoint(setting: Setting, scratch: Path) -> Path:
    """Return the folder that a setting edits with; what is merged for it is under `scratch`."""
    models = MODELS[setting.size]
    if setting.weight is None:
        return models / "target"
    out = scratch / "merged"
    words = [
        f"weight={setting.weight}",
        f"channel_rule={setting.channel_rule}",
        f"models.target.path={models / 'target'}",
    ]
    if setting.model == "demo":
        words += [f"models.{role}.path={models / role}" for role in ("base", "distilled")]
    else:
        words.append(f"models.distilled.path={models / 'lcm_lora.safetensors'}")
    run_recipe(load_recipe(setting.model, words), out, device="cpu", threads=1, verify=False)
    return out


def _describe(result: Result, is_open: np.ndarray) -> str:
    """Return a line for the screen."""
    setting = result.setting
    right = np.array(result.right)
    places = "/".join(map(str, setting.timesteps)) if setting.timesteps else "own"
    return (
        f"{setting.size} {setting.model:9} weight {setting.weight!s:5} {setting.channel_rule:5} "
        f"{setting.steps:2} steps {places:15} guidance {setting.guidance_scale:g}  "
        f"rows {result.unet_rows:3}  right {right.mean():.1%}  open {right[is_open].mean():.1%}  "
        f"closed {right[~is_open].mean():.1%}  distance {np.mean(result.distance):.3f}"
    )


def norms(size: str) -> dict[str, float]:
    """Measure how far target and distilled are from the base, over the tensors of one shape."""
    name = "diffusion_pytorch_model.safetensors"
    base, distilled, target = (
        load_file(MODELS[size] / part / name) for part in ("base", "distilled", "target/unet")
    )
    wide = [key for key in base if base[key].shape == target[key].shape]

    def length(tensors: Iterator[np.ndarray]) -> float:
        return math.sqrt(sum(np.square(t.astype(np.float64)).sum() for t in tensors))

    whole = length(base[key] for key in wide)
    return {
        "target": length(target[k].astype(np.float64) - base[k] for k in wide) / whole,
        "distilled": length(distilled[k].astype(np.float64) - base[k] for k in wide) / whole,
    }
