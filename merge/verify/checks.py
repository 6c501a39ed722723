"""What a merged model must be, each as a measured value and a limit.

All of these are about being broken, none about taste: distances to another model's pictures are
shown in the report and not judged. A check that could be wrong about a good merge only warns.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from merge.editor.result import EditResult
from merge.verify.metrics import Values, rms, to_values
from merge.verify.model import Check


@dataclass(frozen=True, slots=True)
class CheckKind:
    """What a check measures.

    Attributes:
        title: For people.
        meaning: What the value is.
        limit: Of the value; None where each edit has its own.
        at_least: True when the value must reach the limit, False when it must not exceed it.
        proof: What is known once it passes, in a few words.
        doubt: What a value beyond the limit looks like, for a check that only warns.
    """

    title: str
    meaning: str
    limit: float | None
    at_least: bool = False
    proof: str = ""
    doubt: str = ""

    @property
    def severity(self) -> str:
        """Return `judged` where a failure fails the model, `warned` where it only warns."""
        return "warned" if self.doubt else "judged"


# Stable names, in the order of the report. Pictures hold values in 0 to 1.
CHECKS: Mapping[str, CheckKind] = {
    "files_as_recorded": CheckKind(
        "Files are as recorded",
        "files whose size or SHA-256 is not the manifest's",
        0,
        proof="files as recorded",
    ),
    "weights_finite": CheckKind(
        "Weights are finite", "NaN or infinite values in the UNet", 0, proof="finite"
    ),
    "weight_not_negative": CheckKind(
        "Weight is not negative",
        "the recipe's weight; below zero it takes the few-step skill away",
        0,
        at_least=True,
        doubt="the weight is negative",
    ),
    "base_is_nearer": CheckKind(
        "Target is nearer to base than to distilled",
        "where the target lies on the way from base, 0, to distilled, 1",
        0.5,
        doubt="base and distilled look swapped",
    ),
    "deterministic": CheckKind(
        "Deterministic",
        "values that differ when the first edit is run again",
        0,
        proof="repeats",
    ),
    "latents_finite": CheckKind("Latents are finite", "NaN or infinite values", 0, proof="finite"),
    "picture_finite": CheckKind("Picture is finite", "NaN or infinite values", 0, proof="finite"),
    # A night scene has its lamp or its moon; a safety checker's black and a dead VAE have nothing.
    "not_black": CheckKind(
        "Not black",
        "brightest channel, 99th percentile of pixels",
        0.05,
        at_least=True,
        proof="not blank",
    ),
    # Per channel, so that a plain red picture counts as constant. 0.01 is 2.6 of 8-bit's 255.
    "not_constant": CheckKind(
        "Not constant",
        "largest standard deviation of a channel",
        0.01,
        at_least=True,
        proof="not blank",
    ),
    # Of the most changed pixels, since a good edit may touch a small part only, and against the
    # VAE's round trip too, which is what a UNet that does nothing gives. 0.02 is 5 of 255.
    "not_the_source": CheckKind(
        "Not the source unchanged",
        "mean difference of the 1 % of pixels that changed most",
        0.02,
        at_least=True,
        proof="changes pictures",
    ),
    # Good merges leave up to 0.15 and noise 0.64 and more: `merge.verify.residual` has the figures.
    "noise_left": CheckKind(
        "Removes noise",
        "share of a little added noise that the model leaves in its own pictures",
        0.5,
        proof="no noise",
        doubt="pictures look like noise",
    ),
    "noise_left_by_target": CheckKind(
        "Pictures are ones that the target knows",
        "share of a little added noise that the target leaves in them",
        0.5,
        proof="no noise",
        doubt="pictures look like noise",
    ),
    "as_expected": CheckKind(
        "As expected",
        "root mean square difference to the nearest expected picture",
        None,
        proof="as expected",
    ),
}


def make_check(
    name: str,
    value: float,
    *,
    edit: int | None = None,
    limit: float | None = None,
    detail: Sequence[str] = (),
) -> Check:
    """Compare a value with its limit.

    Args:
        name: A key of `CHECKS`.
        value: The measurement; NaN fails.
        edit: Index of the edit.
        limit: Where the kind has none.
        detail: Names of what is at fault.
    """
    kind = CHECKS[name]
    bound = kind.limit if limit is None else limit
    assert bound is not None, name
    holds: Callable[[float, float], bool] = operator.ge if kind.at_least else operator.le
    rounded = value if isinstance(value, int) else round(float(value), 6)
    return Check(name, rounded, bound, holds(rounded, bound), edit, tuple(detail))


def check_edit(index: int, result: EditResult, round_trip: Image.Image) -> list[Check]:
    """Check the picture of one edit.

    Args:
        index: Of the edit.
        result: What the model made.
        round_trip: The source encoded and decoded by the model's VAE, of the same size.
    """
    picture = to_values(result.to_pil())
    deviation = max(float(picture[..., channel].std()) for channel in range(3))
    changes = [most_changed(picture, to_values(other)) for other in (result.source, round_trip)]
    return [
        make_check("latents_finite", _non_finite(result.latents), edit=index),
        make_check("picture_finite", result.non_finite_count, edit=index),
        make_check("not_black", float(np.percentile(picture.max(axis=2), 99)), edit=index),
        make_check("not_constant", deviation, edit=index),
        make_check("not_the_source", min(changes), edit=index),
    ]


def check_repeat(first: EditResult, again: EditResult) -> Check:
    """Check that the same edit gave the same values twice."""
    # As integers, so that NaN equals itself.
    pairs = [(first.image, again.image), (first.latents, again.latents)]
    count = sum(_differing(a, b) for a, b in pairs)
    return make_check("deterministic", count)


def check_expected(
    index: int, picture: Image.Image, expected: Sequence[Image.Image], limit: float
) -> tuple[Check, Image.Image]:
    """Check that a picture is near to one of those that are right, and return that one too."""
    values = to_values(picture)
    distances = [rms(values, to_values(other)) for other in expected]
    nearest = distances.index(min(distances))
    check = make_check("as_expected", distances[nearest], edit=index, limit=limit)
    return check, expected[nearest]


def check_weights(non_finite: Mapping[str, int]) -> Check:
    """Check that the UNet holds numbers only.

    Args:
        non_finite: Key to the number of values that are none.
    """
    detail = [f"{key} ({count:,})" for key, count in sorted(non_finite.items())]
    return make_check("weights_finite", sum(non_finite.values()), detail=detail)


def most_changed(a: Values, b: Values) -> float:
    """Return the mean absolute difference over the 1 % of pixels where it is largest."""
    changes = np.sort(np.abs(a - b).mean(axis=2), axis=None)
    return float(changes[-max(1, changes.size // 100) :].mean())


def _non_finite(values: Values) -> int:
    return int(np.count_nonzero(~np.isfinite(values)))


def _differing(a: Values, b: Values) -> int:
    if a.shape != b.shape:
        return max(a.size, b.size)
    return int(np.count_nonzero((a != b) & ~(np.isnan(a) & np.isnan(b))))
