"""Copies in the shapes that a component's config asks for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from merge.family.expected.fit import Fit, fit_to_config
from merge.writer.copies.model import TensorCopy


def fit_copies(
    component: str,
    copies: Sequence[TensorCopy],
    config: Mapping[str, Any] | None,
    class_name: str = "",
) -> tuple[tuple[TensorCopy, ...], Fit]:
    """Give copies the shapes of a config, and say what does not fit.

    Args:
        component: Its name, for messages.
        copies: All tensors of the component.
        config: Its parsed `config.json`; nothing is compared without one.
        class_name: What its pipeline says that it is.

    Raises:
        CheckpointError: a value of the config is impossible.
    """
    fit = fit_to_config(component, {copy.name: copy.shape for copy in copies}, config, class_name)
    shaped = tuple(
        replace(copy, shape=fit.shapes[copy.name]) if copy.name in fit.shapes else copy
        for copy in copies
    )
    return shaped, fit
