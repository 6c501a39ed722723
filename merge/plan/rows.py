"""The rows of a plan: what is added to each tensor, what is kept and what is left out."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

from merge.errors import CheckpointError
from merge.header.dtypes import DTYPE_CODES, DTYPE_WORDS, element_count
from merge.header.model import TensorSpec
from merge.methods.table import METHODS
from merge.plan.adapters import Adapter, AdapterReader, Place
from merge.plan.findings import Findings
from merge.plan.inputs import FLOATS, Inputs, unsupported
from merge.plan.model import DeltaTerm, LoraTerm, TensorPlan, TensorRef
from merge.plan.opening import Opened, OpenedSources
from merge.plan.patterns import block_weight, match_exclude, unknown_blocks, unmatched
from merge.plan.terms import TermBuilder
from merge.plan.unused import UnusedKeys
from merge.reader.kinds.quantized import FLOAT8
from merge.recipe.schema import Recipe


@dataclass
class RowBuilder:
    """Collects rows, reasons and problems while it walks the keys once."""

    recipe: Recipe
    sources: OpenedSources
    found: Findings = field(default_factory=Findings)
    rows: list[TensorPlan] = field(default_factory=list)
    _loras: dict[str, dict[Place, Adapter]] = field(default_factory=dict)
    _unused: dict[Place, str] = field(default_factory=dict)
    _blocks: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.family = self.sources.family
        self.components = self.family.merged(self.recipe.components)
        self.inputs = Inputs(self.components, self.sources)
        self._terms = TermBuilder(self.inputs, self.found)

    def run(self) -> None:
        """Plan every key; `found` says what does not fit."""
        for opened in self.sources.models:
            self._note_variant(opened)
            self.found.left_out.extend(opened.left_out)
        reader = AdapterReader(self.recipe, self.components, self.sources, self.found)
        for opened in self.sources.distilled:
            if opened.is_lora:
                self._loras[opened.role] = reader.read(opened)
        self._name_blocks()
        self._check_patterns()
        self._check_method()
        for component, checkpoint in self.inputs.written():
            for key, (_, spec) in sorted(checkpoint.tensors.items()):
                self._plan_key(component, key, spec)
        if self.recipe.guidance_embedding == "bake":
            self._bake()
        unused = UnusedKeys(self.recipe, self.inputs, self.rows, self._unused, self.found)
        for opened in self.sources.models[1:]:
            if opened.role in self._loras:
                self.found.left_out.extend(unused.of_lora(opened, self._loras[opened.role]))
            else:
                self.found.left_out.extend(unused.of_model(opened))
        idle = [
            name
            for name, rows in self.by_component().items()
            if name in self.components and not _is_merged(rows)
        ]
        if not self.found.problems and idle and len(idle) < len(self.components):
            self._tell_idle(idle)
        if not self.found.problems and not _is_merged(self.rows):
            if self.recipe.allow_noop:
                self.found.notes.append("nothing is added: the output is the target")
            else:
                self.found.problem(
                    "nothing would be added to the target: every weight is 0 or every key is "
                    "excluded (allow_noop=true permits it)"
                )

    def _tell_idle(self, idle: list[str]) -> None:
        """Refuse components without a delta, but for the main one where LoRAs are of others."""
        for name in idle:
            line = f"components: nothing is added to {name}"
            is_main = name == self.family.main.name
            if is_main and len(self._loras) == len(self.sources.distilled):
                self.found.notes.append(f"{line}: the LoRA has modules of text encoders alone")
            else:
                self.found.problem(line)

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
            self.found.notes.append(
                f"{opened.role}: its {self.family.main.title} has no {asked} variant, its plain "
                "files are used"
            )

    # Checks ----------------------------------------------------------------------------------

    def _name_blocks(self) -> None:
        try:
            self._blocks = self.family.blocks.names(self.sources.target.checkpoint.tensors)
        except CheckpointError as error:
            # Only block names need them; a model with keys of its own can be merged all the same.
            what = f"the blocks of this {self.family.main.title} have no names"
            self.found.notes.append(f"{what}: {error.message}")

    def _check_patterns(self) -> None:
        target, qualified, main = self.sources.target, self.family.qualified, self.family.main.name
        keys = {
            qualified(name, key) for name, part in self.inputs.parts(target) for key in part.tensors
        }
        everything = set(keys)
        for name, part in target.parts.items():
            if name != main:
                everything |= {qualified(name, key) for key in part.tensors}
        for opened in self.sources.models[1:]:
            for component, part in self.inputs.parts(opened):
                everything |= {qualified(component, key) for key in part.tensors}
        everything |= {item.key for opened in self.sources.models for item in opened.left_out}
        for pattern in unmatched(self.recipe.exclude, everything):
            self.found.problem(f"exclude: {pattern!r} matches no key of any model")
        weights = self.recipe.block_weights
        blocks = set(self._blocks.values())
        blocks |= {self.family.blocks.rest for name in self.components if name != main}
        self.found.problems.extend(unknown_blocks(weights, self.family, blocks))
        globs = [pattern for pattern in weights if not self.family.blocks.is_name(pattern)]
        guidance = [self.family.guidance.key] if self.family.guidance is not None else []
        for pattern in unmatched(globs, {*keys, *guidance}):
            self.found.problem(f"block_weights: {pattern!r} matches no key of the target")

    def _check_method(self) -> None:
        method = METHODS[self.recipe.method]
        if method.needs_parents and self._loras:
            self.found.problem(
                f"method {method.name} needs whole models, and {', '.join(self._loras)} is a LoRA"
            )
        for component in self.components:
            if component not in self.sources.target.parts:
                self.found.problem(
                    f"components: {component} cannot be merged: the target is no pipeline folder "
                    "that has it (`instruct-merge convert` makes one of a single file)"
                )

    # Rows ------------------------------------------------------------------------------------

    def _plan_key(self, component: str, key: str, spec: TensorSpec) -> None:
        target = self.inputs.ref(self.sources.target, component, key)
        place = (component, key)
        if spec.dtype not in FLOATS:
            if spec.dtype.startswith(("F", "C", "BF")):
                self.found.problem(f"{key}: {unsupported(spec.dtype)} in the target")
                return
            if role := self._adding(place):
                word = DTYPE_WORDS.get(spec.dtype, spec.dtype)
                self.found.problem(f"{key}: {word} in the target, and {role} adds to it")
                return
            self._keep(place, target, spec.dtype, "an integer tensor, kept from the target")
            return
        if component not in self.components:
            code = spec.dtype if target.scale is None else "F32"
            self._keep(place, target, code, f"{component} is not merged")
            return
        code = DTYPE_CODES.get(self.recipe.out_dtype, spec.dtype)
        if code in FLOAT8:
            self.found.problem(
                f"{key}: {DTYPE_WORDS[code]} in the target, and merged weights are not written in "
                "float8; set out_dtype to float16, bfloat16 or float32"
            )
            return
        if pattern := match_exclude(self.family.qualified(*place), self.recipe.exclude):
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
            if key is not None and opened.parts[place[0]].tensors[key][1].dtype in FLOATS:
                return opened.role
        return ""

    def _block(self, component: str, key: str) -> str:
        if component != self.family.main.name:
            return self.family.blocks.rest
        return self._blocks.get(key, "")

    def _weight(self, component: str, key: str) -> float | None:
        try:
            return block_weight(
                self.family.qualified(component, key),
                self.recipe.block_weights,
                self.recipe.weight,
                self.family.blocks,
                self._block(component, key),
            )
        except ValueError as error:
            self.found.problem(f"block_weights: {error}")
            return None

    def _plan_delta(self, place: Place, target: TensorRef, code: str, weight: float) -> None:
        component, key = place
        deltas: list[DeltaTerm] = []
        loras: list[LoraTerm] = []
        count = len(self.found.problems)
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
        if len(self.found.problems) > count:
            return
        if not deltas and not loras:
            has_full = len(self._loras) < len(self.sources.distilled)
            reason = "not in the LoRA" if not has_full else ""
            if has_full and component != self.family.main.name:
                reason = "no distilled model has this component"
            self._keep(place, target, code, reason)
            return
        kept, reason = self._channel_rule(key, target, deltas, loras)
        if kept:
            self._keep(place, target, code, reason)
            return
        is_by_input = any(term.is_by_input for term in loras)
        is_whole = METHODS[self.recipe.method].is_whole or is_by_input
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
            self.found.problem(f"{key}: {what}; deltas of different widths cannot be added")
        elif rule == "error":
            self.found.problem(f"{key}: {what}; set channel_rule to skip or first")
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
        rule, main = self.family.guidance, self.family.main.name
        if rule is None:
            self.found.problem(
                f"guidance_embedding: bake: {self.family.title} models have no guidance embedding"
            )
            return
        by_key = {row.key: index for index, row in enumerate(self.rows) if row.component == main}
        embedded = [
            (opened, own.weight)
            for opened, own in zip(
                self.sources.distilled, self.recipe.models.distilled, strict=True
            )
            if opened.role not in self._loras and rule.key in opened.checkpoint.tensors
        ]
        if not embedded:
            self.found.problem(f"guidance_embedding: bake: no distilled model has {rule.key}")
            return
        if not {rule.bias, rule.linear} <= by_key.keys():
            self.found.problem(f"guidance_embedding: bake: the target has no {rule.bias}")
            return
        bias, linear = self.rows[by_key[rule.bias]], self.rows[by_key[rule.linear]]
        exclude = self.recipe.exclude
        excluded = match_exclude(rule.key, exclude) or match_exclude(rule.bias, exclude)
        if excluded:
            self._unused[main, rule.key] = f"excluded by {excluded!r}"
            return
        weight, guidance = self._weight(main, rule.key) or 0.0, self.recipe.bake_guidance
        assert guidance is not None
        terms = self._terms.bakes(rule, embedded, linear, weight, guidance)
        if terms:
            reason = f"guidance scale {guidance:g} baked in"
            self.rows[by_key[rule.bias]] = dataclasses.replace(
                bias, action="bake", bakes=tuple(terms), weight=weight, reason=reason
            )
        else:
            self._unused[main, rule.key] = "its weight is 0"


def _is_merged(rows: list[TensorPlan]) -> bool:
    return any(row.is_merged for row in rows)
