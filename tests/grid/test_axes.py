"""The words of a grid: axes, ranges, single values, and what is wrong with them."""

from __future__ import annotations

import itertools
import time
from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from merge.errors import RecipeError
from merge.grid.axes import (
    EDIT_SETTINGS,
    MAX_CELLS,
    cell_count,
    combinations,
    override_words,
    read_axes,
)


def labels(word: str) -> list[str]:
    """Return the labels of the only axis of a word."""
    ((axis,), overrides) = read_axes([word])
    assert overrides == ()
    return [value.label for value in axis.values]


def problems(*words: str) -> tuple[str, ...]:
    with pytest.raises(RecipeError, match="the grid is not valid:") as caught:
        read_axes(words)
    assert "KEY=START:STOP:STEP" in caught.value.hint
    return caught.value.problems


# Values ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("weight=0.5,1", ["0.5", "1"]),
        ("weight= 0.5 , 1 ", ["0.5", "1"]),
        ("weight=0:1.5:0.25", ["0", "0.25", "0.5", "0.75", "1", "1.25", "1.5"]),
        ("weight=0:1:0.1", [f"{n / 10:g}" for n in range(11)]),
        ("weight=1:0:-0.5", ["1", "0.5", "0"]),
        ("weight=-0.2:0.2:0.2", ["-0.2", "0", "0.2"]),
        ("weight=0:1:0.3", ["0", "0.3", "0.6", "0.9"]),
        ("weight=1e-3:3e-3:1e-3", ["0.001", "0.002", "0.003"]),
        ("weight= 0 : 1 : 0.5", ["0", "0.5", "1"]),
        ("steps=10:30:10", ["10", "20", "30"]),
        ("method=add_difference,ties", ["add_difference", "ties"]),
        ("exclude=[a.*,b.*],[]", ["[a.*,b.*]", "[]"]),
        ("params={density: 0.5, seed: 1},{}", ["{density: 0.5, seed: 1}", "{}"]),
        ("models.target=/a:b:c,/d", ["/a:b:c", "/d"]),
        ("x=(1,2),3", ["(1,2)", "3"]),
        ("x='a,b',\"c],d\",e", ["'a,b'", '"c],d"', "e"]),
        ("block_weights[M00]=0,1", ["0", "1"]),
        ("timesteps=999/599/299/99,999/499", ["999/599/299/99", "999/499"]),
        ("timesteps=[999,599],999/499,null", ["[999,599]", "999/499", "null"]),
    ],
)
def test_a_word_with_several_values_is_an_axis(word: str, expected: list[str]) -> None:
    assert labels(word) == expected


decimals = st.decimals(-1000, 1000, places=4)


@given(decimals, decimals.filter(bool), st.integers(1, 60), st.decimals(0, 1, places=3))
def test_ranges_are_exact_with_both_ends(
    start: Decimal, step: Decimal, count: int, beyond: Decimal
) -> None:
    # Up to one step beyond the last number, that is still the last one.
    last = start + count * step
    stop = last + (beyond * step if beyond < 1 else 0)
    found = [Fraction(label) for label in labels(f"weight={start}:{stop}:{step}")]
    assert found == [Fraction(start) + index * Fraction(step) for index in range(count + 1)]
    assert all("e" not in label.lower() for label in labels(f"weight={start}:{stop}:{step}"))


@pytest.mark.parametrize("step", ["1e-999999", "1e999999", "1e-21", "0.000000000000000000001"])
def test_a_range_of_monstrous_numbers_is_refused_at_once(step: str) -> None:
    started = time.perf_counter()
    (problem,) = problems(f"weight=0:1:{step}")
    assert problem == f"'weight=0:1:{step}': its numbers have more than 20 digits on one side"
    assert time.perf_counter() - started < 1


def test_no_digit_of_a_long_range_is_lost() -> None:
    start, step = "10000000000000000000", "0.00000000000000000001"
    assert labels(f"weight={start}:{start}.00000000000000000002:{step}") == [
        start,
        f"{start}.00000000000000000001",
        f"{start}.00000000000000000002",
    ]


# What values stand for -------------------------------------------------------------------------


def test_a_single_value_is_an_override_of_every_cell() -> None:
    axes, overrides = read_axes(
        ["weight=0.5,1", "method=ties", "resolution=64", "exclude=[a,b]", "block_weights[M00]=0"]
    )
    assert [axis.key for axis in axes] == ["weight"]
    assert overrides == (
        "method=ties",
        "verify.resolution=64",
        "exclude=[a,b]",
        "block_weights[M00]=0",
    )
    assert read_axes(["weight=0:0:1"]) == ((), ("weight=0",))
    assert read_axes([]) == ((), ())


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("steps", "4", ("verify.steps=4", "verify.timesteps=null")),
        ("timesteps", "999/599", ("verify.timesteps=[999,599]",)),
        ("timesteps", "[999,599]", ("verify.timesteps=[999,599]",)),
        ("timesteps", "null", ("verify.timesteps=null",)),
        ("seed", "3", ("verify.seeds=[3]",)),
        ("guidance_scale", "1.5", ("verify.guidance_scale=1.5",)),
        ("image_guidance_scale", "1.5", ("verify.image_guidance_scale=1.5",)),
        ("original_inference_steps", "100", ("verify.original_inference_steps=100",)),
        ("weight", "1", ("weight=1",)),
        ("models.distilled[0].weight", "1", ("models.distilled[0].weight=1",)),
    ],
)
def test_names_of_edit_settings_stand_for_what_a_recipe_has(
    key: str, value: str, words: tuple[str, ...]
) -> None:
    assert override_words(key, value) == words
    assert read_axes([f"{key}={value}"]) == ((), words)


def test_settings_may_be_named_with_their_section() -> None:
    for name in EDIT_SETTINGS:
        first, second = ("999/599", "999/499") if name == "timesteps" else ("1", "2")
        long, short = (read_axes([f"{key}={first},{second}"]) for key in (f"verify.{name}", name))
        assert long == short
        assert long[0][0].key == name


def test_combinations_change_the_last_axis_fastest() -> None:
    axes, _ = read_axes(["weight=0,1", "steps=2,4", "guidance_scale=1,2,3"])
    found = [tuple(value.label for value in values) for values in combinations(axes)]
    assert found == list(itertools.product(["0", "1"], ["2", "4"], ["1", "2", "3"]))
    assert cell_count(axes) == len(found) == 12
    assert cell_count([]) == 1


# What is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["weight"], "'weight' is not of the form KEY=VALUES"),
        (["=1,2"], "'=1,2' is not of the form KEY=VALUES"),
        (["weight=0:1"], "'weight=0:1': a range has three numbers, START:STOP:STEP"),
        (["weight=0:1:0"], "'weight=0:1:0': its step does not lead from START to STOP"),
        (["weight=0:1:-0.1"], "'weight=0:1:-0.1': its step does not lead from START to STOP"),
        (["weight=0:1:0.00001"], "'weight=0:1:0.00001': it has 100,001 values"),
        (["weight=1,,2"], "weight: a value is empty"),
        (["weight=1,"], "weight: a value is empty"),
        (["weight=1,2,1"], "weight: 1 is there twice"),
        (["weight=1,1.0,1e0"], "weight: 1.0, 1e0 is there twice"),
        (["timesteps=999/1,[999, 1]"], "timesteps: [999, 1] is there twice"),
        (["weight=0,1", "weight=2,3"], "weight: it is an axis twice"),
        (["steps=1,2", "verify.steps=3,4"], "steps: it is an axis twice"),
        (["weight=0,1", "weight=2"], "weight: it is an axis, and has one value for every cell too"),
        (
            ["steps=2,4", "timesteps=999/599"],
            "steps, timesteps: explicit timesteps have a number, so name one of the two",
        ),
        (
            ["steps=2,4", "timesteps=999/599,999/499"],
            "steps, timesteps: explicit timesteps have a number, so name one of the two",
        ),
        (["name=a,b"], "name: nothing that is measured depends on it"),
        (["output.folder=a,b"], "output.folder: nothing that is measured depends on it"),
        (["allow_noop=true,false"], "allow_noop: nothing that is measured depends on it"),
        (
            ["verify.compare.guidance_scale=1,2"],
            "verify.compare.guidance_scale: nothing that is measured depends on it",
        ),
        (
            ["verify.edits[0].seed=1,2"],
            "verify.edits[0].seed: nothing that is measured depends on it",
        ),
        (["verify.seeds=[0],[1,2]"], "verify.seeds: cells differ in one seed, as in seed=0,1"),
        (
            ["weight=0,1", "steps=1,2", "guidance_scale=1,2", "seed=1,2"],
            "there are 4 axes, and 3 are the most",
        ),
        (
            ["weight=1:200:1", "guidance_scale=1:200:1"],
            "the grid has 40,000 cells, and 10,000 are the most",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_makes_no_grid_is_refused(words: list[str], problem: str) -> None:
    assert problems(*words) == (problem,)


def test_as_many_cells_as_may_be() -> None:
    axes, _ = read_axes(["weight=1:100:1", "guidance_scale=1:100:1"])
    assert cell_count(axes) == MAX_CELLS


def test_all_problems_are_told_at_once() -> None:
    found = problems("weight", "weight=0:1:0", "name=a,b", "seed=1,1", "timesteps=,999/1")
    assert len(found) == 5
    assert found[0].startswith("'weight' is not of the form")
    assert found[-1] == "timesteps: a value is empty"
