"""DARE: drop elements of each delta at random and scale up the rest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from merge.methods.arrays import round_float32, weighted_sum
from merge.methods.consensus import elect_and_merge
from merge.methods.model import Array
from merge.methods.random_mask import keep_mask


def dare(
    target: Array,
    deltas: Sequence[Array],
    weights: Sequence[float],
    params: Mapping[str, Any],
    key: str,
    start: int,
) -> None:
    """Add deltas of which a random part is dropped, in place.

    Computes `target + sum_i w_i m_i d_i / density` with `m_i` 1 at a random `density` of the
    elements and 0 elsewhere. The masks follow from seed, key, model and element alone. At density
    1 nothing is dropped.

    Args:
        target: Any shape, float32; overwritten.
        deltas: Same shape each; overwritten.
        weights: One a delta.
        params: `density` and `seed`.
        key: Diffusers key of the tensor.
        start: Index of the first element.

    Source:
        Yu et al. 2023, Language Models are Super Mario, arXiv:2311.03099. mergekit's `dare_linear`
        differs in its rescaling: to the L1 norm before the drop, not by `1 / density`.
    """
    _drop(deltas, params, key, start)
    target += weighted_sum(deltas, _rescaled(weights, params))


def dare_ties(
    target: Array,
    deltas: Sequence[Array],
    weights: Sequence[float],
    params: Mapping[str, Any],
    key: str,
    start: int,
) -> None:
    """Drop elements at random, then elect signs and merge what agrees, in place.

    As `ties` with the trim replaced by the random drop of `dare`, so each element stands alone
    and the tensor may come in blocks.

    Args:
        target: Any shape, float32; overwritten.
        deltas: Same shape each; overwritten.
        weights: One a delta.
        params: `density`, `seed` and `normalize`.
        key: Diffusers key of the tensor.
        start: Index of the first element.

    Source:
        arXiv:2311.03099 and arXiv:2306.01708; mergekit's `dare_ties`.
    """
    _drop(deltas, params, key, start)
    elect_and_merge(target, deltas, _rescaled(weights, params), params["normalize"])


def _drop(deltas: Sequence[Array], params: Mapping[str, Any], key: str, start: int) -> None:
    for model, delta in enumerate(deltas):
        delta *= keep_mask(delta, params["density"], params["seed"], key, model, start)


def _rescaled(weights: Sequence[float], params: Mapping[str, Any]) -> list[float]:
    return [round_float32(weight / params["density"]) for weight in weights]
