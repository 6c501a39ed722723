"""Carry a plan out: read, add, round, write, within a fixed amount of memory."""
