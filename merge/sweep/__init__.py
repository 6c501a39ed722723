"""A grid of merges over the values of a recipe, measured and shown side by side."""
