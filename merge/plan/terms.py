"""The terms of a row: what is added to one tensor, checked against its shape and dtype."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

from merge.family.model import GuidanceEmbedding
from merge.header.dtypes import DTYPE_WORDS, element_count
from merge.lora.module import AdapterModule
from merge.plan.adapters import Adapter, Place
from merge.plan.findings import Findings
from merge.plan.inputs import FLOATS, Inputs, unsupported
from merge.plan.model import BakeTerm, DeltaTerm, LoraTerm, TensorPlan, TensorRef
from merge.plan.opening import Opened


@dataclass(frozen=True, slots=True)
class TermBuilder:
    """Makes terms; what does not fit is added to the problems.

    Attributes:
        inputs: The models.
        found: Gets the problems; shared with the builder of the rows.
    """

    inputs: Inputs
    found: Findings

    @property
    def _main(self) -> str:
        return self.inputs.sources.family.main.name

    def delta(
        self, place: Place, opened: Opened, index: int, target: TensorRef, weight: float
    ) -> DeltaTerm | None:
        """Return a full model's part, or None where it has none or does not fit."""
        component, key = place
        base = self.inputs.sources.base
        assert base is not None
        pair = [(model, self.inputs.spelling(model, component, key)) for model in (base, opened)]
        lacking = [model.role for model, name in pair if name is None]
        if lacking:
            if component != self._main and all(component not in m.parts for m, _ in pair):
                return None
            self.found.problem(f"{key}: missing in {' and '.join(lacking)}")
            return None
        base_ref, distilled_ref = (
            self.inputs.ref(model, component, name) for model, name in pair if name is not None
        )
        for role, ref in ((opened.role, distilled_ref), (base.role, base_ref)):
            if ref.dtype not in FLOATS:
                self.found.problem(f"{key}: {unsupported(ref.dtype)} in {role}")
                return None
        shapes = (target.shape, base_ref.shape, distilled_ref.shape)
        is_widened = self.inputs.sources.family.is_widened(component, key)
        narrow = is_widened and _is_narrower(base_ref.shape, target.shape)
        if base_ref.shape != distilled_ref.shape or not (base_ref.shape == target.shape or narrow):
            self.found.problem(
                f"{key}: shape {list(shapes[0])} in target, {list(shapes[1])} in base, "
                f"{list(shapes[2])} in {opened.role}"
            )
            return None
        return DeltaTerm(opened.role, index, distilled_ref, base_ref, round_weight(weight))

    def lora(self, opened: Opened, index: int, adapter: Adapter, weight: float) -> LoraTerm:
        """Return a LoRA module's part."""
        module = adapter.module
        names = dict(module.factors)
        refs = {role: self.inputs.ref(opened, "", name) for role, name in names.items()}
        magnitude = base = None
        if module.magnitude:
            names["magnitude"] = module.magnitude
            magnitude = self.inputs.ref(opened, "", module.magnitude)
            base = self._dora_base(module)
        checked = {**refs, **({"magnitude": magnitude} if magnitude is not None else {})}
        for role, ref in checked.items():
            if ref.dtype not in FLOATS:
                self.found.problem(f"{names[role]}: {unsupported(ref.dtype)} in {opened.role}")
        return LoraTerm(
            opened.role,
            index,
            module.form,
            tuple(refs.items()),
            module.rows,
            module.columns,
            weight,
            adapter.alpha,
            module.divisor,
            magnitude,
            base,
            module.is_by_input,
        )

    def _dora_base(self, module: AdapterModule) -> TensorRef | None:
        """Return the weight that a DoRA module was trained on."""
        base = self.inputs.sources.base
        if base is None:
            return None  # The adapter's reader has named this problem.
        name = self.inputs.spelling(base, module.component, module.key)
        if name is None:
            self.found.problem(f"{module.key}: a DoRA module needs it, and it is missing in base")
            return None
        ref = self.inputs.ref(base, module.component, name)
        if ref.dtype not in FLOATS or element_count(ref.shape) != module.rows * module.columns:
            self.found.problem(
                f"{module.key}: {DTYPE_WORDS.get(ref.dtype, ref.dtype)} of shape {list(ref.shape)} "
                f"in base, and a DoRA module of {module.rows} x {module.columns}"
            )
        return ref

    def bakes(
        self,
        embedding: GuidanceEmbedding,
        embedded: Sequence[tuple[Opened, float]],
        linear: TensorPlan,
        weight: float,
        guidance: float,
    ) -> list[BakeTerm]:
        """Return the guidance embeddings of full models, each with the model's own weight."""
        terms = []
        for opened, own in embedded:
            ref = self.inputs.ref(opened, self._main, embedding.key)
            fits = len(ref.shape) == 2 and ref.shape[0] == linear.target.shape[-1]
            if ref.dtype not in FLOATS or not fits:
                self.found.problem(
                    f"{embedding.key}: {DTYPE_WORDS.get(ref.dtype, ref.dtype)} of shape "
                    f"{list(ref.shape)} in {opened.role}, for a layer of shape "
                    f"{list(linear.target.shape)}"
                )
            elif weight * own:
                terms.append(BakeTerm(opened.role, ref, weight * own, guidance, linear))
        return terms


def round_weight(weight: float) -> float:
    """Round a weight once to float32; the engine's arithmetic uses this value."""
    return float(struct.unpack("<f", struct.pack("<f", weight))[0])


def _is_narrower(shape: tuple[int, ...], wide: tuple[int, ...]) -> bool:
    """Return True when only the input channels differ, and `shape` has fewer."""
    return (
        len(shape) == len(wide) == 4
        and shape[0] == wide[0]
        and shape[2:] == wide[2:]
        and shape[1] < wide[1]
    )
