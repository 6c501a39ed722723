"""What a plan is: one row per output tensor, and where every byte comes from."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merge.family.model import Family
from merge.header.dtypes import element_count
from merge.header.encode import encode_header
from merge.header.model import Header
from merge.reader.byte_reader import FileStamp
from merge.recipe.schema import Recipe
from merge.writer.copies.model import TensorCopy

DIGEST_KEY = "instruct_merge.recipe_digest"
# The digest is known only after every input is hashed; its width is fixed, so the layout is not
# affected.
DIGEST_PLACEHOLDER = "0" * 64


@dataclass(frozen=True, slots=True)
class PlanFile:
    """An input file.

    Attributes:
        role: The model it belongs to.
        name: Path inside the model.
        path: On this disk.
        stamp: What it was when it was planned.
        expected_sha256: From the recipe or the Hub; empty when not stated.
    """

    role: str
    name: str
    path: Path
    stamp: FileStamp
    expected_sha256: str


@dataclass(frozen=True, slots=True)
class TensorRef:
    """A tensor of an input file.

    Attributes:
        file: Index into the plan's files.
        dtype: Header code, e.g. `F16`.
        shape: Dimensions.
        start: First byte in the file.
        size_bytes: Length.
        scale: What the stored numbers are multiplied by, in float32: one number, or one for each
            row; None where they are the values.
    """

    file: int
    dtype: str
    shape: tuple[int, ...]
    start: int
    size_bytes: int
    scale: TensorRef | None = None

    @property
    def row_elements(self) -> int:
        """Return the elements of a row."""
        return element_count(self.shape[1:])

    @property
    def element_count(self) -> int:
        """Return the number of elements."""
        return element_count(self.shape)


@dataclass(frozen=True, slots=True)
class DeltaTerm:
    """`weight * (distilled - base)`.

    Attributes:
        role: Which distilled model.
        index: Its place among the recipe's distilled models.
        distilled: Same shape as `base`.
        base: Same shape as the target, or fewer input channels.
        weight: Rounded once to float32.
    """

    role: str
    index: int
    distilled: TensorRef
    base: TensorRef
    weight: float


@dataclass(frozen=True, slots=True)
class LoraTerm:
    """`weight * alpha / divisor` times the product of an adapter's factors.

    Attributes:
        role: Which distilled model.
        index: Its place among the recipe's distilled models.
        form: How the factors multiply: `lora`, `locon`, `loha`, `lokr` or `diff`.
        factors: Name of the factor, e.g. `down`, and where it is.
        rows: First dimension of the weight.
        columns: Elements of a row that the delta covers, from the first on.
        weight: The recipe's, in float64.
        alpha: The adapter's, or the divisor where it states none.
        divisor: The rank, or what the adapter's rule has in its place.
        magnitude: DoRA's norms, `(rows,)` and ones; None for an additive adapter.
        base: For DoRA the weight that the adapter was trained on, of the delta's shape.
        is_by_input: DoRA's norms are `(1, in)` and ones, of the inputs.
    """

    role: str
    index: int
    form: str
    factors: tuple[tuple[str, TensorRef], ...]
    rows: int
    columns: int
    weight: float
    alpha: float
    divisor: float
    magnitude: TensorRef | None = None
    base: TensorRef | None = None
    is_by_input: bool = False

    @property
    def strength(self) -> float:
        """Return the factor of the product before the recipe's weight."""
        return self.alpha / self.divisor

    @property
    def scale(self) -> float:
        """Return the factor of the product, in float64, in the order that the contract states."""
        return self.weight * self.alpha / self.divisor

    @property
    def refs(self) -> tuple[TensorRef, ...]:
        """Return every tensor that is read for it."""
        extra = (self.magnitude, self.base)
        return (*(ref for _, ref in self.factors), *(ref for ref in extra if ref is not None))


@dataclass(frozen=True, slots=True)
class BakeTerm:
    """A guidance embedding folded into the bias of the layer that it feeds.

    Attributes:
        role: Which distilled model.
        embedding: Its `cond_proj`, `(in, size)`.
        weight: The recipe's for the embedding, in float64.
        guidance: The guidance scale that is fixed.
        linear: How the layer's merged weight `(out, in)` comes about.
    """

    role: str
    embedding: TensorRef
    weight: float
    guidance: float
    linear: TensorPlan


@dataclass(frozen=True, slots=True)
class TensorPlan:
    """One output tensor.

    Attributes:
        key: Its name in the component's file.
        component: Whose weight it is, e.g. `text_encoder`.
        action: `delta`, `lora`, `copy`, `cast` or `bake`.
        target: Where its starting values are.
        dtype_out: Header code of the output.
        deltas: Full deltas, added in this order.
        loras: LoRA deltas, summed in float64 in this order and added last.
        weight: The recipe's weight for this key; None when nothing is added.
        reason: Why nothing, or not everything, is added; empty for the ordinary case.
        block: Name of its block, e.g. `IN04`; empty where blocks have no names.
        bakes: Guidance embeddings folded into it, added after everything else.
        is_whole: True when the method has to see the whole tensor at once.
    """

    key: str
    component: str
    action: str
    target: TensorRef
    dtype_out: str
    deltas: tuple[DeltaTerm, ...] = ()
    loras: tuple[LoraTerm, ...] = ()
    weight: float | None = None
    reason: str = ""
    block: str = ""
    bakes: tuple[BakeTerm, ...] = ()
    is_whole: bool = False

    @property
    def is_merged(self) -> bool:
        """Return True when something is added."""
        return bool(self.deltas or self.loras or self.bakes)

    @property
    def refs(self) -> list[TensorRef]:
        """Return every tensor that is read for it, the target's first."""
        refs = [self.target]
        refs += [ref for term in self.deltas for ref in (term.distilled, term.base)]
        refs += [ref for term in self.loras for ref in term.refs]
        refs += [ref for term in self.bakes for ref in (term.embedding, *term.linear.refs)]
        return refs

    @property
    def row_elements(self) -> int:
        """Return the elements of one output row (one filter, one neuron)."""
        return element_count(self.target.shape[1:])

    @property
    def delta_row_elements(self) -> int:
        """Return how many elements of each row the delta covers, from the first on."""
        if self.deltas:
            return element_count(self.deltas[0].base.shape[1:])
        if self.loras:
            return self.loras[0].columns
        return 0

    @property
    def is_by_row(self) -> bool:
        """Return True when the delta has to be placed row by row."""
        return bool(self.loras) or (
            bool(self.deltas) and self.delta_row_elements != self.row_elements
        )


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A key of an input that the output does not use.

    Attributes:
        model: Role, e.g. `distilled`.
        key: As in the file.
        reason: Why.
    """

    model: str
    key: str
    reason: str


@dataclass(frozen=True, slots=True)
class ComponentPlan:
    """One merged weight file.

    Attributes:
        name: E.g. `text_encoder`.
        file_name: Its place in the output folder.
        tensors: In the order of the output file.
        out_header: Layout of the output file.
        metadata: Its strings, with a placeholder for the recipe digest.
    """

    name: str
    file_name: str
    tensors: tuple[TensorPlan, ...]
    out_header: Header
    metadata: Mapping[str, str]

    def header_bytes(self, digest: str) -> bytes:
        """Return the first bytes of the output file with the recipe digest filled in."""
        metadata = {**self.metadata, DIGEST_KEY: digest}
        specs = {spec.name: (spec.dtype, spec.shape) for spec in self.out_header.tensors}
        return encode_header(specs, metadata)[0]


@dataclass(frozen=True, slots=True)
class BlockWeight:
    """What a block of the main component receives.

    Attributes:
        name: E.g. `IN04`.
        weights: The different weights of its merged tensors, ascending; empty: nothing is added.
        tensors: Tensors of the block.
    """

    name: str
    weights: tuple[float, ...]
    tensors: int


@dataclass(frozen=True, slots=True)
class MergePlan:
    """Everything that a merge will do.

    Attributes:
        recipe: Its name.
        method: Its name.
        params: The method's parameters, defaults filled in.
        family: The architecture.
        files: Inputs whose tensors are read.
        components: The merged weight files, the main component's first.
        merged: Components that a delta may touch, in the order of the family.
        left_out: Keys of inputs that are not used, each with its reason.
        notes: What a user should know before running.
        warnings: What a user should decide or mend, although the run goes on.
        relaid: Weight file to its tensors, for components that come out of a single file
            or of pickles.
        copy_bytes: Size of the other components' files, copied or rewritten as they are.
        single_file_bytes: About the size of the single file, 0 when none is asked for.
    """

    recipe: str
    method: str
    params: Mapping[str, Any]
    family: Family
    files: tuple[PlanFile, ...]
    components: tuple[ComponentPlan, ...]
    merged: tuple[str, ...]
    left_out: tuple[LeftOut, ...]
    notes: tuple[str, ...]
    warnings: tuple[str, ...]
    relaid: Mapping[str, tuple[TensorCopy, ...]]
    copy_bytes: int
    single_file_bytes: int

    def complete(self, recipe: Recipe) -> Recipe:
        """Return a recipe with what the architecture decides filled in."""
        return dataclasses.replace(recipe, components=list(self.merged))

    @property
    def main(self) -> ComponentPlan:
        """Return the weight file of the main component."""
        return self.components[0]

    @property
    def tensors(self) -> tuple[TensorPlan, ...]:
        """Return the tensors of every merged component, in the order of their files."""
        return tuple(tensor for part in self.components for tensor in part.tensors)

    @property
    def counts(self) -> dict[str, int]:
        """Return the number of tensors per action, every action named."""
        counts = dict.fromkeys(("delta", "lora", "copy", "cast", "bake"), 0)
        for tensor in self.tensors:
            counts[tensor.action] += 1
        return counts

    @property
    def blocks(self) -> tuple[BlockWeight, ...]:
        """Return what each block receives; empty where blocks have no names."""
        groups: dict[str, list[TensorPlan]] = {}
        for tensor in self.tensors:
            if tensor.block:
                groups.setdefault(tensor.block, []).append(tensor)
        return tuple(
            BlockWeight(
                name,
                tuple(sorted({t.weight for t in groups[name] if t.weight is not None})),
                len(groups[name]),
            )
            for name in self.family.blocks.sort(groups)
        )

    @property
    def read_bytes(self) -> int:
        """Return the bytes of every tensor that is read and of every file that is copied."""
        refs = (ref for tensor in self.tensors for ref in tensor.refs)
        return self.copy_bytes + self.single_file_bytes + sum(ref.size_bytes for ref in refs)

    @property
    def merged_bytes(self) -> int:
        """Return the size of the merged weight files."""
        return sum(part.out_header.file_bytes for part in self.components)

    @property
    def write_bytes(self) -> int:
        """Return the bytes of the weights and of every copied file."""
        return self.merged_bytes + self.copy_bytes + self.single_file_bytes
