"""What a tuning tries."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from merge import load_recipe
from merge.errors import RecipeError
from merge.tuning.settings import Setting, check_over, read_weights, timesteps_for


@given(st.integers(1, 8))
def test_timesteps_fall_from_pure_noise_on_the_schedule_of_lcms(steps: int) -> None:
    own, *others = timesteps_for(steps)
    assert own is None
    assert len(set(others)) == len(others)
    for placed in others:
        assert placed is not None
        assert len(placed) == steps
        assert placed[0] == 999
        assert all(a > b for a, b in itertools.pairwise(placed))
        assert all((step + 1) % 20 == 0 for step in placed)


def test_two_and_four_steps_try_what_was_found_to_matter() -> None:
    assert (999, 199) in timesteps_for(2)
    assert {placed[-1] for placed in timesteps_for(4) if placed} == {259, 199, 99, 59}
    assert timesteps_for(1) == (None,)


def test_overrides_make_the_setting_of_a_recipe() -> None:
    setting = Setting(0.65, 1.5, (999, 199), (("*.attn2.*", 0.9),))
    words = setting.overrides(("weight", "guidance_scale", "timesteps", "groups"))
    recipe = load_recipe("demo", words)
    assert recipe.weight == 0.65
    assert recipe.verify.guidance_scale == 1.5
    assert recipe.verify.timesteps == [999, 199]
    assert recipe.block_weights == {"*.attn2.*": 0.9}
    assert load_recipe("demo", setting.overrides(("weight",))).verify.guidance_scale == 1.0


def test_own_timesteps_are_null() -> None:
    recipe = load_recipe("demo", Setting(1.0, 1.0, None).overrides(("timesteps",)))
    assert recipe.verify.timesteps is None


def test_what_is_tuned_is_checked() -> None:
    assert check_over(["timesteps", "weight"]) == ("weight", "timesteps")
    with pytest.raises(RecipeError, match="'wieght' is not one of weight, guidance_scale"):
        check_over(["wieght"])
    with pytest.raises(RecipeError, match="groups are tuned around a weight"):
        check_over(["groups"])
    with pytest.raises(RecipeError, match="name something"):
        check_over([])


def test_weights_are_checked() -> None:
    assert read_weights("0:1:0.5") == (0.0, 0.5, 1.0)
    assert read_weights("1,0.2,0.6") == (0.2, 0.6, 1.0)
    for text in ("0.5", "0,1", "a,b,c"):
        with pytest.raises(RecipeError, match="no range of at least three numbers"):
            read_weights(text)
