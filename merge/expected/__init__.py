"""Which tensors a component must have, from its config alone: keys and shapes of its class.

A loader draws what is missing anew at every load, so that the same edit gives other pictures, and
fails on a shape that the config does not have. Tables of ours, since planning imports no torch.
"""

from merge.expected.compare import Differences, compare_tensors, squeezed
from merge.expected.fit import Fit, expected_tensors, fit_to_config

__all__ = ["Differences", "Fit", "compare_tensors", "expected_tensors", "fit_to_config", "squeezed"]
