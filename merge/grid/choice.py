"""Which cell is best, where the samples tell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from merge.grid.model import Best, Cell, Measured
from merge.grid.statistics import PATH, RANKINGS, Ranking, difference

# Of fewer, an interval is their whole range, and says no more than that they agree by chance.
LEAST_SAMPLES = 4


def choose_best(
    cells: Sequence[Cell], measured: Mapping[int, Measured]
) -> tuple[Best | None, tuple[str, ...]]:
    """Return the best cell, or None and why there is none.

    Args:
        cells: Of a grid.
        measured: Index of a cell to what was found.
    """
    whole = [cell for cell in cells if cell.index in measured and not measured[cell.index].problem]
    if len(whole) < 2:
        return None, ()
    values = {cell.index: measured[cell.index].values for cell in whole}
    ranking = next(
        (
            ranking
            for ranking in RANKINGS
            if all(ranking.can_rank(found) for found in values.values())
            and (ranking is not PATH or _share_paths(whole))
        ),
        None,
    )
    if ranking is None:
        return None, ("No best cell: the cells have no measure that compares them.",)
    count = len(whole[0].samples)
    if count < LEAST_SAMPLES:
        words = "one sample tells" if count == 1 else f"{count} samples tell"
        note = f"No best cell: {words} too little; more pictures or --samples would tell more."
        return None, (note,)
    ordered = sorted(whole, key=lambda cell: (ranking.score(values[cell.index]), cell.index))
    best, worst = ordered[0], ordered[-1]
    if not difference(ranking, values[worst.index], values[best.index]).low > 0:
        note = "No best cell: so few samples do not tell even the outermost cells apart."
        return None, (note,)
    return Best(best.index, ranking.name, best.overrides), _rivals(ranking, ordered, values)


def _rivals(
    ranking: Ranking,
    ordered: Sequence[Cell],
    values: Mapping[int, Mapping[str, tuple[float | None, ...]]],
) -> tuple[str, ...]:
    """Say which cells these samples do not tell from the best."""
    best = ordered[0]
    rivals = [
        cell
        for cell in ordered[1:]
        if not difference(ranking, values[cell.index], values[best.index]).low > 0
    ]
    if not rivals:
        return ()
    shown = "; ".join(" ".join(cell.words) for cell in rivals[:4])
    more = f" and {len(rivals) - 4} more" if rivals[4:] else ""
    return (f"These samples do not tell the best cell from: {shown}{more}.",)


def _share_paths(cells: Sequence[Cell]) -> bool:
    """Return True where all cells have one path, since distances to two do not compare."""
    ways = {
        (
            tuple(
                (s.steps, s.timesteps, s.resolution, s.original_inference_steps) for s in c.settings
            ),
            tuple(sample.seed for sample in c.samples),
            repr(c.recipe.scheduler),
            c.models,
        )
        for c in cells
    }
    return len(ways) == 1
