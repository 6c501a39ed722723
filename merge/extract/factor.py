"""The best factors of a given rank: exact for small matrices, randomised for large ones.

Source: Eckart and Young 1936 for the optimum; N. Halko, P.-G. Martinsson, J. A. Tropp, "Finding
structure with randomness", 2011, arXiv:0909.4061, algorithms 4.4 and 5.1 for the randomised way.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

# Below this size of the smaller side the exact way takes milliseconds.
EXACT_SIZE = 384
OVERSAMPLING = 16
POWER_ITERATIONS = 4
# Singular values below this part of the largest are rounding noise of float32 inputs.
NOISE = float(torch.finfo(torch.float32).eps)
# The energy of rounding noise, so that a target of 1 means the delta's rank and not every row.
ENERGY_SLACK = 1e-12
_BLOCK = 2048


@dataclass(frozen=True, slots=True)
class Factors:
    """A delta as a product of two factors.

    Attributes:
        up: `(out, rank)`, float32.
        down: `(rank, columns)`, float32.
        energy: Squared singular values that are kept, over the squared norm of the delta.
        is_capped: True when the energy that was asked for needs a higher rank than allowed.
    """

    up: torch.Tensor
    down: torch.Tensor
    energy: float
    is_capped: bool

    @property
    def rank(self) -> int:
        """Return the inner dimension."""
        return self.up.shape[1]


def factor_delta(
    delta: torch.Tensor,
    *,
    rank: int | None = None,
    energy: float | None = None,
    max_rank: int | None = None,
    seed: int = 0,
) -> Factors:
    """Factor a delta with the least squared error that a rank allows.

    The singular values go evenly into both factors, so that neither leaves the range of float16.
    The same input on the same device with the same number of threads gives the same bits.

    Args:
        delta: `(out, in)` or `(out, in, kh, kw)`, float32, finite and not all zero.
        rank: Of the factors; less where the delta has a lower one.
        energy: In place of `rank`: the smallest rank that keeps this part of the squared norm,
            0 < energy <= 1.
        max_rank: The most that `energy` may take; None for no limit.
        seed: Of the random sketch.

    Raises:
        ValueError: not exactly one of `rank` and `energy`, one out of range, or a zero delta.
    """
    check_target(rank, energy, max_rank)
    matrix = delta.reshape(len(delta), -1)
    total = squared_norm(matrix)
    if not 0 < total < math.inf:
        raise ValueError("the delta is zero or not finite")
    is_tall = matrix.shape[0] > matrix.shape[1]
    wide = matrix.T if is_tall else matrix
    size = len(wide)
    is_capped = False
    if energy is not None:
        basis, squares = _exact(wide)
        wanted = rank_for_energy(squares, energy, total)
        is_capped = max_rank is not None and wanted > max_rank
        wanted = min(wanted, max_rank or wanted)
    else:
        assert rank is not None
        width = min(rank + OVERSAMPLING, size)
        # A sketch of half the matrix costs more than the exact way.
        is_small = size <= EXACT_SIZE or 2 * width >= size
        basis, squares = _exact(wide) if is_small else _sketched(wide, width, seed)
        wanted = min(rank, size)
    significant = int((squares > squares[0] * NOISE**2).sum())
    wanted = max(1, min(wanted, significant))
    up, down = _split(wide, basis[:, :wanted], squares[:wanted])
    if is_tall:
        up, down = down.T.contiguous(), up.T.contiguous()
    kept = min(1.0, float(squares[:wanted].sum()) / total)
    return Factors(up, down, kept, is_capped)


def check_target(rank: int | None, energy: float | None, max_rank: int | None = None) -> None:
    """Refuse what no factorisation can reach.

    Raises:
        ValueError: not exactly one of `rank` and `energy`, or one is out of range.
    """
    if (rank is None) == (energy is None):
        raise ValueError("give either a rank or an energy")
    if rank is not None and rank < 1:
        raise ValueError(f"rank {rank} must be at least 1")
    if energy is not None and not 0 < energy <= 1:
        raise ValueError(f"energy {energy} must be above 0 and at most 1")
    if max_rank is not None and max_rank < 1:
        raise ValueError(f"max_rank {max_rank} must be at least 1")


def rank_for_energy(squares: torch.Tensor, energy: float, total: float) -> int:
    """Return the smallest rank whose squared singular values reach a part of the total.

    Args:
        squares: Squared singular values, `(size,)` in float64, descending.
        energy: The part, 0 < energy <= 1.
        total: The delta's squared norm.
    """
    reached = torch.cumsum(squares, 0) >= (energy - ENERGY_SLACK) * total
    found = torch.nonzero(reached)
    return int(found[0]) + 1 if len(found) else len(squares)


def squared_norm(values: torch.Tensor) -> float:
    """Return the sum of squares in float64, without a copy of everything in that precision."""
    return sum(
        float(torch.linalg.vector_norm(part, dtype=torch.float64)) ** 2
        for part in torch.split(values, _BLOCK)
    )


def residual(
    matrix: torch.Tensor, up: torch.Tensor, down: torch.Tensor, scale: float = 1.0
) -> float:
    """Return the squared norm of `matrix - scale * up @ down`, some rows at a time.

    Measured, not derived from the singular values: a difference of two nearly equal energies would
    end at the square root of the rounding error.
    """
    rows = 256
    return sum(
        squared_norm(
            torch.addmm(matrix[start : start + rows], up[start : start + rows], down, alpha=-scale)
        )
        for start in range(0, len(matrix), rows)
    )


def _exact(wide: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return all left singular vectors and squared singular values, largest first, in float64.

    From the eigenvectors of the Gram matrix: float64 keeps the singular values of a float32 matrix
    to 1e-8 of the largest, which is its own rounding.
    """
    gram = torch.zeros(len(wide), len(wide), dtype=torch.float64, device=wide.device)
    for part in torch.split(wide, _BLOCK, dim=1):
        exact = part.double()
        gram.addmm_(exact, exact.T)
    return _descending(gram)


def _sketched(wide: torch.Tensor, width: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the first `width` left singular vectors and squared singular values, nearly."""
    generator = torch.Generator().manual_seed(seed)
    # Drawn on the CPU, so that every device starts from the same sketch.
    probe = torch.randn(wide.shape[1], width, generator=generator).to(wide.device)
    basis = torch.linalg.qr(wide @ probe).Q
    for _ in range(POWER_ITERATIONS):
        rows = torch.linalg.qr(wide.T @ basis).Q
        basis = torch.linalg.qr(wide @ rows).Q
    core = (basis.T @ wide).double()
    vectors, squares = _descending(core @ core.T)
    return basis.double() @ vectors, squares


def _descending(gram: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    squares, vectors = torch.linalg.eigh(gram)
    return vectors.flip(1), squares.flip(0).clamp_(min=0)


def _split(
    wide: torch.Tensor, basis: torch.Tensor, squares: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the projection onto a basis as two factors that share the singular values evenly."""
    # A vector's sign is the solver's choice; the largest element decides it here.
    largest = basis.abs().argmax(0, keepdim=True)
    basis = basis * basis.gather(0, largest).sign()
    roots = squares.sqrt().sqrt()
    up = (basis * roots).float()
    down = (basis / roots).float().T @ wide
    return up, down
