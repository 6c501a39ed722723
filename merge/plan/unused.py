"""The keys of base and distilled that no row uses: a reason for each, or a problem."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from merge.plan.adapters import Adapter, Place
from merge.plan.findings import Findings
from merge.plan.inputs import Inputs
from merge.plan.model import LeftOut, TensorPlan
from merge.plan.opening import Opened
from merge.plan.patterns import match_exclude
from merge.recipe.schema import Recipe


@dataclass(frozen=True, slots=True)
class UnusedKeys:
    """Finds out why keys are not used.

    Attributes:
        recipe: For its exclusions, and its rule for guidance embeddings.
        inputs: The models.
        rows: Of the plan, all of them.
        reasons: Why a tensor of the target received nothing.
        found: Gets a problem for each key that there is no good reason for.
    """

    recipe: Recipe
    inputs: Inputs
    rows: Sequence[TensorPlan]
    reasons: Mapping[Place, str]
    found: Findings

    def of_model(self, opened: Opened) -> Iterator[LeftOut]:
        """Yield every key of a full model that no row uses."""
        family, target = self.inputs.sources.family, self.inputs.sources.target
        guidance = family.guidance.key if family.guidance is not None else None
        used = {(row.component, row.key) for row in self.rows if row.deltas}
        baked = (term.role for row in self.rows for term in row.bakes)
        if guidance is not None and opened.role in baked:
            used.add((family.main.name, guidance))
        for component, part in self.inputs.parts(opened):
            is_shared = component in target.parts
            for key in sorted(part.tensors):
                ours = self.inputs.spelling(target, component, key) if is_shared else None
                place = (component, ours or key)
                if place in used:
                    continue
                name = family.qualified(component, key)
                if ours is not None or place in self.reasons:
                    yield LeftOut(opened.role, name, self.reasons.get(place, "not used"))
                elif pattern := match_exclude(name, self.recipe.exclude):
                    yield LeftOut(opened.role, name, f"excluded by {pattern!r}")
                elif key == guidance:
                    yield from self._embedding(opened, key)
                elif key.endswith("position_ids"):
                    yield LeftOut(opened.role, name, "a constant, not a weight")
                else:
                    self.found.problem(f"{name}: in {opened.role}, and not in the target")

    def _embedding(self, opened: Opened, key: str) -> Iterator[LeftOut]:
        if self.recipe.guidance_embedding == "error":
            self.found.problem(
                f"{key}: {opened.role} has this guidance embedding, the target has "
                "not (guidance_embedding=drop leaves it out, bake folds it into a bias)"
            )
        else:
            reason = "an InstructPix2Pix pipeline never feeds it; guidance_embedding drop"
            yield LeftOut(opened.role, key, reason)

    def of_lora(self, opened: Opened, adapters: Mapping[Place, Adapter]) -> Iterator[LeftOut]:
        """Yield the keys of every module of a LoRA that no row uses."""
        used = {
            (row.component, row.key)
            for row in self.rows
            if any(term.role == opened.role for term in row.loras)
        }
        for place, adapter in adapters.items():
            if place in used:
                continue
            reason = self.reasons.get(place, "")
            if not reason:
                name = self.inputs.sources.family.qualified(*place)
                pattern = match_exclude(name, self.recipe.exclude)
                reason = f"excluded by {pattern!r}" if pattern else "not used"
            for key in adapter.module.names:
                yield LeftOut(opened.role, key, reason)
