"""Random numbers that depend on a place only: seed, key, model and element.

A generator's stream would tie each number to the order of the work. A hash of the element's index
gives the same number in every block cut, thread and device.
"""

from __future__ import annotations

import hashlib
import math

from merge.methods.arrays import library
from merge.methods.model import Array

_WORD = 0xFFFFFFFF
# Odd and below 2^31, so that a product with a 32-bit word stays within int64, which is the widest
# type with multiplication on every device.
_FACTORS = (0x7FEB352D, 0x2C1B3C6D)


def keep_mask(like: Array, density: float, seed: int, key: str, model: int, start: int) -> Array:
    """Return a boolean array of a block, each element True with probability `density`.

    Args:
        like: Any shape; gives shape, library and device.
        density: Within 0 to 1, met to 2^-32.
        seed: From the recipe.
        key: Diffusers key of the tensor.
        model: Place of the model among those that touch the key.
        start: Index of the block's first element.
    """
    words = random_words(like, seed, key, model, start)
    return (words < round(density * 2**32)).reshape(like.shape)


def random_words(like: Array, seed: int, key: str, model: int, start: int) -> Array:
    """Return one 32-bit word an element, `(elements,)` in int64.

    Two rounds of a multiply-xorshift hash over the index, each keyed with a half of a BLAKE2b
    digest of seed, model and key.

    Source:
        The shape of the hash: C. Wellons, https://nullprogram.com/blog/2018/07/31/.
    """
    digest = hashlib.blake2b(f"{seed}\0{model}\0{key}".encode(), digest_size=8).digest()
    first, second = (int.from_bytes(digest[place : place + 4], "little") for place in (0, 4))
    xp = library(like)
    count = math.prod(like.shape)
    options = {"device": like.device} if xp.__name__ == "torch" else {}
    index = xp.arange(start, start + count, dtype=xp.int64, **options)
    high = index >> 32
    index &= _WORD
    index ^= first
    index = _mix(index)
    index ^= high
    index ^= second
    return _mix(index)


def _mix(words: Array) -> Array:
    """Scramble 32-bit words one to one, in place."""
    words ^= words >> 16
    for factor, shift in zip(_FACTORS, (15, 16), strict=True):
        words *= factor
        words &= _WORD
        words ^= words >> shift
    return words
