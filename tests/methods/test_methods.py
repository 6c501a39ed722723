from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from merge.methods.add_difference import add_difference

MAXIMUM = float(np.finfo(np.float32).max)
SMALLEST = float(np.finfo(np.float32).smallest_subnormal)
UNIT = 2.0**-24  # half the distance between 1 and the next float32

FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)
# No overflow: the sum of a few of them, times a weight of at most 16, stays finite.
MODERATE = st.floats(-(2.0**100), 2.0**100, width=32)
EDGES = st.sampled_from(
    [0.0, -0.0, SMALLEST, -SMALLEST, 2.0**-126, MAXIMUM, -MAXIMUM, 1.0, 65504.0, 2.0**-24]
)
WEIGHTS = st.sampled_from([0.0, 1.0, -1.0, 0.5, 2.0, 16.0]) | st.floats(-16, 16, width=32)
Merge = Callable[[np.ndarray, np.ndarray, np.ndarray, float], np.ndarray]
Triple = tuple[np.ndarray, np.ndarray, np.ndarray]


def triples(elements: st.SearchStrategy[float]) -> st.SearchStrategy[Triple]:
    def three(shape: tuple[int, ...]) -> st.SearchStrategy[Triple]:
        array = arrays.arrays(np.float32, shape, elements=elements)
        return st.tuples(array, array, array)

    return arrays.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=20).flatmap(three)


def merge(target: np.ndarray, distilled: np.ndarray, base: np.ndarray, weight: float) -> np.ndarray:
    result = np.array(target)
    add_difference(result, [np.asarray(np.array(distilled) - base)], [weight])
    return result


def merge_torch(
    target: np.ndarray, distilled: np.ndarray, base: np.ndarray, weight: float
) -> np.ndarray:
    result = torch.from_numpy(np.array(target))
    delta = torch.from_numpy(np.array(distilled))
    delta -= torch.from_numpy(np.array(base))
    add_difference(result, [delta], [weight])
    return result.numpy()


def assert_same_bits(left: np.ndarray, right: np.ndarray) -> None:
    # Which NaN an invalid operation gives is the processor's choice.
    assert np.array_equal(np.isnan(left), np.isnan(right))
    finite = ~np.isnan(left)
    assert left.dtype == right.dtype == np.float32
    assert np.array_equal(left[finite].view(np.uint32), right[finite].view(np.uint32))


@settings(deadline=None, max_examples=150)
@given(triple=triples(FINITE | EDGES), weight=WEIGHTS)
def test_bit_equal_to_three_separate_float32_operations(triple: Triple, weight: float) -> None:
    target, distilled, base = triple
    with np.errstate(all="ignore"):
        expected = np.add(
            target,
            np.multiply(np.subtract(distilled, base), np.float32(weight)),
            dtype=np.float32,
        )
        expected = np.asarray(expected)
        assert_same_bits(merge(target, distilled, base, weight), expected)
    assert_same_bits(merge_torch(target, distilled, base, weight), expected)


@settings(deadline=None, max_examples=150)
@given(triple=triples(MODERATE | st.sampled_from([0.0, -0.0, SMALLEST, 2.0**-126])), weight=WEIGHTS)
def test_within_one_and_a_half_units_of_float64(triple: Triple, weight: float) -> None:
    target, distilled, base = triple
    delta = (distilled.astype(np.float64) - base) * weight
    exact = target + delta
    result = merge(target, distilled, base, weight)
    assert np.isfinite(result).all()
    # One rounding of the sum and two of the delta; products below the normal range round to a
    # multiple of the smallest number.
    bound = UNIT * (np.abs(exact) + 2.001 * np.abs(delta)) * 1.001 + SMALLEST
    assert (np.abs(result - exact) <= bound).all()
    largest = np.maximum(np.abs(target), np.maximum(np.abs(delta), np.abs(exact)))
    assert (np.abs(result - exact) <= 1.501 * 2 * UNIT * largest + SMALLEST).all()


@settings(deadline=None, max_examples=100)
@given(triple=triples(MODERATE | EDGES))
def test_weight_zero_keeps_the_values_of_the_target(triple: Triple) -> None:
    target, distilled, base = triple
    with np.errstate(over="ignore"):
        overflows = np.isinf(distilled - base)
        # The overflow of the delta times zero is no number.
        with np.errstate(invalid="ignore"):
            result = merge(target, distilled, base, 0.0)
    assert np.array_equal(result[~overflows], target[~overflows])
    assert np.isnan(result[overflows]).all()


@settings(deadline=None, max_examples=100)
@given(triple=triples(FINITE), weight=WEIGHTS)
def test_a_delta_of_zero_keeps_the_values_of_the_target(triple: Triple, weight: float) -> None:
    target, base, _ = triple
    assert np.array_equal(merge(target, base.copy(), base, weight), target)


@settings(deadline=None, max_examples=100)
@given(triple=triples(MODERATE), data=st.data())
def test_the_base_itself_becomes_the_distilled_model_at_weight_one(
    triple: Triple, data: st.DataObject
) -> None:
    base, distilled, _ = triple
    result = merge(base, distilled, base, 1.0)
    error = np.abs(result.astype(np.float64) - distilled)
    wide = np.abs(distilled.astype(np.float64) - base)
    assert (error <= 1.001 * UNIT * (wide + np.abs(distilled)) + SMALLEST).all()
    # Within a factor of two, as weights of a fine-tuned model are, the difference is exact
    # (Sterbenz), and so is the sum.
    factors = data.draw(arrays.arrays(np.float32, base.shape, elements=st.floats(0.5, 2, width=32)))
    with np.errstate(under="ignore"):
        near = base * factors
    is_near = (np.abs(near) <= 2 * np.abs(base)) & (np.abs(base) <= 2 * np.abs(near))
    assert np.array_equal(merge(base, near, base, 1.0)[is_near], near[is_near])


@pytest.mark.parametrize("run", [merge, merge_torch])
def test_the_product_is_rounded_before_the_sum(run: Merge) -> None:
    # (1 + 2^-12)^2 is 1 + 2^-11 + 2^-24, a tie that rounds down to 1 + 2^-11. Fused
    # multiply-adds keep the last part and end at 2^-24.
    count = 37  # whole vectors of the processor and a rest
    weight = 1 + 2.0**-12
    target = np.full(count, -(1 + 2.0**-11), np.float32)
    distilled = np.full(count, 2 + 2.0**-12, np.float32)
    base = np.full(count, 1.0, np.float32)
    assert np.array_equal(run(target, distilled, base, weight), np.zeros(count, np.float32))


@pytest.mark.parametrize("run", [merge, merge_torch])
def test_the_difference_is_taken_first(run: Merge) -> None:
    # weight * distilled alone would overflow.
    three = [np.full(9, value, np.float32) for value in (1.0, 3e38, 2.5e38)]
    result = run(*three, 4.0)
    assert np.array_equal(result, np.float32(1.0) + (three[1] - three[2]) * np.float32(4.0))
    assert np.isfinite(result).all()


def test_infinities_and_nan_are_passed_on() -> None:
    one, infinite, nan = (np.full(1, value, np.float32) for value in (1.0, np.inf, np.nan))
    with np.errstate(invalid="ignore"):
        assert merge(one, infinite, one, 1.0)[0] == np.inf
        assert merge(one, one, infinite, 1.0)[0] == -np.inf
        assert np.isnan(merge(one, infinite, infinite, 1.0)[0])
        assert np.isnan(merge(nan, one, one, 1.0)[0])
        assert np.isnan(merge(one, nan, one, 0.0)[0])


@pytest.mark.parametrize("library", [np, torch], ids=["numpy", "torch"])
def test_it_works_in_place_on_the_callers_arrays(library: Any) -> None:
    def array(*values: float) -> Any:
        if library is torch:
            return torch.tensor(values, dtype=torch.float32)
        return np.array(values, np.float32)

    target, delta = array(1, 2, 3, 9), array(4, 2, 0, 9)
    before = target
    # A view, as the engine hands over: what lies beside it stays.
    add_difference(target[:3], [delta[:3]], [0.5])
    assert target is before
    assert target.tolist() == [3.0, 3.0, 3.0, 9.0]
    assert delta.tolist() == [2.0, 1.0, 0.0, 9.0]


def test_shapes_of_the_target_never_grow() -> None:
    with pytest.raises(ValueError, match="broadcast"):
        add_difference(np.zeros(1, np.float32), [np.zeros(3, np.float32)], [1.0])
