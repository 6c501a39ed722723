"""The command line: the only part that prints."""

from merge.cli.main import main

__all__ = ["main"]
