"""Grids over a recipe: every combination of some values merged, edited with and measured."""
