"""Carry a plan out: read, add, round, write, within a fixed amount of memory."""

from merge.engine.device import choose_device, device_errors, device_words
from merge.engine.execute import MergeResult, execute_plan
from merge.engine.origin import Origin, measure_origins
from merge.engine.units import TensorState

__all__ = [
    "MergeResult",
    "Origin",
    "TensorState",
    "choose_device",
    "device_errors",
    "device_words",
    "execute_plan",
    "measure_origins",
]
