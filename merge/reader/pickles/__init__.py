"""Checkpoints that `torch.save` wrote, read without running anything of them.

`.bin`, `.ckpt`, `.pt` and `.pth` files are zip archives of raw records and one pickle, a program
that says which record is which tensor. `archive` finds the records, `machine` reads the program as
a description, `table` turns it into the same table as a safetensors header. Neither torch nor
Python's pickle takes part.
"""
