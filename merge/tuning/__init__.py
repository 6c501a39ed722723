"""The weight of a merge, and settings of its edits, chosen by measuring."""
