"""From a model named in a recipe to the files that the merge reads and the export copies."""
