"""Carry a plan out: read, add, round, write, within a fixed amount of memory."""

from merge.engine.device import choose_device, device_words
from merge.engine.execute import MergeResult, execute_plan

__all__ = ["MergeResult", "choose_device", "device_words", "execute_plan"]
