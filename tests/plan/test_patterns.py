from __future__ import annotations

import itertools
from fnmatch import fnmatchcase

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from merge.family.blocks import UNET_BLOCKS
from merge.plan.patterns import block_weight, match_exclude, unmatched


def weight_of(key: str, weights: dict[str, float], default: float) -> float:
    return block_weight(key, weights, default, UNET_BLOCKS)


KEY = "down_blocks.0.attentions.1.proj_in.weight"


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ({}, 1.0),
        ({"up_blocks.*": 0.5}, 1.0),
        ({"*": 0.5}, 0.5),
        ({"down_blocks.*": 0.5, "*": 0.25}, 0.5),
        ({"down_blocks.*": 0.5, "down_blocks.0.*": 0.0}, 0.0),
        ({"down_blocks.0.attentions.*": 0.5, "*.proj_in.weight": 0.25}, 0.5),
        ({KEY: 0.5, "down_blocks.0.attentions.1.proj_in.weigh?": 0.25}, 0.5),
        # A set of characters counts nothing, however long it is.
        ({"down_blocks.[0123456789].*": 0.5, "down_blocks.0.*": 0.25}, 0.25),
        ({"down_blocks.[0123456789].*": 0.5, "down_blocks.*": 0.25}, 0.5),
        ({"*weight": 0.5, "[]abcdefghijkld]own*": 0.25}, 0.5),
        ({"*weight": 0.5, "[!]abcefghijklmnop]own*": 0.25}, 0.5),
        ({"*eight": -0.5, "*?????????????": 0.25}, -0.5),
        # Case counts, and a dot is a dot.
        ({"DOWN_BLOCKS.*": 0.5}, 1.0),
        ({"down_blocks?0?*": 0.5}, 0.5),
        ({"downxblocks.*": 0.5, "down_blocksx0*": 0.5}, 1.0),
        ({"down_blocks.0": 0.5, "proj_in": 0.5}, 1.0),
    ],
)
def test_the_pattern_with_most_literal_characters_wins(
    weights: dict[str, float], expected: float
) -> None:
    assert weight_of(KEY, weights, 1.0) == expected
    assert weight_of(KEY, dict(reversed(weights.items())), 1.0) == expected


def test_a_tie_is_an_error_that_names_key_and_patterns() -> None:
    weights = {"*": 1.0, "down_blocks.0.*": 0.5, "*proj_in.weight": 0.25}
    assert len("down_blocks.0.") == len("proj_in.weight")
    with pytest.raises(
        ValueError, match=r"down_blocks\.0\..*: down_blocks\.0\.\* and \*proj_in\.weight are equal"
    ):
        weight_of(KEY, weights, 1.0)
    # A more specific one decides, and so does a key that only one of them names.
    assert weight_of(KEY, {**weights, KEY: 0.0}, 1.0) == 0.0
    assert weight_of("down_blocks.0.x", weights, 1.0) == 0.5


def test_a_tie_of_equal_weights_is_none() -> None:
    assert weight_of("ab", {"a*": 0.5, "*b": 0.5}, 1.0) == 0.5
    with pytest.raises(ValueError, match=r"a\* and \*b and \?b are equally specific"):
        weight_of("ab", {"a*": 0.5, "*b": 0.5, "?b": 0.25}, 1.0)


def test_the_first_exclude_that_names_a_key_is_given() -> None:
    assert match_exclude(KEY, []) is None
    assert match_exclude(KEY, ["up_blocks.*", "proj_in"]) is None
    assert match_exclude(KEY, ["up_blocks.*", "*.proj_in.*", "*"]) == "*.proj_in.*"
    assert match_exclude(KEY, [KEY]) == KEY
    assert match_exclude(KEY, [KEY.upper()]) is None


def test_patterns_that_name_nothing_are_found() -> None:
    keys = ["conv_in.weight", "conv_out.weight"]
    assert unmatched([], keys) == []
    assert unmatched(["conv_*", "up.*", "conv_in", "*.weight", "Conv*"], keys) == [
        "up.*",
        "conv_in",
        "Conv*",
    ]
    assert unmatched({"a": 1.0, "*": 0.5}, keys) == ["a"]
    assert unmatched(["*"], []) == ["*"]


PATTERNS = st.lists(st.sampled_from(["a", "b", "*", "?", "[ab]"]), max_size=4).map("".join)


@settings(deadline=None, max_examples=150)
@given(
    key=st.text("ab", max_size=4),
    weights=st.dictionaries(PATTERNS, st.sampled_from([0.0, 0.5, 2.0]), max_size=4),
)
def test_the_choice_never_depends_on_the_order(key: str, weights: dict[str, float]) -> None:
    def literals(pattern: str) -> int:
        return len(pattern.replace("[ab]", "").replace("*", "").replace("?", ""))

    matching = {p: w for p, w in weights.items() if fnmatchcase(key, p)}
    most = max(map(literals, matching), default=0)
    candidates = {w for p, w in matching.items() if literals(p) == most} or {1.0}
    for order in itertools.permutations(weights.items()):
        if len(candidates) == 1:
            assert weight_of(key, dict(order), 1.0) in candidates
        else:
            with pytest.raises(ValueError, match="are equally specific"):
                weight_of(key, dict(order), 1.0)
    assert unmatched(weights, [key]) == [p for p in weights if p not in matching]
