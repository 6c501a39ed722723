"""What is added to one block of a tensor: deltas, adapters, methods, a baked embedding."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from merge.engine.bake import bake_bias, guidance_embedding
from merge.engine.buffers import Buffers
from merge.engine.order_free import Factored, make_order_free
from merge.lora.dora import dora_delta_columns, dora_delta_rows
from merge.lora.forms.table import delta_rows, row_steps
from merge.methods.table import METHODS
from merge.plan.model import BakeTerm, DeltaTerm, LoraTerm, TensorPlan
from merge.plan.terms import round_weight

# An adapter's factors in float64, as stored.
Factors = Mapping[str, torch.Tensor]
# Slots of growing float64 memory: two for products, one for a DoRA's base, the rest for factors.
_PRODUCTS = 2
_BASE_ROWS = -1
# Elements of an intermediate result that is not in the buffers: 1 MiB in float64.
_STEP_ELEMENTS = 128 * 1024
# Scales of up to 2^64 keep every factor and product within float64.
_SHIFT = 64
# Elements of a delta that are looked at before all of them are.
_FIRST = 256


class TermAdder:
    """Adds the terms of a row to blocks of it, in one worker's memory."""

    def __init__(self, buffers: Buffers, method: str, params: Mapping[str, object]) -> None:
        self._buffers = buffers
        self._method = METHODS[method]
        self._params = params
        self._prepared = torch.empty(0)
        self._first_row = 0

    def read_factors(self, tensor: TensorPlan) -> list[Factors]:
        """Read the factors of every adapter of a row; they stay until the next call."""
        found: list[Factors] = []
        slot = _PRODUCTS
        for term in tensor.loras:
            factors = {}
            named = [*term.factors]
            if term.magnitude is not None:
                named.append(("magnitude", term.magnitude))
            for role, ref in named:
                values = self._buffers.read_grown(ref, 0, ref.element_count, slot, torch.float64)
                factors[role] = values.view(ref.shape)
                slot += 1
            if self._is_folded(term):
                factors["up"] *= term.scale
            found.append(factors)
        return found

    def add(
        self,
        tensor: TensorPlan,
        factors: Sequence[Factors],
        values: torch.Tensor,
        start: int,
        *,
        is_changed: bool = False,
    ) -> bool:
        """Add every delta of a row to a block of it, in place; after `prepare`.

        Args:
            tensor: The row.
            factors: From `read_factors`.
            values: The block, float32; whole rows where the row is merged by row.
            start: Its first element.
            is_changed: True when it is known already that a delta is not zero.

        Returns:
            True when an element of any delta differs from zero.
        """
        if not self._method.is_sum:
            return self._combine(tensor, factors, values, start)
        changed = is_changed
        for term in tensor.deltas:
            view, delta = self._delta(tensor, term, values, start)
            self._sum(view, delta, term.weight)
            changed = changed or _has_values(delta)
        if tensor.loras:
            view, delta = self._loras(tensor, values, start)
            self._sum(view, delta, 1.0)
            changed = changed or _has_values(delta)
        return changed

    def _sum(self, view: torch.Tensor, delta: torch.Tensor, weight: float) -> None:
        """Let a method that only adds deltas add one of them."""
        self._method.merge(view, [delta], [weight], self._params)

    def baked(self, term: BakeTerm, linear: torch.Tensor) -> torch.Tensor:
        """Return what the bias gains, `(out,)` in float64.

        Args:
            term: A guidance embedding.
            linear: `(out, in)`, the merged weight of the layer, float64.
        """
        ref = term.embedding
        embedding = guidance_embedding(term.guidance, ref.shape[1])
        values = torch.tensor(embedding, dtype=torch.float64, device=self._buffers.device)
        cond_proj = self._buffers.read_grown(ref, 0, ref.element_count, _PRODUCTS, torch.float64)
        baked: torch.Tensor = bake_bias(linear, cond_proj.view(ref.shape), values, term.weight)
        return baked

    # Deltas ----------------------------------------------------------------------------------

    def _delta(
        self, tensor: TensorPlan, term: DeltaTerm, values: torch.Tensor, start: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the part of a block that a delta covers, and the delta, without its weight."""
        view, start, count = self._covered(tensor, values, start)
        delta = self._buffers.read_float(term.distilled, start, count, 1)
        delta -= self._buffers.read_float(term.base, start, count, 2)
        return view, delta if view is values else delta.view(view.shape)

    @staticmethod
    def _covered(
        tensor: TensorPlan, values: torch.Tensor, start: int
    ) -> tuple[torch.Tensor, int, int]:
        """Return a block's covered part, and where that starts in the delta and its length."""
        row, covered = tensor.row_elements, tensor.delta_row_elements
        if covered == row:
            return values, start, values.numel()
        # Only the first input channels of each filter receive a delta.
        view = values.view(-1, row)[:, :covered]
        return view, start // row * covered, view.numel()

    def prepare(
        self, tensor: TensorPlan, factors: Sequence[Factors], start: int, count: int
    ) -> None:
        """Multiply the factors of a row's adapters, for the blocks of a range of it.

        Args:
            tensor: The row.
            factors: From `read_factors`.
            start: First element of the range, the begin of a row.
            count: Elements, whole rows.
        """
        if not tensor.loras or not self._method.is_sum:
            return
        first = start // tensor.row_elements
        rows = count // tensor.row_elements
        covered = tensor.delta_row_elements
        total = self._buffers.grown(torch.float64, 0, rows * covered).view(rows, covered)
        products = []
        for index, (term, parts) in enumerate(zip(tensor.loras, factors, strict=True)):
            product = total
            if index:
                product = self._buffers.grown(torch.float64, 1, rows * covered)
                product = product.view(rows, covered)
            # The scale of a lone adapter is left to the blocks, which stay in the cache.
            scale = 1.0 if self._is_lone(tensor) or self._is_folded(term) else term.scale
            self._product(term, parts, first, product, scale, term.weight)
            if index:
                total += product
            if term.form == "lora":
                products.append(_matrices(term, parts, first, rows, scale))
        self._prepared, self._first_row = total, first
        if _depends_on_order(tensor.loras):
            make_order_free(total, products, self.product(tensor, start, count)[1])

    def _is_folded(self, term: LoraTerm) -> bool:
        """Return True when the scale is put into a factor, where there are fewer elements.

        A power of two changes exponents alone, so the product has the same bits.
        """
        mantissa, exponent = math.frexp(term.scale)
        is_plain = self._method.is_sum and term.form == "lora" and term.base is None
        return is_plain and mantissa == 0.5 and abs(exponent) <= _SHIFT

    @staticmethod
    def _is_lone(tensor: TensorPlan) -> bool:
        return len(tensor.loras) == 1 and tensor.loras[0].base is None

    def low_rank(self, tensor: TensorPlan, factors: Sequence[Factors]) -> Factored | None:
        """Return a row's only adapter and the scale that it lacks, from `read_factors`.

        None for what is not a product of two matrices alone.
        """
        if not self._is_lone(tensor) or tensor.loras[0].form != "lora":
            return None
        (term,), (parts,) = tensor.loras, factors
        return _matrices(term, parts, 0, term.rows, 1.0 if self._is_folded(term) else term.scale)

    def product(self, tensor: TensorPlan, start: int, count: int) -> tuple[torch.Tensor, float]:
        """Return the sum of a row's adapters for a block of it; after `prepare`.

        Args:
            tensor: The row.
            start: The block's first element, the begin of a row.
            count: Its elements, whole rows.

        Returns:
            The sum, `(rows, columns)` in float64, and the factor that it still lacks.
        """
        first = start // tensor.row_elements - self._first_row
        total = self._prepared[first : first + count // tensor.row_elements]
        is_scaled = not self._is_lone(tensor) or self._is_folded(tensor.loras[0])
        return total, 1.0 if is_scaled else tensor.loras[0].scale

    def _loras(
        self, tensor: TensorPlan, values: torch.Tensor, start: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the part of a block that adapters cover, and their sum rounded to float32."""
        total, factor = self.product(tensor, start, values.numel())
        if factor != 1.0:
            scaled = self._buffers.grown(torch.float64, 1, total.numel()).view(total.shape)
            total = torch.mul(total, factor, out=scaled)
        rows, covered = total.shape
        delta = self._buffers.scratch(1, rows * covered).view(rows, covered)
        delta.copy_(total)
        return values.view(rows, -1)[:, :covered], delta

    def _product(
        self,
        term: LoraTerm,
        factors: Factors,
        first: int,
        out: torch.Tensor,
        scale: float,
        weight: float,
    ) -> None:
        """Write rows of an adapter's delta to `out`, `(rows, columns)` in float64.

        Args:
            term: The adapter.
            factors: Its factors.
            first: First row.
            out: Overwritten.
            scale: Of an additive adapter.
            weight: Of a DoRA, whose strength is inside its norm.
        """
        rows = len(out)
        if term.form == "lora":
            matrices = _matrices(term, factors, first, rows, scale)
            torch.mm(matrices.up, matrices.down, out=out)
        else:
            most = _STEP_ELEMENTS // term.columns
            for begin, end in row_steps(term.form, factors, first, first + rows, most):
                out[begin - first : end - first] = delta_rows(term.form, factors, begin, end)
        if term.base is None:
            if scale != 1.0:
                out *= scale
            return
        out *= term.strength
        count = rows * term.columns
        base = self._buffers.read_grown(
            term.base, first * term.columns, count, _BASE_ROWS, torch.float64
        )
        base = base.view(rows, term.columns)
        if term.is_by_input:
            # The whole weight at once, see `TensorPlan.is_whole`.
            out.copy_(dora_delta_columns(base, out, factors["magnitude"].reshape(-1)))
            out *= weight
            return
        magnitude = factors["magnitude"].reshape(-1)[first : first + rows]
        step = max(1, _STEP_ELEMENTS // term.columns)
        for begin in range(0, rows, step):
            part = slice(begin, begin + step)
            out[part] = dora_delta_rows(base[part], out[part], magnitude[part])
        out *= weight

    # Methods ---------------------------------------------------------------------------------

    def _combine(
        self, tensor: TensorPlan, factors: Sequence[Factors], values: torch.Tensor, start: int
    ) -> bool:
        """Let the method combine all deltas at once."""
        view, first, count = self._covered(tensor, values, start)
        deltas: list[tuple[int, torch.Tensor, float]] = []
        parents: list[tuple[torch.Tensor, torch.Tensor]] = []
        slot = 1
        for term in tensor.deltas:
            distilled, base = (
                self._buffers.read_grown(ref, first, count, slot + place, torch.float32)
                for place, ref in enumerate((term.distilled, term.base))
            )
            slot += 1
            delta = distilled
            if self._method.needs_parents:
                slot += 1
                parents.append((distilled.view(view.shape), base.view(view.shape)))
                delta = self._buffers.grown(torch.float32, slot, count)
                delta.copy_(distilled)
                slot += 1
            delta -= base
            deltas.append((term.index, delta.view(view.shape), term.weight))
        for lora, parts in zip(tensor.loras, factors, strict=True):
            rows = len(values) // tensor.row_elements
            product = self._buffers.grown(torch.float64, 0, rows * lora.columns)
            product = product.view(rows, lora.columns)
            row = start // tensor.row_elements
            self._product(lora, parts, row, product, lora.strength, 1.0)
            if _depends_on_order([lora]):
                make_order_free(product, [_matrices(lora, parts, row, rows, lora.strength)], 1.0)
            delta = self._buffers.grown(torch.float32, slot, rows * lora.columns)
            delta = delta.view(rows, lora.columns)
            delta.copy_(product)
            slot += 1
            deltas.append((lora.index, delta.view(view.shape), round_weight(lora.weight)))
        deltas.sort(key=lambda item: item[0])
        changed = any(bool(delta.any()) for _, delta, _ in deltas)
        self._method.merge(
            view,
            [delta for _, delta, _ in deltas],
            [weight for _, _, weight in deltas],
            self._params,
            key=tensor.key,
            start=first,
            parents=parents,
        )
        return changed


def _matrices(term: LoraTerm, factors: Factors, first: int, rows: int, scale: float) -> Factored:
    """Return the factors of some rows of a plain LoRA as matrices."""
    up, down = factors["up"], factors["down"]
    part = up.reshape(term.rows, -1)[first : first + rows]
    return Factored(part, down.reshape(len(down), -1), scale)


def _depends_on_order(terms: Sequence[LoraTerm]) -> bool:
    """Return True for products of two matrices whose float64 sums are not exact as a rule."""
    is_plain = all(term.form == "lora" and term.base is None for term in terms)
    return is_plain and any(ref.dtype == "F32" for term in terms for ref in term.refs)


def _has_values(delta: torch.Tensor) -> bool:
    """Return True when an element is not zero.

    Looking at all of them costs more than the sum itself, and the first ones nearly always tell.
    """
    return bool(delta[:1].reshape(-1)[:_FIRST].any()) or bool(delta.any())
