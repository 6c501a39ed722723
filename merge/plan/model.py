"""What a plan is: one row per output tensor, and where every byte comes from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from merge.header import Header, element_count, encode_header
from merge.reader import FileStamp

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
    """

    file: int
    dtype: str
    shape: tuple[int, ...]
    start: int
    size_bytes: int

    @property
    def element_count(self) -> int:
        """Return the number of elements."""
        return element_count(self.shape)


@dataclass(frozen=True, slots=True)
class DeltaTerm:
    """`weight * (distilled - base)`.

    Attributes:
        role: Which distilled model.
        distilled: Same shape as `base`.
        base: Same shape as the target, or fewer input channels.
        weight: Rounded once to float32.
    """

    role: str
    distilled: TensorRef
    base: TensorRef
    weight: float


@dataclass(frozen=True, slots=True)
class LoraTerm:
    """`scale * up @ down`.

    Attributes:
        role: Which distilled model.
        down: `(rank, in[, kh, kw])`.
        up: `(out, rank[, 1, 1])`.
        rank: Inner dimension.
        scale: weight * alpha / rank, in float64.
    """

    role: str
    down: TensorRef
    up: TensorRef
    rank: int
    scale: float


@dataclass(frozen=True, slots=True)
class TensorPlan:
    """One output tensor.

    Attributes:
        key: Its name in diffusers keys.
        component: `unet`.
        action: `delta`, `lora`, `copy` or `cast`.
        target: Where its starting values are.
        dtype_out: Header code of the output.
        deltas: Full deltas, added in this order.
        loras: LoRA deltas, summed in float64 in this order and added last.
        weight: The recipe's weight for this key; None when nothing is added.
        reason: Why nothing, or not everything, is added; empty for the ordinary case.
    """

    key: str
    component: str
    action: str
    target: TensorRef
    dtype_out: str
    deltas: tuple[DeltaTerm, ...]
    loras: tuple[LoraTerm, ...]
    weight: float | None
    reason: str

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
            return element_count(self.loras[0].down.shape[1:])
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
class MergePlan:
    """Everything that a merge will do.

    Attributes:
        recipe: Its name.
        method: Its name.
        architecture: `sd15`, `sd21` or `sdxl`.
        files: Inputs whose tensors are read.
        tensors: In the order of the output file.
        left_out: Keys of inputs that are not used, each with its reason.
        notes: What a user should know before running.
        out_header: Layout of the output file.
        metadata: Its strings, with a placeholder for the recipe digest.
        copy_bytes: Size of the other components' files, copied as they are.
    """

    recipe: str
    method: str
    architecture: str
    files: tuple[PlanFile, ...]
    tensors: tuple[TensorPlan, ...]
    left_out: tuple[LeftOut, ...]
    notes: tuple[str, ...]
    out_header: Header
    metadata: Mapping[str, str]
    copy_bytes: int

    @property
    def counts(self) -> dict[str, int]:
        """Return the number of tensors per action, every action named."""
        counts = dict.fromkeys(("delta", "lora", "copy", "cast", "bake"), 0)
        for tensor in self.tensors:
            counts[tensor.action] += 1
        return counts

    @property
    def read_bytes(self) -> int:
        """Return the bytes of every tensor that is read and of every file that is copied."""
        total = self.copy_bytes
        for tensor in self.tensors:
            refs = [tensor.target]
            refs += [ref for term in tensor.deltas for ref in (term.distilled, term.base)]
            refs += [ref for lora in tensor.loras for ref in (lora.down, lora.up)]
            total += sum(ref.size_bytes for ref in refs)
        return total

    @property
    def write_bytes(self) -> int:
        """Return the bytes of the weights and of every copied file."""
        return self.out_header.file_bytes + self.copy_bytes

    def header_bytes(self, digest: str) -> bytes:
        """Return the first bytes of the output file with the recipe digest filled in."""
        metadata = {**self.metadata, DIGEST_KEY: digest}
        specs = {spec.name: (spec.dtype, spec.shape) for spec in self.out_header.tensors}
        return encode_header(specs, metadata)[0]
