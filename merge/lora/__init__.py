"""LoRA files: what their keys mean, and the delta that they stand for."""
