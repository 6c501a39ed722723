"""Which tensors a component must have, from its config alone: keys and shapes of its class.

A loader draws what is missing anew at every load, so that the same edit gives other pictures, and
fails on a shape that the config does not have. Tables of ours, since planning imports no torch.
"""
