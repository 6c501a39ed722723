"""Write mergekit.json: what mergekit's functions give on small arrays.

Run in an environment that has mergekit 0.1.5 (`pip install --no-deps mergekit==0.1.5` and what
its imports ask for):

    python tests/golden/make_mergekit_goldens.py

The arrays are multiples of 1/64, so that sums of a few are exact and any order of adding them gives
the same bits.
"""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from typing import Any

import torch
from mergekit.merge_methods.generalized_task_arithmetic import ConsensusMethod, get_mask
from mergekit.merge_methods.slerp import slerp
from mergekit.sparsify import magnitude

OUT = Path(__file__).parent / "mergekit.json"
SHAPE = (5, 9)


def draw(count: int, seed: int) -> list[torch.Tensor]:
    """Return arrays in which no magnitude occurs twice, so that a trim has no ties."""
    generator = torch.Generator().manual_seed(seed)
    elements = SHAPE[0] * SHAPE[1]
    drawn = []
    for _ in range(count):
        values = torch.randperm(4 * elements, generator=generator)[:elements] + 1.0
        signs = torch.randint(0, 2, (elements,), generator=generator) * 2.0 - 1.0
        drawn.append((values * signs / 64).view(SHAPE))
    return drawn


def ties(deltas: list[torch.Tensor], weights: list[float], density: float, normalize: bool) -> Any:
    """Return the delta of mergekit's `ties`, from its own trim and election."""
    trimmed = torch.stack([magnitude(delta, density) for delta in deltas])
    scale = torch.tensor(weights).view(-1, 1, 1)
    trimmed = trimmed * scale
    mask = get_mask(trimmed, method=ConsensusMethod.sum, mask_dtype=trimmed.dtype)
    merged = (trimmed * mask).sum(dim=0)
    divisor = (scale * mask).sum(dim=0)
    divisor[divisor == 0] = 1
    return (merged / divisor if normalize else merged).tolist()


def main() -> None:
    cases: dict[str, list[dict[str, Any]]] = {"ties": [], "slerp": []}
    for seed, (count, density, normalize) in enumerate(
        [(1, 0.3, True), (2, 0.2, True), (2, 0.5, False), (3, 0.7, True), (3, 1.0, False)]
    ):
        deltas = draw(count, seed)
        weights = [1.0, 0.5, 2.0][:count]
        cases["ties"].append(
            {
                "deltas": [delta.tolist() for delta in deltas],
                "weights": weights,
                "density": density,
                "normalize": normalize,
                "delta": ties(deltas, weights, density, normalize),
            }
        )
    for seed, t in enumerate([0.0, 0.3, 0.5, 1.0]):
        target, delta = draw(2, 100 + seed)
        for scale in (1.0, 2.0**-10):  # an arc, and nearly parallel
            end = target + delta * scale
            between = slerp(torch.tensor([t]), target[None], end[None])[0]
            cases["slerp"].append(
                {
                    "target": target.tolist(),
                    "delta": (delta * scale).tolist(),
                    "t": t,
                    "merged": between.tolist(),
                }
            )
    version = importlib.metadata.version("mergekit")
    OUT.write_text(json.dumps({"mergekit": version, **cases}) + "\n")


if __name__ == "__main__":
    main()
