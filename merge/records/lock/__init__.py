"""The lock: a recipe after overrides with every input file by commit, size and SHA-256.

It is the same bytes for the same inputs, recipe and tool version: no date, device, machine path or
user name is in it. Local models appear by the name of their file or folder, so a lock finds them
again by looking, and trusts only their digests.
"""
