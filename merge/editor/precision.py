"""How exactly a GPU multiplies float32 numbers while a model edits.

cuDNN convolves float32 in TF32 unless it is told otherwise, with ten bits of fraction: an edit in
float32 was then 0.03 away from the CPU's, in latents of about 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


def _places() -> tuple[Any, ...]:
    # Known at run time alone, as a property of the module.
    return torch.backends.cuda.matmul, getattr(torch.backends.cudnn, "conv")  # noqa: B009


@contextmanager
def float32_precision(*, allows_tf32: bool) -> Iterator[None]:
    """Make float32 on a GPU what it says for a while, or let it be TF32; put back what was set.

    Args:
        allows_tf32: True for the faster products of ten bits.
    """
    places = _places()
    before = [place.fp32_precision for place in places]
    for place in places:
        place.fp32_precision = "tf32" if allows_tf32 else "ieee"
    try:
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            place.fp32_precision = value
