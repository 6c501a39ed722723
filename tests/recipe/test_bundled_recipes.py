"""The bundled recipes: their comments, their schedulers, and nothing that nobody has seen."""

from __future__ import annotations

import inspect
import re
import warnings
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from merge.editor.schedule import Noise, Schedule, draw_noise, make_schedule
from merge.editor.settings import EditSettings
from merge.family.stable_diffusion import SD1
from merge.plan.export import scheduler_config
from merge.recipe.bundled import bundled_recipes
from merge.recipe.load import load_recipe
from merge.recipe.schema import Recipe
from merge.recipe.validate import validate

RECIPES = bundled_recipes()
# What the Stable Diffusion editors' schedulers have in common.
EDITOR_SCHEDULER = {
    "_class_name": "EulerAncestralDiscreteScheduler",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "timestep_spacing": "linspace",
}
every_recipe = pytest.mark.parametrize("name", RECIPES)


def comment_of(path: Path) -> str:
    """Return the comment above a recipe, without its hashes."""
    lines = path.read_text(encoding="utf-8").splitlines()
    end = next(index for index, line in enumerate(lines) if not line.startswith("#"))
    return "\n".join(line.removeprefix("#").removeprefix(" ") for line in lines[:end])


def exported_scheduler(recipe: Recipe) -> SchedulerMixin:
    """Load the scheduler that the recipe's export would have, as diffusers does."""
    config = scheduler_config(recipe.scheduler, EDITOR_SCHEDULER, None, SD1.scheduler_keys)
    return getattr(diffusers, recipe.scheduler.class_name).from_config(config)


def settings_of(recipe: Recipe) -> EditSettings:
    verify = recipe.verify
    return EditSettings(
        steps=verify.steps,
        guidance_scale=verify.guidance_scale,
        image_guidance_scale=verify.image_guidance_scale,
        resolution=verify.resolution,
        original_inference_steps=verify.original_inference_steps,
        timesteps=None if verify.timesteps is None else tuple(verify.timesteps),
    )


def schedule_of(name: str) -> Schedule:
    recipe = load_recipe(name)
    return make_schedule(exported_scheduler(recipe), settings_of(recipe))


def stub_unet(latents: torch.Tensor, timestep: Any) -> torch.Tensor:
    """Predict something that depends on both."""
    return torch.sin(3 * latents + float(timestep) / 300)


@every_recipe
def test_it_is_valid_by_its_bundled_name(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert validate(recipe) == []


@every_recipe
def test_its_comment_has_every_line(name: str) -> None:
    comment = comment_of(RECIPES[name])
    for word in ("Run:    ", "Change: ", "Licence: ", "Unconfirmed: "):
        assert len(re.findall(rf"^{word}\S", comment, re.MULTILINE)) == 1, word
    unconfirmed = comment.partition("Unconfirmed: ")[2]
    if name.startswith("demo"):
        assert unconfirmed.startswith("nothing")
        return
    assert "not looked up on the Hub by us" in unconfirmed
    assert re.search(r"not\s+(#\s+)?measured", unconfirmed, re.IGNORECASE)
    assert re.search(r"^Downloads .*\d GB", comment, re.MULTILINE)
    assert re.search(r"^Source: https://", comment, re.MULTILINE)


@every_recipe
def test_it_names_no_commit(name: str) -> None:
    text = RECIPES[name].read_text(encoding="utf-8")
    assert not re.search(r"[0-9a-fA-F]{40}", text)
    recipe = load_recipe(name)
    models = [recipe.models.target, recipe.models.base, *recipe.models.distilled]
    assert {model.revision for model in models if model is not None and model.repo} <= {"main"}


@every_recipe
def test_overrides_that_its_comment_offers_are_valid(name: str) -> None:
    words = re.findall(r"(?<!\S)[a-z_.]+=[^\s,;:]+", comment_of(RECIPES[name]))
    # Of the stock pipeline's call, not of a recipe.
    words = [word.rstrip(".") for word in words if not word.startswith("eta=")]
    assert words
    assert load_recipe(name, words) != load_recipe(name)


@every_recipe
def test_diffusers_has_its_scheduler_and_knows_its_config(name: str) -> None:
    spec = load_recipe(name).scheduler
    scheduler = exported_scheduler(load_recipe(name))
    assert isinstance(scheduler, SchedulerMixin)
    # from_config takes unknown words and ignores them.
    assert set(spec.config) <= set(inspect.signature(type(scheduler).__init__).parameters)
    for key, value in spec.config.items():
        assert scheduler.config[key] == value
    assert not scheduler.config.get("clip_sample", False), "latents are no pictures"


@every_recipe
def test_the_edit_runner_steps_as_diffusers_does(name: str) -> None:
    schedule = schedule_of(name)
    recipe = load_recipe(name)
    stock = exported_scheduler(recipe)
    arguments: dict[str, Any] = {"num_inference_steps": recipe.verify.steps}
    if recipe.scheduler.class_name == "LCMScheduler":
        arguments["original_inference_steps"] = recipe.verify.original_inference_steps
    if recipe.verify.timesteps is not None:
        arguments = {"timesteps": list(recipe.verify.timesteps)}
    with warnings.catch_warnings():
        # EulerDiscreteScheduler uses numpy in ways it warns of.
        warnings.simplefilter("ignore", DeprecationWarning)
        stock.set_timesteps(**arguments)
    assert schedule.timesteps.tolist() == stock.timesteps.tolist()
    assert len(schedule.timesteps) == recipe.verify.steps

    drawn, generators = draw_noise([7], (4, 8, 8), schedule)
    noise = Noise(drawn[0], tuple(drawn[1:]), generators)
    latents = noise.first * schedule.init_noise_sigma
    for index, timestep in enumerate(schedule.timesteps):
        prediction = stub_unet(schedule.scale(latents, index), timestep)
        latents = schedule.step(index, prediction, latents, noise)

    generator = torch.Generator("cpu").manual_seed(7)
    expected = torch.randn(1, 4, 8, 8, generator=generator) * stock.init_noise_sigma
    # As the stock pipeline calls it: eta 0 where there is one, TCD's own default of 0.3 too.
    extra = {"eta": 0.0} if "eta" in inspect.signature(stock.step).parameters else {}
    for timestep in stock.timesteps:
        prediction = stub_unet(stock.scale_model_input(expected, timestep), timestep)
        expected = stock.step(prediction, timestep, expected, generator=generator, **extra)[0]
    assert torch.isfinite(latents).all()
    assert torch.equal(latents, expected)


@pytest.mark.parametrize(
    ("name", "timesteps"),
    [
        # Source: DMD2's card; "LCMScheduler's default timesteps differ".
        ("sdxl-dmd2", [999, 749, 499, 249]),
        ("sdxl-lightning", [999, 749, 499, 249]),
        ("sd15-hyper-lora", [999, 749, 499, 249]),
        ("sd15-lcm-lora", [999, 759, 499, 259]),
        ("magicbrush-lcm-lora", [999, 759, 499, 259]),
        ("sdxl-turbo", [999, 799, 599, 399, 199]),
    ],
)
def test_timesteps_are_those_of_the_distillation(name: str, timesteps: list[int]) -> None:
    assert schedule_of(name).timesteps.tolist() == timesteps


def test_dmd2s_export_has_its_timesteps_in_plain_diffusers() -> None:
    scheduler = exported_scheduler(load_recipe("sdxl-dmd2"))
    scheduler.set_timesteps(4)
    assert scheduler.timesteps.tolist() == [999, 749, 499, 249]


@every_recipe
def test_pickles_are_allowed_only_where_a_parent_has_nothing_else(name: str) -> None:
    assert load_recipe(name).allow_pickle == (name in ("sdxl-dmd2", "magicbrush-lcm-lora"))
