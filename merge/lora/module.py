"""What a LoRA file comes down to: which weights it changes, from which factors, how strongly."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class AdapterModule:
    """One adapted weight.

    Attributes:
        component: `unet`, `text_encoder` or `text_encoder_2`.
        key: The component's key that it changes, as the target spells it.
        form: How the factors multiply, a key of `FORMS`.
        factors: Role of each factor, e.g. `down`, and its key in the file.
        rank: Inner dimension; 0 where no factor is a product.
        alpha_key: Key of the scalar alpha in the file, if it has one that counts.
        alpha: Alpha stated in the file's metadata; None: in `alpha_key`, or scale 1.
        rows: Rows of the delta, which is `(rows, columns)` and reshaped to the weight.
        columns: Columns of the delta.
        magnitude: Key of DoRA's norms; None for an additive adapter.
        is_by_input: DoRA's norms are of the inputs, and not of the rows.
        is_rank_stabilised: Whether the scale is `alpha / sqrt(rank)` (rsLoRA, arXiv:2312.03732).
        idle: Keys of the module that have no effect by the rules of its form.
    """

    component: str
    key: str
    form: str
    factors: tuple[tuple[str, str], ...]
    rank: int
    alpha_key: str | None
    alpha: float | None
    rows: int
    columns: int
    magnitude: str | None = None
    is_by_input: bool = False
    is_rank_stabilised: bool = False
    idle: tuple[str, ...] = ()

    @property
    def divisor(self) -> float:
        """Return what alpha is divided by; it is the alpha of a module that states none."""
        if self.rank == 0:
            return 1.0
        return math.sqrt(self.rank) if self.is_rank_stabilised else float(self.rank)

    @property
    def names(self) -> tuple[str, ...]:
        """Return every key of the file that belongs to it."""
        extra = (self.alpha_key, self.magnitude)
        return (
            *(name for _, name in self.factors),
            *(name for name in extra if name is not None),
            *self.idle,
        )


@dataclass(frozen=True, slots=True)
class AdapterTable:
    """All of a LoRA file.

    Attributes:
        modules: In the order of component and key, the UNet's last.
        problems: One line for each key or module that cannot be applied.
        source: Where alphas are stated that are in no tensor; empty where none is.
    """

    modules: tuple[AdapterModule, ...]
    problems: tuple[str, ...]
    source: str = ""
