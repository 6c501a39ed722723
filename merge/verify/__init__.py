"""Proof of a checkpoint: its files are the recorded ones, and it edits pictures."""
