"""The merge benchmark's table: a line for each side of each configuration, then the ratios."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Runs = Mapping[str, Sequence[Mapping[str, Any]]]

# One ratio each: name, its two sides and their columns, what is asked for; the second side may be
# the sum of two. Sides that were not run have none.
_STAGE, _WHOLE = "stage_s", "process_s"
_RATIOS = (
    ("naive / stage", "naive", _STAGE, "stage", _STAGE, "at least 4"),
    ("naive / command", "naive", _WHOLE, "command", _WHOLE, "at least 2"),
    ("mergekit / stage", "mergekit", _WHOLE, "stage", _STAGE, "at least 6"),
    ("mergekit / command", "mergekit", _WHOLE, "command", _WHOLE, "at least 2"),
    ("sd-mecha / stage", "sd-mecha", _WHOLE, "stage", _STAGE, "at least 10"),
    ("sd-mecha / command", "sd-mecha", _WHOLE, "command", _WHOLE, "at least 4"),
    ("fuse / command", "fuse", _WHOLE, "command", _WHOLE, ""),
    ("stage / matmul", "stage", _STAGE, "matmul", _STAGE, "at most 1.5"),
    ("stage / (matmul + floor)", "stage", _STAGE, "matmul + floor", _STAGE, ""),
    ("stage / transfers", "stage", _STAGE, "transfers", _STAGE, "at most 1.2"),
    ("stage / floor", "stage", _STAGE, "floor", _STAGE, "at most 1.25"),
    ("memory, command / mergekit", "command", "peak_mb", "mergekit", "peak_mb", "under 0.1"),
    ("memory, command / sd-mecha", "command", "peak_mb", "sd-mecha", "peak_mb", "under 0.1"),
)


def ratios(rows: Runs) -> dict[str, list[float]]:
    """Return every ratio that the sides allow, pair by pair."""
    found = {}
    for name, one, column, two, other, _ in _RATIOS:
        sides = [one, *two.split(" + ")]
        if rows.keys() >= set(sides):
            pairs = zip(*(rows[side] for side in sides), strict=True)
            found[name] = [a[column] / sum(b[other] for b in rest) for a, *rest in pairs]
    return found


def print_tables(results: Mapping[str, Mapping[str, Any]]) -> None:
    """Print a line per side, then a line per ratio: medians of all pairs."""
    print(
        f"{'configuration':<16}{'side':<11}{'stage s':>9}{'whole s':>9}{'cpu s':>8}{'hash s':>14}"
        f"{'MB':>7}{'GB read':>9}{'written':>9}"
    )
    for name, result in results.items():
        for side, runs in result["runs"].items():
            middle = {
                column: statistics.median(run[column] for run in runs)
                for column in ("stage_s", "process_s", "cpu_s", "peak_mb", "written_bytes")
            }
            print(
                f"{name:<16}{side:<11}{middle['stage_s']:>9.2f}{middle['process_s']:>9.2f}"
                f"{middle['cpu_s']:>8.2f}{_hashing(runs):>14}{middle['peak_mb']:>7.0f}"
                f"{result['settings']['read_bytes'] / 1e9:>9.2f}"
                f"{middle['written_bytes'] / 1e9:>9.2f}"
            )
    print(
        "\nhash s: until every input was hashed, beside the start-up, and what was left of the "
        "output's\n        after the merge, beside which it runs\n"
    )
    for line in _ratio_lines(results):
        print(line)


def _hashing(runs: Sequence[Mapping[str, Any]]) -> str:
    if "stages" not in runs[0]:
        return ""
    inputs, output = (
        statistics.median(run["stages"][stage] for run in runs)
        for stage in ("import_and_hash", "hash_output")
    )
    return f"{inputs:.2f} + {output:.2f}"


def _ratio_lines(results: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    aims = {name: aim for name, *_, aim in _RATIOS}
    for name, result in results.items():
        for ratio, values in result["ratios"].items():
            shown = ", ".join(f"{value:.2f}" for value in values)
            # Aims are of float16 with a warm cache.
            is_plain = name.endswith(("thread", "threads", "sd15", "sdxl", "-lora"))
            is_plain = is_plain and result["settings"]["output_on"] == "tmpfs"
            # The copy has no products.
            is_plain = is_plain and not (ratio == "stage / floor" and "lora" in name)
            aim = f"   aim: {aims[ratio]}" if aims[ratio] and is_plain else ""
            yield f"{name:<16}{ratio:<28}{statistics.median(values):>6.2f}   ({shown}){aim}"
