"""Recipes: the YAML that names the models and says how to merge them."""

from merge.recipe.bundled import bundled_recipes, find_recipe
from merge.recipe.load import load_recipe, parse_recipe
from merge.recipe.schema import (
    DistilledRef,
    EditSpec,
    ModelRef,
    Models,
    OutputSpec,
    Recipe,
    SchedulerSpec,
    VerifySpec,
)

__all__ = [
    "DistilledRef",
    "EditSpec",
    "ModelRef",
    "Models",
    "OutputSpec",
    "Recipe",
    "SchedulerSpec",
    "VerifySpec",
    "bundled_recipes",
    "find_recipe",
    "load_recipe",
    "parse_recipe",
]
