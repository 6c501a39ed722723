"""How tools spell the weight that a LoRA module changes: one table, made from the target's keys.

Kohya writes dots as underscores, which cannot be undone by looking at the name. So every weight of
the target is spelled in every known way, and a module is looked up.

Source: `convert_unet_state_dict_to_peft` and the SD loaders in diffusers, kohya's `lora.py`,
`model_lora_keys_unet` and `model_lora_keys_clip` in ComfyUI's `lora.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from merge.family.model import Component, Family, LoraNames

# Component and key.
Place = tuple[str, str]

# What programs put before a module's path, in any order and number.
_COMPILED = ("_orig_mod.", "_orig_mod_")
_WRAPPERS = ("base_model.model.", "base_model.", "module.")


@dataclass(frozen=True, slots=True)
class Spellings:
    """Every way to name a module of one target.

    Attributes:
        places: Module name to the weight.
        ambiguous: Module name to the two weights that it could be; it is in `places` too.
    """

    places: Mapping[str, Place] = field(default_factory=dict)
    ambiguous: Mapping[str, tuple[Place, Place]] = field(default_factory=dict)


def spell(family: Family, targets: Mapping[str, Iterable[str]]) -> Spellings:
    """Spell every weight of a target in every known way.

    Args:
        family: The target's architecture.
        targets: Component to its keys; only those that end in `.weight` can be adapted.
    """
    places: dict[str, Place] = {}
    ambiguous: dict[str, tuple[Place, Place]] = {}
    for component, names in _adaptable(family):
        for name, key in _spellings(component, names, targets.get(component.name, ())):
            place = (component.name, key)
            other = places.setdefault(name, place)
            if other != place:
                ambiguous[name] = (other, place)
    return Spellings(places, ambiguous)


def simplified(family: Family, name: str) -> str:
    """Return a module's name without the wrappers of training programs, after its component.

    E.g. `unet.mid_block.resnets.0.conv1` for `base_model.model.unet.unet._orig_mod.mid_block...`.
    A name in Kohya's spelling loses what torch.compile put into it, and any dots.
    """
    for part in _COMPILED:
        name = name.replace(part, "")
    if name.startswith(("lora_", "lycoris_")):
        # Some trainers keep the dots after Kohya's prefix: `lora_te1.text_model.encoder...`.
        name = name.replace(".", "_")
        # As does one that trains a wrapper around the text encoder with its own name.
        return name.replace("lora_te_wrapped_transformer_", "lora_te_")
    name = _without(name, _WRAPPERS).removeprefix("text_encoders.")
    main, *others = _adaptable(family)
    for component, names in others:
        for root in (*names.roots, f"{component.name}."):
            if name.startswith(root):
                return f"{component.name}.{_without(name.removeprefix(root), names.inner_roots)}"
    for component, names in others:
        if name.startswith(names.starts):
            return f"{component.name}.{name}"
    return f"{main[0].name}.{_without(name, (*main[1].roots, *_WRAPPERS))}"


def owner(family: Family, name: str) -> str:
    """Return the component that a name says it belongs to; the main one where it says nothing."""
    name = simplified(family, name)
    for component, names in _adaptable(family)[1:]:
        if name.startswith((*names.flat, f"{component.name}.")):
            return component.name
    return family.main.name


def _adaptable(family: Family) -> list[tuple[Component, LoraNames]]:
    return [(part, part.loras) for part in family.components if part.loras is not None]


def _without(name: str, prefixes: tuple[str, ...]) -> str:
    """Take prefixes off as often as they are there."""
    while prefix := next((p for p in prefixes if name.startswith(p)), ""):
        name = name.removeprefix(prefix)
    return name


def _spellings(
    component: Component, names: LoraNames, keys: Iterable[str]
) -> Iterator[tuple[str, str]]:
    for key, paths in sorted(names.paths(keys).items()):
        if not key.endswith(".weight"):
            continue
        for path in paths:
            for prefix in names.flat:
                yield prefix + path.replace(".", "_"), key
            if names.is_bare:
                yield path, key
            yield f"{component.name}.{path}", key
            for part, factors in names.processors.items():
                if path.endswith(f".{part}"):
                    stem = path.removesuffix(f".{part}")
                    yield f"{component.name}.{stem}{names.processor}.{factors}", key
