"""Recipes: the YAML that names the models and says how to merge them."""
