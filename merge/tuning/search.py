"""Which settings are measured, one stage after the other, and which is chosen."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from merge.grid.model import Cell, Measured
from merge.grid.statistics import PATH_SCORE, RESIDUAL, Ranking, Values, difference, part
from merge.tuning.fit import folds, pick, rounded
from merge.tuning.model import Curve, HeldOut, Neighbour
from merge.tuning.settings import GROUPS, GUIDANCE, Setting, timesteps_for

_GROUP_STEP = 0.25
# From the lowest point of a curve to where it is looked at again.
_BESIDE = 0.1
# Best and worst of some ten cells differ by chance more often than two that were named before.
_SURE = 0.995


@dataclass
class Search:
    """Measures settings and compares them on the samples that decide.

    Attributes:
        measure: Measures settings that are new; returns their cells in order.
        results: Index of a cell to what was found.
        ranking: What decides.
        deciding: Indices of the samples that settings are chosen on.
        weights: To try.
        budget: The most cells.
        cells: Setting to its cell, as measured so far.
    """

    measure: Callable[[Sequence[Setting]], Sequence[Cell]]
    results: Mapping[int, Measured]
    ranking: Ranking
    deciding: Sequence[int]
    weights: Sequence[float]
    budget: int
    cells: dict[Setting, Cell] = field(default_factory=dict)
    is_cut: bool = False

    def run(self, before: Setting, over: Sequence[str], steps: int) -> Setting | None:
        """Return the best setting; None where no cell gave numbers.

        Args:
            before: What the recipe has.
            over: What may change.
            steps: Of the edits.
        """
        weights = self.weights if "weight" in over else [before.weight]
        # A distillation contains guidance already. Above 1 every measure leans to weights that are
        # too small, in the demo by a quarter and more.
        plain = replace(before, guidance_scale=1.0)
        self._try([before, plain, *(replace(plain, weight=weight) for weight in weights)])
        if not self.known:
            # The steps of a solver have no answers of their own.
            self.ranking = PATH_SCORE
        best = self._best([s for s in self.known if s.guidance_scale == 1])
        if best is not None and "timesteps" in over:
            best = self._place(best, steps, "weight" in over)
        if best is not None and "weight" in over:
            best = self._refine(best)
        if best is not None and "guidance_scale" in over:
            best = self._guide(best, before.guidance_scale, "weight" in over)
        return best

    def run_groups(self, best: Setting) -> Setting | None:
        """Return the best setting with weights of its own for some groups; None: none is better.

        One group after the other, once: more freedom fits the measure and not the edits.
        """
        found = best
        for pattern in GROUPS.values():
            tries = [
                replace(found, groups=(*found.groups, (pattern, round(found.weight + step, 2))))
                for step in (-_GROUP_STEP, _GROUP_STEP)
            ]
            self._try(tries)
            found = self._best([found, *tries]) or found
        return None if found == best else found

    @property
    def known(self) -> list[Setting]:
        """Return the settings that gave numbers."""
        return [
            setting
            for setting, cell in self.cells.items()
            if self.ranking.can_rank(self.results[cell.index].values)
            and not self.results[cell.index].problem
        ]

    def values(self, setting: Setting) -> Values:
        """Return what was measured of a setting on all samples."""
        return self.results[self.cells[setting].index].values

    def deciding_values(self, setting: Setting) -> Values:
        """Return what was measured of a setting on the samples that decide."""
        return part(self.values(setting), self.deciding)

    def score(self, setting: Setting) -> float:
        """Return the score of a setting on the samples that decide."""
        return self.ranking.score(self.deciding_values(setting))

    def is_better(self, one: Setting, other: Setting, indices: Sequence[int] | None = None) -> bool:
        """Return True where a setting is better than another beyond doubt.

        Args:
            one: What may be better.
            other: Than this.
            indices: Of the samples to tell by; None: those that decide.
        """
        chosen = self.deciding if indices is None else indices
        mine, theirs = (part(self.values(setting), chosen) for setting in (one, other))
        return difference(self.ranking, mine, theirs).high < 0

    def along(self, setting: Setting) -> dict[float, Setting]:
        """Return the measured settings that differ by the weight alone, ascending."""
        found = [s for s in self.known if replace(s, weight=setting.weight) == setting]
        return {s.weight: s for s in sorted(found, key=lambda s: s.weight)}

    # Stages ----------------------------------------------------------------------------------

    def _place(self, best: Setting, steps: int, has_weight: bool) -> Setting:
        """Try timesteps, each with the best weight and its neighbours."""
        tries = [
            replace(setting, timesteps=timesteps)
            for timesteps in timesteps_for(steps)
            for setting in self._around(best, has_weight)
        ]
        self._try(tries)
        return self._best([best, *tries]) or best

    def _guide(self, best: Setting, known: float, has_weight: bool) -> Setting:
        """Try guidance, which doubles the UNet rows: only where it is better beyond doubt.

        Between guidances the target's word on the results decides: single steps with guidance are
        further from where the target leads, whether the edits are better or not.
        """
        smaller = [weight for weight in self.weights if weight < best.weight][-2:]
        weights = [*smaller, best.weight] if has_weight else [best.weight]
        champions: dict[float, Setting] = {}
        for guidance in sorted({*GUIDANCE, known}):
            tries = [replace(best, weight=w, guidance_scale=guidance) for w in weights]
            self._try(tries)
            found = [s for s in tries if s in self.cells and RESIDUAL.can_rank(self.values(s))]
            if found:
                champions[guidance] = min(found, key=self._residual)
        if best.guidance_scale not in champions:
            return best
        chosen, rival = best, champions.pop(best.guidance_scale)
        for other in champions.values():
            gap = difference(RESIDUAL, self.deciding_values(other), self.deciding_values(rival))
            if gap.high < 0:
                chosen = rival = other
        if chosen != best:
            self.ranking = RESIDUAL
            self._try([replace(chosen, weight=weight) for weight in self.weights])
        return chosen

    def _residual(self, setting: Setting) -> float:
        return RESIDUAL.score(self.deciding_values(setting))

    def _refine(self, best: Setting) -> Setting:
        """Fill in the curve at the final settings, and measure around its lowest point.

        More weights there cost little beside the target's path, and edits of each have noise of
        their own.
        """
        self._try([replace(best, weight=weight) for weight in self.weights])
        if len(self.along(best)) < 3:
            return best
        first = self._bottom(best)
        inside = [w for w in (first - _BESIDE, first, first + _BESIDE) if w >= self.weights[0]]
        self._try([replace(best, weight=rounded(weight)) for weight in inside])
        vertex = replace(best, weight=rounded(self._bottom(best)))
        self._try([vertex])
        found = self._best(list(self.along(best).values())) or best
        # The curve knows more than its lowest point, which is the one that noise favours most.
        if vertex in self.cells and vertex in self.known and not self.is_better(found, vertex):
            return vertex
        return found

    def _bottom(self, best: Setting) -> float:
        curve = {w: self.deciding_values(s) for w, s in self.along(best).items()}
        return pick(self.ranking, curve)

    def _around(self, best: Setting, has_weight: bool) -> list[Setting]:
        """Return a setting with the next smaller and the next larger weight that are tried."""
        if not has_weight:
            return [best]
        smaller = [weight for weight in self.weights if weight < best.weight][-1:]
        larger = [weight for weight in self.weights if weight > best.weight][:1]
        return [replace(best, weight=weight) for weight in (*smaller, best.weight, *larger)]

    # Comparing -------------------------------------------------------------------------------

    def _try(self, settings: Sequence[Setting]) -> None:
        new = [s for s in dict.fromkeys(settings) if s not in self.cells]
        room = self.budget - len(self.cells)
        if len(new) > room:
            self.is_cut = True
            new = new[: max(0, room)]
        if new:
            self.cells |= dict(zip(new, self.measure(new), strict=True))

    def _best(self, settings: Sequence[Setting]) -> Setting | None:
        known = set(self.known)
        found = [setting for setting in dict.fromkeys(settings) if setting in known]
        # Of two that are equal the one that asks for less.
        return min(found, key=lambda s: (self.score(s), s.rows, s.weight), default=None)

    # What is told ----------------------------------------------------------------------------

    def doubt(self, best: Setting, over: Sequence[str]) -> str:
        """Return why a setting is no choice; empty where it is one."""
        curve = self.along(best)
        if "weight" in over:
            if len(curve) < 3:
                return "fewer than three weights gave numbers"
            scores = {weight: self.score(setting) for weight, setting in curve.items()}
            worst = curve[max(scores, key=lambda weight: scores[weight])]
        else:
            worst = max(self.known, key=self.score)
        values = self.deciding_values(worst), self.deciding_values(best)
        if not difference(self.ranking, *values, confidence=_SURE).low > 0:
            return "the curve is flat: these samples do not tell even the outermost settings apart"
        if best.weight == 0:
            return "no weight is better than 0, which is the target itself"
        picks = self.picks(best)
        if "weight" in over and max(picks) - min(picks) > (max(curve) - min(curve)) / 2:
            shown = ", ".join(f"{weight:.2f}" for weight in picks)
            return f"quarters of the samples choose weights as far apart as {shown}"
        return ""

    def picks(self, best: Setting) -> tuple[float, ...]:
        """Return the weight that each quarter of the deciding samples would choose."""
        curve = {weight: self.values(setting) for weight, setting in self.along(best).items()}
        return tuple(pick(self.ranking, curve, fold) for fold in folds(self.deciding))

    def held_out(self, best: Setting, indices: Sequence[int], what: str) -> HeldOut | None:
        """Compare a setting with its neighbours on samples that it was not chosen on."""
        if not indices:
            return None
        mine = part(self.values(best), indices)
        along = self.along(best)
        smaller = [weight for weight in along if weight < best.weight][-1:]
        larger = [weight for weight in along if weight > best.weight][:1]
        neighbours = tuple(
            Neighbour(w, difference(self.ranking, part(self.values(along[w]), indices), mine))
            for w in (*smaller, *larger)
        )
        value = math.exp(self.ranking.score(mine))
        return HeldOut(len(indices), what, value, neighbours)

    def curves(self, guidance_scale: float) -> tuple[Curve, ...]:
        """Return every curve of at least three weights at one guidance."""
        found: list[Curve] = []
        for setting in self.known:
            if setting.guidance_scale != guidance_scale:
                continue
            along = self.along(setting)
            weights = {weight: self.cells[s].index for weight, s in along.items()}
            if len(along) < 3 or setting.groups or any(c.cells == weights for c in found):
                continue
            curve = {weight: self.deciding_values(s) for weight, s in along.items()}
            best = rounded(pick(self.ranking, curve))
            found.append(Curve(setting.guidance_scale, setting.timesteps, weights, best))
        return tuple(found)
