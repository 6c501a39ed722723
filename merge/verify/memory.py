"""Give back what a model held before the next one is loaded."""

from __future__ import annotations

import gc

import torch


def free_memory() -> None:
    """Collect models that nothing refers to any more, and return their GPU memory."""
    # Modules and their hooks refer to each other, so that only the collector gets at them.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
