"""Every method that combines deltas: against float64, mergekit, and itself in other forms."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from merge.methods.arrays import dot, kth_smallest, pieces, round_float32
from merge.methods.random_mask import keep_mask, random_words
from merge.methods.table import METHODS
from merge.methods.ties import trim

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "mergekit.json").read_text())
UNIT = 2.0**-24
# A change of these changes every DARE merge that was ever made.
GOLDEN_WORDS = [
    [4277198570, 3356782460, 2837512825, 542009004],
    [791983785, 2709370418, 279025449, 3592993410],
]
COMBINED = [method for method in METHODS.values() if not method.is_sum]
STREAMED = [method for method in COMBINED if not method.is_whole]
KEY = "conv_in.weight"
VALUES = st.floats(-4, 4, width=32) | st.sampled_from([0.0, -0.0, 2.0**-149, 0.5, -0.5])


def combine(
    name: str,
    target: np.ndarray,
    models: Sequence[tuple[np.ndarray, np.ndarray]],
    weights: Sequence[float],
    params: Mapping[str, Any] | None = None,
    *,
    library: str = "numpy",
    key: str = KEY,
    start: int = 0,
) -> np.ndarray:
    """Merge copies of the arrays with a method and return the result."""
    method = METHODS[name]
    filled = method.fill(params or {})
    convert = torch.from_numpy if library == "torch" else np.asarray
    result = convert(target.copy())
    pairs = [(convert(d.copy()), convert(b.copy())) for d, b in models]
    # numpy gives no array but a number for arrays without dimensions.
    as_array = torch.asarray if library == "torch" else np.asarray
    deltas = [as_array(distilled - base) for distilled, base in pairs]
    rounded = [round_float32(weight) for weight in weights]
    method.merge(result, deltas, rounded, filled, key=key, start=start, parents=pairs)
    return np.asarray(result)


def reference(
    name: str,
    target: np.ndarray,
    models: Sequence[tuple[np.ndarray, np.ndarray]],
    weights: Sequence[float],
    params: Mapping[str, Any],
) -> np.ndarray:
    """Compute a method in float64, straight from its formula, element by element where it helps."""
    t = target.astype(np.float64)
    deltas = [d.astype(np.float64) - b for d, b in models]
    if name in ("ties", "dare_ties", "dare"):
        density = params["density"]
        for index, delta in enumerate(deltas):
            if name == "ties":
                order = np.sort(np.abs(delta).ravel())[::-1]
                last = order[max(1, int(density * delta.size)) - 1]
                deltas[index] = np.where(np.abs(delta) >= last, delta, 0)
            else:
                mask = keep_mask(target, density, params["seed"], KEY, index, 0)
                deltas[index] = np.where(mask, delta / density, 0)
    if name in ("ties", "dare_ties"):
        return t + elected(deltas, weights, params["normalize"])
    if name == "train_difference":
        for index, (distilled, _) in enumerate(models):
            distance = np.abs(distilled.astype(np.float64) - t)
            total = distance + np.abs(deltas[index])
            share = np.divide(distance, total, out=np.zeros_like(t), where=total > 0)
            deltas[index] = 1.8 * share * deltas[index]
    delta = np.zeros_like(t) + sum(w * d for w, d in zip(weights, deltas, strict=True))
    if name == "capped_difference":
        size, limit = np.linalg.norm(delta), params["cap"] * np.linalg.norm(t)
        return t + delta * (limit / size if size > limit else 1)
    if name == "slerp":
        return on_the_arc(t.ravel(), (t + delta).ravel(), params["t"]).reshape(t.shape)
    return t + delta


def elected(deltas: Sequence[np.ndarray], weights: Sequence[float], normalize: bool) -> np.ndarray:
    parts = np.array([w * d for w, d in zip(weights, deltas, strict=True)])
    sizes = np.abs(weights)
    out = np.zeros(parts.shape[1:])
    for place in np.ndindex(out.shape):
        column = parts[(slice(None), *place)]
        sign = 1 if column.sum() >= 0 else -1
        agree = np.sign(column) == sign
        if agree.any():
            out[place] = column[agree].sum()
            if normalize:
                out[place] /= sizes[agree].sum() / sizes.mean()
    return out


def on_the_arc(u: np.ndarray, v: np.ndarray, t: float) -> np.ndarray:
    lengths = np.linalg.norm(u) * np.linalg.norm(v)
    if lengths == 0 or abs(u @ v / lengths) > 0.9995:
        return (1 - t) * u + t * v
    angle = np.arccos(u @ v / lengths)
    return (np.sin((1 - t) * angle) * u + np.sin(t * angle) * v) / np.sin(angle)


def drawn(
    seed: int, shape: tuple[int, ...] = (6, 35), count: int = 3
) -> tuple[np.ndarray, list[tuple[np.ndarray, np.ndarray]]]:
    """Return a target and models whose every value is a multiple of 2^-12, so deltas are exact."""
    rng = np.random.default_rng(seed)

    def draw() -> np.ndarray:
        return (rng.integers(-4096, 4096, shape) / 4096).astype(np.float32)

    base = draw()
    return draw(), [(draw(), base) for _ in range(count)]


def bits_equal(left: np.ndarray, right: np.ndarray) -> bool:
    assert left.dtype == right.dtype == np.float32
    return np.array_equal(left.view(np.uint32), right.view(np.uint32))


PARAMS: dict[str, list[dict[str, Any]]] = {
    "ties": [{"density": d, "normalize": n} for d in (0.1, 0.5, 1) for n in (True, False)],
    "dare": [{"density": d, "seed": s} for d, s in ((0.1, 0), (0.5, 7), (1, 2**63 - 1))],
    "dare_ties": [{"density": 0.4, "normalize": n} for n in (True, False)],
    "slerp": [{"t": t} for t in (0, 0.25, 0.5, 1)],
    "train_difference": [{}],
    "capped_difference": [{"cap": cap} for cap in (0.01, 0.5, 100)],
}
CASES = [(name, params) for name, several in PARAMS.items() for params in several]
WEIGHTS = [[1.0], [0.7], [-0.5], [1.0, 1.0], [0.5, 2.0], [0.3, -1.1], [0.2, 0.7, 1.5]]


def test_every_method_has_cases() -> None:
    assert set(PARAMS) == {method.name for method in COMBINED}
    assert METHODS["add_difference"].is_sum


# Against other implementations ----------------------------------------------------------------


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
@pytest.mark.parametrize(("name", "params"), CASES, ids=str)
def test_close_to_float64(name: str, params: dict[str, Any], weights: list[float]) -> None:
    target, models = drawn(len(weights), count=len(weights))
    filled = METHODS[name].fill(params)
    exact = [round_float32(weight) for weight in weights]
    expected = reference(name, target, models, exact, filled)
    # Each of at most a dozen roundings is half a unit of a number no larger than this.
    largest = 2 + sum(abs(w) * 4 / filled.get("density", 1) for w in exact) * 1.8
    if filled.get("normalize"):
        largest *= 2
    error = np.abs(combine(name, target, models, weights, params) - expected).max()
    assert error <= 12 * UNIT * largest


@pytest.mark.parametrize("case", GOLDEN["ties"], ids=lambda case: f"{len(case['deltas'])}")
def test_ties_is_mergekits(case: dict[str, Any]) -> None:
    deltas = [np.array(delta, np.float32) for delta in case["deltas"]]
    zero = np.zeros_like(deltas[0])
    params = {"density": case["density"], "normalize": case["normalize"]}
    merged = combine("ties", zero, [(delta, zero) for delta in deltas], case["weights"], params)
    golden = np.array(case["delta"])
    if not case["normalize"]:
        assert np.array_equal(merged, golden)  # sums of multiples of 1/128: exact
        return
    # mergekit divides by the weights themselves, we by their shares of their mean.
    golden *= np.mean(case["weights"])
    assert np.abs(merged - golden).max() <= 4 * UNIT * np.abs(golden).max()
    assert np.array_equal(merged == 0, golden == 0)


@pytest.mark.parametrize("case", GOLDEN["slerp"], ids=lambda case: f"t{case['t']}")
def test_slerp_is_mergekits(case: dict[str, Any]) -> None:
    target, delta, golden = (
        np.array(case[name], np.float32) for name in ("target", "delta", "merged")
    )
    zero = np.zeros_like(target)
    merged = combine("slerp", target, [(delta, zero)], [1.0], {"t": case["t"]})
    # mergekit takes the angle in float32.
    assert np.abs(merged - golden).max() <= 8 * UNIT * np.abs(golden).max()


# Against themselves ---------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "params"), CASES, ids=str)
def test_numpy_and_torch_give_the_same_bits(name: str, params: dict[str, Any]) -> None:
    for seed, weights in enumerate(WEIGHTS):
        # More than one piece, and odd sizes for vectors to end in.
        target, models = drawn(seed, (700, 401) if seed == 3 else (7, 33), len(weights))
        plain = combine(name, target, models, weights, params)
        assert bits_equal(plain, combine(name, target, models, weights, params, library="torch"))


@settings(deadline=None, max_examples=40)
@given(
    data=st.data(),
    method=st.sampled_from(COMBINED),
    shape=arrays.array_shapes(min_dims=1, max_dims=2, max_side=9),
    count=st.integers(1, 3),
)
def test_any_values_give_the_same_bits_in_both(
    data: st.DataObject, method: Any, shape: tuple[int, ...], count: int
) -> None:
    array = arrays.arrays(np.float32, shape, elements=VALUES)
    target, *rest = (data.draw(array) for _ in range(1 + 2 * count))
    models = list(zip(rest[::2], rest[1::2], strict=True))
    weights = data.draw(st.lists(st.floats(-2, 2, width=32), min_size=count, max_size=count))
    plain = combine(method.name, target, models, weights)
    assert np.isfinite(plain).all()
    assert bits_equal(plain, combine(method.name, target, models, weights, library="torch"))


@pytest.mark.parametrize("method", STREAMED, ids=lambda method: method.name)
@settings(deadline=None, max_examples=25)
@given(cuts=st.lists(st.integers(0, 211), max_size=6))
def test_blocks_may_be_cut_anywhere(method: Any, cuts: list[int]) -> None:
    target, models = drawn(5, (211,))
    whole = combine(method.name, target, models, [0.5, 1.0, 2.0])
    edges = [0, *sorted(cuts), 211]
    parts = [
        combine(
            method.name,
            target[a:b],
            [(distilled[a:b], base[a:b]) for distilled, base in models],
            [0.5, 1.0, 2.0],
            start=a,
        )
        for a, b in itertools.pairwise(edges)
    ]
    assert bits_equal(np.concatenate(parts), whole)


@pytest.mark.parametrize("library", [np.asarray, torch.from_numpy], ids=["numpy", "torch"])
@pytest.mark.parametrize("method", COMBINED, ids=lambda method: method.name)
def test_a_view_of_the_target_is_changed_and_nothing_beside_it(method: Any, library: Any) -> None:
    target, models = drawn(9, (6, 20), 2)
    wide = np.full((6, 40), 7, np.float32)
    wide[:, :20] = target
    pairs = [(library(d.copy()), library(b.copy())) for d, b in models]
    deltas = [distilled - base for distilled, base in pairs]
    view = library(wide)[:, :20]
    method.merge(view, deltas, [1.0, 0.5], method.fill({}), key=KEY, start=0, parents=pairs)
    assert bits_equal(
        np.ascontiguousarray(wide[:, :20]), combine(method.name, target, models, [1.0, 0.5])
    )
    assert (wide[:, 20:] == 7).all()
    for (distilled, base), (d, b) in zip(pairs, models, strict=True):
        assert np.array_equal(np.asarray(distilled), d)
        assert np.array_equal(np.asarray(base), b)


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("ties", {"density": 1}),
        ("ties", {"density": 1, "normalize": False}),
        ("dare", {"density": 1}),
        ("dare_ties", {"density": 1}),
        ("capped_difference", {"cap": 1e6}),
    ],
)
def test_one_model_and_nothing_left_out_is_add_difference(
    name: str, params: dict[str, Any]
) -> None:
    target, models = drawn(11, count=1)
    (distilled, base) = models[0]
    for weight in (1.0, 0.7, -0.3):
        expected = target + (distilled - base) * np.float32(weight)
        assert bits_equal(combine(name, target, models, [weight], params), expected)


# Edge cases -----------------------------------------------------------------------------------


def test_trim_keeps_all_that_share_the_threshold() -> None:
    delta = np.array([1, -2, 2, 0.5, -2, 3], np.float32)
    trim(delta, 1 / 3)  # two of six: 3 and one of the 2s, so all of them
    assert delta.tolist() == [0, -2, 2, 0, -2, 3]
    tiny = np.array([1, -3, 2], np.float32)
    trim(tiny, 0.001)  # at least one
    assert tiny.tolist() == [0, -3, 0]
    same = np.zeros(4, np.float32)
    trim(same, 0.5)
    assert same.tolist() == [0, 0, 0, 0]


def test_a_tie_of_signs_is_positive() -> None:
    zero = np.zeros(2, np.float32)
    up, down = np.array([1, 2], np.float32), np.array([-1, -3], np.float32)
    merged = combine("ties", zero, [(up, zero), (down, zero)], [1, 1], {"density": 1})
    assert merged.tolist() == [1, -3]


def test_slerp_without_a_direction_is_a_line() -> None:
    zero = np.zeros(3, np.float32)
    one = np.array([1, 2, 3], np.float32)
    assert combine("slerp", zero, [(one, zero)], [1], {"t": 0.5}).tolist() == [0.5, 1, 1.5]
    # The end is zero: target + 1 * (-target).
    assert combine("slerp", one, [(zero, one)], [1], {"t": 0.25}).tolist() == [0.75, 1.5, 2.25]
    # Opposite: no arc is the shortest.
    assert combine("slerp", one, [(zero, one)], [2], {"t": 0.25}).tolist() == [0.5, 1, 1.5]


@pytest.mark.parametrize("angle", [0.02, 0.04, 0.1])  # the arc begins at 0.0316
def test_slerp_is_an_arc_from_a_cosine_of_0_9995(angle: float) -> None:
    x = np.array([1, 0], np.float32)
    y = np.array([math.cos(angle), math.sin(angle)], np.float32)
    zero = np.zeros_like(x)
    merged = combine("slerp", x, [(y - x, zero)], [1], {"t": 0.5}).astype(np.float64)
    length = math.cos(angle / 2) if angle < 0.03 else 1.0
    assert np.linalg.norm(merged) == pytest.approx(length, abs=4 * UNIT)


def test_slerp_keeps_the_length_of_equal_lengths() -> None:
    x, y = np.array([3, 0], np.float32), np.array([0, 3], np.float32)
    merged = combine("slerp", x, [(y, x)], [1], {"t": 0.5})
    assert merged == pytest.approx([3 / math.sqrt(2)] * 2, rel=1e-7)


def test_train_difference_adds_nothing_where_the_target_is_distilled_already() -> None:
    target, models = drawn(12, count=1)
    distilled, base = models[0]
    assert bits_equal(combine("train_difference", distilled, models, [1]), distilled + 0)
    # Where the target is the base: half of 1.8.
    merged = combine("train_difference", base, models, [1])
    assert merged == pytest.approx(base + 0.9 * (distilled - base), abs=1e-6)
    assert not np.array_equal(combine("train_difference", target, models, [1]), target)


def test_the_cap_is_a_norm() -> None:
    target, models = drawn(13, count=2)
    for cap in (0.001, 0.1):
        merged = combine("capped_difference", target, models, [1, 1], {"cap": cap})
        size = np.linalg.norm((merged - target).astype(np.float64))
        limit = cap * np.linalg.norm(target.astype(np.float64))
        # The difference of results is seen only to their rounding.
        assert size == pytest.approx(limit, rel=2e-3)
    zero = np.zeros_like(target)
    assert not combine("capped_difference", zero, models, [1, 1]).any()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("method", COMBINED, ids=lambda method: method.name)
def test_what_is_not_finite_is_never_dropped(method: Any, value: float) -> None:
    small = {"density": 0.01} if any(p.name == "density" for p in method.params) else {}
    for place in range(40):
        target, models = drawn(place, (40,), 2)
        models[place % 2][0][place] = value
        for library in ("numpy", "torch"):
            merged = combine(method.name, target, models, [1, 0.5], small, library=library)
            assert not np.isfinite(merged[place])


# The random mask ------------------------------------------------------------------------------


def test_the_words_of_the_mask_never_change() -> None:
    like = np.zeros(4, np.float32)
    assert random_words(like, 0, "conv_in.weight", 0, 0).tolist() == GOLDEN_WORDS[0]
    assert random_words(like, 1, "conv_in.weight", 2, 2**32 - 2).tolist() == GOLDEN_WORDS[1]


def test_the_words_are_uniform_and_apart() -> None:
    like = np.zeros(1 << 16, np.float32)
    drawn_words = {
        (seed, key, model): random_words(like, seed, key, model, 0)
        for seed, key, model in [(0, "a", 0), (0, "a", 1), (1, "a", 0), (0, "b", 0), (0, "0a", 0)]
    }
    for words in drawn_words.values():
        assert words.min() >= 0
        assert words.max() < 2**32
        for shift in (24, 16, 8, 0):
            counts = np.bincount((words >> shift) & 255, minlength=256)
            chi_square = ((counts - 256) ** 2 / 256).sum()
            assert 160 < chi_square < 370  # 255 degrees of freedom, 1e-5 to each side
    streams = [*drawn_words.values(), np.roll(drawn_words[0, "a", 0], 1)]
    for place, left in enumerate(streams):
        for right in streams[:place]:
            assert abs(np.corrcoef(left, right)[0, 1]) < 5 / math.sqrt(len(left))


def test_density_is_met() -> None:
    like = np.zeros(1 << 18, np.float32)
    for density in (1e-3, 0.1, 0.5, 0.9):
        kept = keep_mask(like, density, 3, "a", 0, 10**10).sum()
        deviation = math.sqrt(len(like) * density * (1 - density))
        assert abs(kept - density * len(like)) < 5 * deviation
    assert keep_mask(like, 1.0, 3, "a", 0, 0).all()


def test_masks_follow_seed_and_key() -> None:
    target, models = drawn(14, count=2)
    first = combine("dare", target, models, [1, 1], {"seed": 4})
    assert bits_equal(combine("dare", target, models, [1, 1], {"seed": 4}), first)
    assert not np.array_equal(combine("dare", target, models, [1, 1], {"seed": 5}), first)
    assert not np.array_equal(combine("dare", target, models, [1, 1], {"seed": 4}, key="b"), first)


# Sums and order statistics ----------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(array=arrays.arrays(np.float32, st.integers(0, 300), elements=VALUES))
def test_dot_is_within_float64(array: np.ndarray) -> None:
    exact = math.fsum(float(x) * float(x) for x in array)
    assert dot(array, array) == pytest.approx(exact, rel=1e-14)
    assert dot(array, array) == dot(*[torch.from_numpy(array.copy())] * 2)


def test_dot_adds_pieces_in_order() -> None:
    values = np.random.default_rng(0).standard_normal(600_001, np.float32)
    exact = math.fsum(values.astype(np.float64) ** 2)
    assert dot(values, values) == pytest.approx(exact, rel=1e-14)
    tensor = torch.from_numpy(values)
    assert dot(tensor, tensor) == dot(values, values)


@settings(deadline=None, max_examples=40)
@given(
    array=arrays.arrays(np.float32, st.integers(1, 50), elements=VALUES),
    data=st.data(),
)
def test_order_statistics_are_exact(array: np.ndarray, data: st.DataObject) -> None:
    place = data.draw(st.integers(0, len(array) - 1))
    assert kth_smallest(array.copy(), place) == np.sort(array)[place]
    assert kth_smallest(torch.from_numpy(array.copy()), place) == np.sort(array)[place]


def test_pieces_cover_everything_once() -> None:
    array = np.arange(700 * 401, dtype=np.float32).reshape(700, 401)
    found = [part for (part,) in pieces(array)]
    assert len(found) > 1
    assert np.array_equal(np.concatenate(found), array)


@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize("name", [method.name for method in COMBINED])
def test_an_array_without_dimensions_is_merged_as_one_of_one_element(
    name: str, library: str
) -> None:
    target = np.array([0.5], np.float32)
    models = [
        (np.array([value], np.float32), np.array([0.25], np.float32)) for value in (-2.0, 1.5, 3.0)
    ]
    flat = [(d.reshape(()), b.reshape(())) for d, b in models]
    weights, params = [0.5, 1.0, 0.75], {"density": 0.9}
    if name not in ("ties", "dare", "dare_ties"):
        params = {}
    expected = combine(name, target, models, weights, params, library=library)
    found = combine(name, target.reshape(()), flat, weights, params, library=library)
    assert found.shape == ()
    assert found.tobytes() == expected.tobytes() != target.tobytes()


def test_rounding_to_float32() -> None:
    for value in (0.1, -1 / 3, 3.4e38, 1e-46, 2.0**-149):
        assert round_float32(value) == float(np.float32(value))
    assert round_float32(4e38) == math.inf
    assert round_float32(-4e38) == -math.inf


# Parameters -----------------------------------------------------------------------------------


def test_the_registry_names_sources_and_defaults() -> None:
    assert list(METHODS) == [
        "add_difference",
        "ties",
        "dare",
        "dare_ties",
        "slerp",
        "train_difference",
        "capped_difference",
    ]
    for name, method in METHODS.items():
        assert method.name == name
        assert method.source
        assert "target" in method.formula
        defaults = method.fill({})
        assert set(defaults) == {param.name for param in method.params}
        assert list(method.problems(defaults)) == []
    assert METHODS["dare"].fill({"density": 1}) == {"density": 1.0, "seed": 0}
    assert isinstance(METHODS["dare"].fill({"density": 1})["density"], float)


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("dare", {"density": 0}, r"params\.density: 0 is not within 1e-06 to 1"),
        ("ties", {"density": 0}, r"params\.density: 0 is not within 0 \(not 0 itself\) to 1"),
        ("ties", {"density": -0.1}, r"params\.density: -0\.1 is not within"),
        ("dare_ties", {"density": 1.5}, r"params\.density: 1\.5 is not within"),
        ("ties", {"density": math.nan}, r"params\.density: nan is not within"),
        ("ties", {"density": "half"}, r"params\.density: 'half' is not a number"),
        ("ties", {"density": True}, r"params\.density: True is not a number"),
        ("ties", {"density": None}, r"params\.density: None is not a number"),
        ("ties", {"densty": 0.5}, r"params\.densty: .*no such parameter, did you mean 'density'\?"),
        ("ties", {"k": 3}, r"params\.k: method ties has no .*; it takes density, normalize"),
        ("ties", {"normalize": 1}, r"params\.normalize: 1 is not true or false"),
        ("dare", {"seed": 1.5}, r"params\.seed: 1\.5 is not a whole number"),
        ("dare", {"seed": -1}, r"params\.seed: -1 is not within 0 to 9223372036854775807"),
        ("slerp", {"t": 1.01}, r"params\.t: 1\.01 is not within 0 to 1"),
        ("slerp", {"t": -0.01}, r"params\.t: -0\.01 is not within 0 to 1"),
        ("capped_difference", {"cap": 0}, r"params\.cap: 0 is not within 0 \(not 0 itself\)"),
        ("add_difference", {"density": 0.5}, "method add_difference has no such parameter"),
        ("train_difference", {"t": 0.5}, "method train_difference has no such parameter"),
    ],
)
def test_parameters_that_are_refused(name: str, params: dict[str, Any], message: str) -> None:
    problems = list(METHODS[name].problems(params))
    assert len(problems) == 1
    assert re.search(message, problems[0])
