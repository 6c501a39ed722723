"""The delta of a recipe as a LoRA: randomised SVD per layer, and how far it is off."""
