"""Models moved between the two layouts: a diffusers folder and one LDM/SGM file.

Tensors are renamed, fused, split and turned in a stream; no value changes and no model is loaded.
"""
