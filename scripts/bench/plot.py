"""Draw how a merge's cost grows, from results/growth.json.

python scripts/bench/plot.py                      # writes results/growth.png
"""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np

RESULTS = Path(__file__).resolve().parent / "results"
MERGE, PLAN = ("merge_s", "merge"), ("plan_s", "plan")
# Each panel's key, label and unit, and its lines: points, field, words.
PANELS = (
    (
        "gigabytes",
        "size of each model, GB",
        "s per GB",
        (("sparse", "merge_s", "merge, not cached"), ("size", "merge_s", "merge, cached")),
    ),
    (
        "tensors",
        "tensors (0.2 GB in all)",
        "s per tensor",
        (("tensors", *MERGE), ("tensors", *PLAN)),
    ),
    (
        "loras",
        "LoRAs of rank 32 (0.5 GB model)",
        "s per LoRA",
        (("loras", *MERGE), ("loras", *PLAN)),
    ),
)


def main() -> None:
    tree = json.loads((RESULTS / "growth.json").read_text())
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.4), layout="constrained")
    for axis, (key, label, unit, lines) in zip(axes, PANELS, strict=True):
        for name, field, words in lines:
            points = tree["points"][name]
            x = np.array([point[key] for point in points], dtype=float)
            y = np.array([point[field] for point in points])
            slope, start = np.polyfit(x, y, 1)
            (line,) = axis.plot(x, y, "o", label=f"{words}: {slope:.3g} {unit}")
            axis.plot(x, start + slope * x, color=line.get_color(), linewidth=1)
        axis.set_xlabel(label)
        axis.set_ylabel("seconds")
        # With room for the legend above the highest point.
        axis.set_ylim(0, 1.3 * axis.get_ylim()[1])
        axis.legend(frameon=False)
        axis.spines[["top", "right"]].set_visible(False)
    machine = tree["machine"]
    figure.suptitle(
        f"{machine['cpu']}, {machine['threads']} threads, {tree['date']}", fontsize="small"
    )
    figure.savefig(RESULTS / "growth.png", dpi=110, metadata={"Software": None})


if __name__ == "__main__":
    main()
