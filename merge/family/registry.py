"""Every architecture that can be merged, and which one a set of keys belongs to."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from merge.family.model import Component, Family, Recognised, Shapes
from merge.family.stable_diffusion import SD1, SD2, SDXL

# The first that fits a set of keys counts.
FAMILIES: tuple[Family, ...] = (SDXL, SD2, SD1)


def recognise(shapes: Shapes) -> Recognised | None:
    """Return what the keys and shapes of a main component say; None for those of no family."""
    family = next((family for family in FAMILIES if family.is_like(shapes)), None)
    if family is None:
        return None
    widening, guidance = family.widening, family.guidance
    context = next(
        (s[1] for k, s in shapes.items() if k.endswith(family.context) and len(s) == 2), 0
    )
    return Recognised(
        family,
        shapes[widening.key][widening.axis] if widening is not None else None,
        context,
        guidance is not None and guidance.key in shapes,
    )


def main_keys(shapes: Shapes) -> dict[str, str]:
    """Return key to the component's own key for a file that holds nothing but a main component.

    Empty for all other files.
    """
    for alone in dict.fromkeys(family.alone for family in FAMILIES):
        if (names := alone(shapes)) is not None:
            return names
    return {}


def family_named(name: str) -> Family | None:
    """Return the architecture of a manifest's name."""
    return next((family for family in FAMILIES if family.name == name), None)


def editing_families() -> Mapping[str, Family]:
    """Return name of a pipeline class to the first architecture that it edits with."""
    found: dict[str, Family] = {}
    for family in reversed(FAMILIES):
        if family.can_edit:
            found.setdefault(family.pipeline_class, family)
    return found


def main_names() -> tuple[str, ...]:
    """Return the names of main components: folders that a pipeline has one of."""
    return tuple(dict.fromkeys(family.main.name for family in FAMILIES))


def main_among(is_there: Callable[[str], bool]) -> str:
    """Return the main component's name in a pipeline; empty where it has none of them.

    Args:
        is_there: Whether the pipeline has a folder of that name.
    """
    return next(filter(is_there, main_names()), "")


def mergeable_names() -> tuple[str, ...]:
    """Return every component that a recipe can name, in the order of the families."""
    parts = (part for family in FAMILIES for part in family.components)
    return tuple(dict.fromkeys(part.name for part in parts if part.is_mergeable))


def component_named(name: str) -> Component | None:
    """Return a component of any architecture; those of one name are the same in what it tells."""
    parts = (family.component(name) for family in FAMILIES)
    return next((part for part in parts if part is not None), None)
