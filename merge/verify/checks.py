"""What a merged model must be, each as a measured value and a limit.

All of these are about being broken, none about taste: distances to another model's pictures are
shown in the report and not judged. A check that could be wrong about a good merge only warns.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml
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

    @property
    def rule(self) -> str:
        """Return how the value must lie to the limit."""
        return "at least" if self.at_least else "at most"


# Stable names, in the order of the report.
CHECKS: Mapping[str, CheckKind] = {
    name: CheckKind(**fields)
    for name, fields in yaml.safe_load(
        Path(__file__).with_name("checks.yaml").read_text(encoding="utf-8")
    ).items()
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
