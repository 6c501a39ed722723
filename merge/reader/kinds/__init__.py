"""What a weight file is beside its numbers: how they are stored, and what the model predicts.

Told by names, shapes, dtypes and metadata alone.
"""
