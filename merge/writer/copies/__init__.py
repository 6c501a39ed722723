"""Tensors moved into a new file without a change to their values, in a stream."""
