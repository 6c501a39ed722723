"""The rows of a plan: what is added to each tensor, what is kept and what is left out."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

from merge.errors import CheckpointError
from merge.header import DTYPE_CODES, DTYPE_WORDS, TensorSpec, element_count
from merge.keymap import GUIDANCE_EMBEDDING, is_block_name, unet_blocks
from merge.kinds import FLOAT8
from merge.lora import is_lora
from merge.methods import METHODS
from merge.plan.adapters import Adapter, AdapterReader, Place
from merge.plan.inputs import FLOATS, Inputs, qualified, unsupported
from merge.plan.model import DeltaTerm, LeftOut, LoraTerm, TensorPlan, TensorRef
from merge.plan.opening import Opened, OpenedSources
from merge.plan.patterns import block_weight, match_exclude, unknown_blocks, unmatched
from merge.plan.terms import TermBuilder
from merge.recipe.schema import Recipe

BAKED_BIAS = "time_embedding.linear_1.bias"
_BAKED_LINEAR = "time_embedding.linear_1.weight"


@dataclass
class RowBuilder:
    """Collects rows, reasons and problems while it walks the keys once."""

    recipe: Recipe
    sources: OpenedSources
    rows: list[TensorPlan] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    _loras: dict[str, dict[Place, Adapter]] = field(default_factory=dict)
    _unused: dict[Place, str] = field(default_factory=dict)
    _blocks: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.inputs = Inputs(self.recipe, self.sources)
        self._terms = TermBuilder(self.inputs, self.problems)

    def run(self) -> None:
        """Plan every key; `problems` says what does not fit."""
        for opened in self.sources.models:
            self._note_variant(opened)
            self.left_out += opened.left_out
        reader = AdapterReader(
            self.recipe, self.sources, self.problems, self.notes, self.warnings, self.left_out
        )
        for opened in self.sources.distilled:
            if is_lora(opened.checkpoint.tensors):
                self._loras[opened.role] = reader.read(opened)
        self._name_blocks()
        self._check_patterns()
        self._check_method()
        for component, checkpoint in self.inputs.written():
            for key, (_, spec) in sorted(checkpoint.tensors.items()):
                self._plan_key(component, key, spec)
        if self.recipe.guidance_embedding == "bake":
            self._bake()
        for opened in self.sources.models[1:]:
            if opened.role in self._loras:
                self._leave_out_modules(opened)
            else:
                self._leave_out_keys(opened)
        idle = [
            name
            for name, rows in self.by_component().items()
            if name in self.recipe.components and not _is_merged(rows)
        ]
        if not self.problems and idle and len(idle) < len(self.recipe.components):
            self._tell_idle(idle)
        if not self.problems and not _is_merged(self.rows):
            if self.recipe.allow_noop:
                self.notes.append("nothing is added: the output is the target")
            else:
                self.problems.append(
                    "nothing would be added to the target: every weight is 0 or every key is "
                    "excluded (allow_noop=true permits it)"
                )

    def _tell_idle(self, idle: list[str]) -> None:
        """Refuse components without a delta, but for a UNet where LoRAs are of encoders alone."""
        for name in idle:
            line = f"components: nothing is added to {name}"
            if name == "unet" and len(self._loras) == len(self.sources.distilled):
                self.notes.append(f"{line}: the LoRA has modules of text encoders alone")
            else:
                self.problems.append(line)

    def by_component(self) -> dict[str, list[TensorPlan]]:
        """Return the rows of each merged component."""
        parts: dict[str, list[TensorPlan]] = {}
        for row in self.rows:
            parts.setdefault(row.component, []).append(row)
        return parts

    def _note_variant(self, opened: Opened) -> None:
        asked = {
            "target": self.recipe.models.target.variant,
            "base": self.recipe.models.base.variant if self.recipe.models.base else None,
        }.get(opened.role)
        if asked and asked != opened.model.variant:
            self.notes.append(
                f"{opened.role}: its UNet has no {asked} variant, its plain files are used"
            )

    # Checks ----------------------------------------------------------------------------------

    def _name_blocks(self) -> None:
        try:
            self._blocks = unet_blocks(self.sources.target.checkpoint.tensors)
        except CheckpointError as error:
            # Only block names need them; a UNet with keys of its own can be merged all the same.
            self.notes.append(f"the blocks of this UNet have no names: {error.message}")

    def _check_patterns(self) -> None:
        target = self.sources.target
        keys = {
            qualified(name, key) for name, part in self.inputs.parts(target) for key in part.tensors
        }
        everything = set(keys)
        everything |= {qualified(n, key) for n, part in target.text.items() for key in part.tensors}
        for opened in self.sources.models[1:]:
            for component, part in self.inputs.parts(opened):
                everything |= {qualified(component, key) for key in part.tensors}
        everything |= {item.key for opened in self.sources.models for item in opened.left_out}
        for pattern in unmatched(self.recipe.exclude, everything):
            self.problems.append(f"exclude: {pattern!r} matches no key of any model")
        weights = self.recipe.block_weights
        blocks = set(self._blocks.values())
        blocks |= {"BASE" for name in self.recipe.components if name != "unet"}
        self.problems += unknown_blocks(weights, blocks)
        globs = [pattern for pattern in weights if not is_block_name(pattern)]
        for pattern in unmatched(globs, {*keys, GUIDANCE_EMBEDDING}):
            self.problems.append(f"block_weights: {pattern!r} matches no key of the target")

    def _check_method(self) -> None:
        method = METHODS[self.recipe.method]
        if method.needs_parents and self._loras:
            self.problems.append(
                f"method {method.name} needs whole models, and {', '.join(self._loras)} is a LoRA"
            )
        for component in self.recipe.components:
            if self.sources.target.component(component) is None:
                self.problems.append(
                    f"components: {component} cannot be merged: the target is no pipeline folder "
                    "that has it (`instruct-merge convert` makes one of a single file)"
                )

    # Rows ------------------------------------------------------------------------------------

    def _plan_key(self, component: str, key: str, spec: TensorSpec) -> None:
        target = self.inputs.ref(self.sources.target, component, key)
        place = (component, key)
        if spec.dtype not in FLOATS:
            if spec.dtype.startswith(("F", "C", "BF")):
                self.problems.append(f"{key}: {unsupported(spec.dtype)} in the target")
                return
            if role := self._adding(place):
                word = DTYPE_WORDS.get(spec.dtype, spec.dtype)
                self.problems.append(f"{key}: {word} in the target, and {role} adds to it")
                return
            self._keep(place, target, spec.dtype, "an integer tensor, kept from the target")
            return
        if component not in self.recipe.components:
            code = spec.dtype if target.scale is None else "F32"
            self._keep(place, target, code, f"{component} is not merged")
            return
        code = DTYPE_CODES.get(self.recipe.out_dtype, spec.dtype)
        if code in FLOAT8:
            self.problems.append(
                f"{key}: {DTYPE_WORDS[code]} in the target, and merged weights are not written in "
                "float8; set out_dtype to float16, bfloat16 or float32"
            )
            return
        if pattern := match_exclude(qualified(*place), self.recipe.exclude):
            self._keep(place, target, code, f"excluded by {pattern!r}")
            return
        weight = self._weight(component, key)
        if weight is None:
            return
        if weight == 0:
            self._keep(place, target, code, "its weight is 0")
            return
        self._plan_delta(place, target, code, weight)

    def _adding(self, place: Place) -> str:
        """Return the role of a distilled model that has numbers to add to a tensor."""
        for opened in self.sources.distilled:
            if opened.role in self._loras:
                if place in self._loras[opened.role]:
                    return opened.role
                continue
            key = self.inputs.spelling(opened, *place)
            checkpoint = opened.component(place[0])
            if checkpoint is None or key is None:
                continue
            if checkpoint.tensors[key][1].dtype in FLOATS:
                return opened.role
        return ""

    def _block(self, component: str, key: str) -> str:
        return self._blocks.get(key, "") if component == "unet" else "BASE"

    def _weight(self, component: str, key: str) -> float | None:
        try:
            return block_weight(
                qualified(component, key),
                self.recipe.block_weights,
                self.recipe.weight,
                self._block(component, key),
            )
        except ValueError as error:
            self.problems.append(f"block_weights: {error}")
            return None

    def _plan_delta(self, place: Place, target: TensorRef, code: str, weight: float) -> None:
        component, key = place
        deltas: list[DeltaTerm] = []
        loras: list[LoraTerm] = []
        count = len(self.problems)
        pairs = zip(self.sources.distilled, self.recipe.models.distilled, strict=True)
        for index, (opened, own) in enumerate(pairs):
            scaled = weight * own.weight
            if scaled == 0:
                continue
            if opened.role in self._loras:
                adapter = self._loras[opened.role].get(place)
                if adapter is not None:
                    loras.append(self._terms.lora(opened, index, adapter, scaled))
            elif term := self._terms.delta(place, opened, index, target, scaled):
                deltas.append(term)
        if len(self.problems) > count:
            return
        if not deltas and not loras:
            has_full = len(self._loras) < len(self.sources.distilled)
            reason = "not in the LoRA" if not has_full else ""
            if has_full and component != "unet":
                reason = "no distilled model has this component"
            self._keep(place, target, code, reason)
            return
        kept, reason = self._channel_rule(key, target, deltas, loras)
        if kept:
            self._keep(place, target, code, reason)
            return
        is_by_input = any(term.is_by_input for term in loras)
        is_whole = METHODS[self.recipe.method].scope == "tensor" or is_by_input
        if is_whole:
            what = "a DoRA of inputs" if is_by_input else "its method"
            reason = "; ".join(filter(None, (reason, f"{what} needs the whole tensor at once")))
        self.rows.append(
            TensorPlan(
                key,
                component,
                "delta" if deltas else "lora",
                target,
                code,
                tuple(deltas),
                tuple(loras),
                weight,
                reason,
                self._block(component, key),
                is_whole=is_whole,
            )
        )

    def _channel_rule(
        self, key: str, target: TensorRef, deltas: list[DeltaTerm], loras: list[LoraTerm]
    ) -> tuple[bool, str]:
        """Return whether the target is kept where a delta has fewer input channels, and why."""
        if len(target.shape) < 2:
            return False, ""
        wide = target.shape[1]
        row = element_count(target.shape[1:])
        widths = {term.base.shape[1] for term in deltas}
        widths |= {term.columns * wide // row for term in loras if row}
        if widths <= {wide}:
            return False, ""
        rule = self.recipe.channel_rule
        counts = ", ".join(str(width) for width in sorted(widths))
        what = f"{wide} input channels in the target, {counts} in the delta"
        if len(widths) > 1 and rule != "skip":
            self.problems.append(f"{key}: {what}; deltas of different widths cannot be added")
        elif rule == "error":
            self.problems.append(f"{key}: {what}; set channel_rule to skip or first")
        if rule == "first":
            return False, f"{what}; added to the first {counts}"
        return True, f"{what}; channel_rule {rule}"

    def _keep(self, place: Place, target: TensorRef, code: str, reason: str) -> None:
        component, key = place
        action = "copy" if target.dtype == code and target.scale is None else "cast"
        self._unused[place] = reason
        block = self._block(component, key)
        self.rows.append(
            TensorPlan(key, component, action, target, code, reason=reason, block=block)
        )

    # The guidance embedding ------------------------------------------------------------------

    def _bake(self) -> None:
        """Fold every guidance embedding into the bias of the layer that it feeds."""
        by_key = {row.key: index for index, row in enumerate(self.rows) if row.component == "unet"}
        embedded = [
            (opened, own.weight)
            for opened, own in zip(
                self.sources.distilled, self.recipe.models.distilled, strict=True
            )
            if opened.role not in self._loras and GUIDANCE_EMBEDDING in opened.checkpoint.tensors
        ]
        if not embedded:
            self.problems.append(
                f"guidance_embedding: bake: no distilled model has {GUIDANCE_EMBEDDING}"
            )
            return
        if not {BAKED_BIAS, _BAKED_LINEAR} <= by_key.keys():
            self.problems.append(f"guidance_embedding: bake: the target has no {BAKED_BIAS}")
            return
        bias, linear = self.rows[by_key[BAKED_BIAS]], self.rows[by_key[_BAKED_LINEAR]]
        excluded = match_exclude(GUIDANCE_EMBEDDING, self.recipe.exclude) or match_exclude(
            BAKED_BIAS, self.recipe.exclude
        )
        if excluded:
            self._unused["unet", GUIDANCE_EMBEDDING] = f"excluded by {excluded!r}"
            return
        weight = self._weight("unet", GUIDANCE_EMBEDDING) or 0.0
        terms = self._terms.bakes(embedded, linear, weight)
        if terms:
            reason = f"guidance scale {self.recipe.bake_guidance:g} baked in"
            self.rows[by_key[BAKED_BIAS]] = dataclasses.replace(
                bias, action="bake", bakes=tuple(terms), weight=weight, reason=reason
            )
        else:
            self._unused["unet", GUIDANCE_EMBEDDING] = "its weight is 0"

    # What is left ----------------------------------------------------------------------------

    def _leave_out_keys(self, opened: Opened) -> None:
        """Give a reason for every key of a full model that no row uses."""
        used = {(row.component, row.key) for row in self.rows if row.deltas}
        used |= {
            ("unet", GUIDANCE_EMBEDDING)
            for row in self.rows
            for term in row.bakes
            if term.role == opened.role
        }
        target = self.sources.target
        for component, checkpoint in self.inputs.parts(opened):
            part = target.component(component)
            for key in sorted(checkpoint.tensors):
                ours = self.inputs.spelling(target, component, key) if part is not None else None
                place = (component, ours or key)
                if place in used:
                    continue
                name = qualified(component, key)
                if ours is not None or place in self._unused:
                    reason = self._unused.get(place, "not used")
                    self.left_out.append(LeftOut(opened.role, name, reason))
                elif pattern := match_exclude(name, self.recipe.exclude):
                    self.left_out.append(LeftOut(opened.role, name, f"excluded by {pattern!r}"))
                elif key == GUIDANCE_EMBEDDING:
                    self._leave_out_embedding(opened)
                elif key.endswith("position_ids"):
                    self.left_out.append(LeftOut(opened.role, name, "a constant, not a weight"))
                else:
                    self.problems.append(f"{name}: in {opened.role}, and not in the target")

    def _leave_out_embedding(self, opened: Opened) -> None:
        if self.recipe.guidance_embedding == "error":
            self.problems.append(
                f"{GUIDANCE_EMBEDDING}: {opened.role} has this guidance embedding, the target has "
                "not (guidance_embedding=drop leaves it out, bake folds it into a bias)"
            )
        else:
            reason = "an InstructPix2Pix pipeline never feeds it; guidance_embedding drop"
            self.left_out.append(LeftOut(opened.role, GUIDANCE_EMBEDDING, reason))

    def _leave_out_modules(self, opened: Opened) -> None:
        used = {
            (row.component, row.key)
            for row in self.rows
            if any(term.role == opened.role for term in row.loras)
        }
        for place, adapter in self._loras[opened.role].items():
            if place in used:
                continue
            reason = self._unused.get(place, "")
            if not reason:
                pattern = match_exclude(qualified(*place), self.recipe.exclude)
                reason = f"excluded by {pattern!r}" if pattern else "not used"
            self.left_out += [LeftOut(opened.role, name, reason) for name in adapter.module.names]


def _is_merged(rows: list[TensorPlan]) -> bool:
    return any(row.is_merged for row in rows)
