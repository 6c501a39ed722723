"""The tensors that there are against those that there should be."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from merge.family.expected.fields import Shape
from merge.family.keys.vae import in_new_words

# Names of a model inside of a model, which transformers from 5.6 on leaves out.
_INNER = re.compile(r"(?:text_model|vision_model)\.")
# Constants that old files hold and no class loads any more.
_CONSTANT = re.compile(r"(?:.+\.)?(?:position_ids|logit_scale)")


@dataclass(frozen=True, slots=True)
class Differences:
    """How a component differs from its config.

    Attributes:
        missing: Keys that there should be, and are not.
        extra: Keys that nothing loads.
        misshaped: Key to the shape that it has and the one that the config asks for.
        reshaped: Key to the shape that the same numbers have there: only ones are between.
    """

    missing: tuple[str, ...]
    extra: tuple[str, ...]
    misshaped: Mapping[str, tuple[Shape, Shape]]
    reshaped: Mapping[str, Shape]


def compare_tensors(expected: Mapping[str, Shape], found: Mapping[str, Shape]) -> Differences:
    """Compare a component's tensors with those that its config asks for.

    Spellings that loaders take for the same are the same here: with and without the name of an
    inner CLIP model, and a VAE's attention in its old words.

    Args:
        expected: Key to shape, from `expected_tensors`.
        found: Key to shape, as they are in files.
    """
    wanted = {_plain(key): (key, shape) for key, shape in expected.items()}
    missing = dict(wanted)
    extra: list[str] = []
    misshaped: dict[str, tuple[Shape, Shape]] = {}
    reshaped: dict[str, Shape] = {}
    for key, shape in found.items():
        plain = _plain(key)
        missing.pop(plain, None)
        if plain not in wanted:
            if not _CONSTANT.fullmatch(key):
                extra.append(key)
            continue
        right = wanted[plain][1]
        if shape == right:
            continue
        if squeezed(shape) == squeezed(right):
            reshaped[key] = right
        else:
            misshaped[key] = (shape, right)
    lacking = tuple(sorted(key for key, _ in missing.values()))
    return Differences(lacking, tuple(sorted(extra)), misshaped, reshaped)


def _plain(key: str) -> str:
    return _INNER.sub("", in_new_words(key))


def squeezed(shape: Shape) -> Shape:
    """Take off the ones at the end: a 1x1 convolution holds the numbers of a linear layer."""
    while shape and shape[-1] == 1:
        shape = shape[:-1]
    return shape
