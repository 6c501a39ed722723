"""LoRA products that round to the same float32 wherever they are made.

A float64 sum over the rank depends on its order, and a matrix product has whatever order is fast on
its processor or device. Of float16 factors the sums are exact as a rule. Of float32 factors about
one in 10^8 then rounds to another float32, so a model has some. Those that could are made again
here, in the order of the rank, which every machine can: a product of two float32 values is exact in
float64, so that multiplying and adding gives the bits of a fused multiply-add.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

# Half the distance from 1 to the next float64.
_ROUNDOFF = 2.0**-53
# Elements that are looked at in one step: 1 MiB in float64, which stays in a core's cache.
_STEP_ELEMENTS = 128 * 1024


@dataclass(frozen=True)
class Factored:
    """One term of a sum, `(up @ down) * scale`.

    Attributes:
        up: `(rows, rank)` in float64, contiguous, each value a float32 times a power of two.
        down: `(rank, columns)`, likewise.
        scale: In float64.
    """

    up: torch.Tensor
    down: torch.Tensor
    scale: float


def make_order_free(total: torch.Tensor, products: Sequence[Factored], factor: float) -> int:
    """Replace values of a sum that another order could round to another float32, in place.

    Args:
        total: `(rows, columns)` in float64: the sum of the products, in their order.
        products: Its terms.
        factor: What is multiplied to the sum before it is rounded to float32.

    Returns:
        How many values were made again.
    """
    step = max(1, _STEP_ELEMENTS // max(total.shape[1], 1))
    across = [_bound(product, len(products), factor) for product in products]
    count = 0
    for begin in range(0, len(total), step):
        part = total[begin : begin + step]
        error = torch.zeros_like(part)
        for product, norms in zip(products, across, strict=True):
            error.addr_(product.up[begin : begin + step].norm(dim=1), norms)
        scaled = part * factor
        doubtful = (scaled - error).float() != (scaled + error).float()
        rows, places = doubtful.nonzero(as_tuple=True)
        # Few, but for values that are not finite, which stop the merge.
        most = max(1, _STEP_ELEMENTS // max(len(product.down) for product in products))
        for some in range(0, len(rows), most):
            row, place = rows[some : some + most], places[some : some + most]
            part[row, place] = _in_order(products, row + begin, place)
        count += len(rows)
    return count


def _bound(product: Factored, terms: int, factor: float) -> torch.Tensor:
    """Return how far two orders of a product's sums may be apart, `(columns,)` for rows of norm 1.

    For a sum of `rank` exact products that is `2 * (rank - 1)` roundoffs of the sum of their
    magnitudes, which the factors' norms bound. As many again as there are terms are for adding
    those, some for the scales.
    """
    roundoffs = 2 * (len(product.down) + terms + 4)
    norms: torch.Tensor = product.down.norm(dim=0)
    norms *= roundoffs * _ROUNDOFF * abs(product.scale * factor)
    return norms


def _in_order(
    products: Sequence[Factored], rows: torch.Tensor, columns: torch.Tensor
) -> torch.Tensor:
    """Return some values of a sum of products, each summed from the first of its rank on."""
    total = torch.zeros(len(rows), dtype=torch.float64, device=rows.device)
    for index, product in enumerate(products):
        up, down = product.up[rows], product.down[:, columns]
        value = torch.zeros_like(total)
        for k in range(len(down)):
            # Two operations: fused or not, their bits are the same.
            value += up[:, k] * down[k]
        if product.scale != 1.0:
            value *= product.scale
        total = value if index == 0 else total + value
    return total
