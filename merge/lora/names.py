"""How tools spell the weight that a LoRA module changes: one table, made from the target's keys.

Kohya writes dots as underscores, which cannot be undone by looking at the name. So every weight of
the target is spelled in every known way, and a module is looked up.

Source: `convert_unet_state_dict_to_peft` and the SD loaders in diffusers, kohya's `lora.py`,
`model_lora_keys_unet` and `model_lora_keys_clip` in ComfyUI's `lora.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from merge.errors import CheckpointError
from merge.keymap import unet_to_ldm

# Component and key.
Place = tuple[str, str]
UNET = "unet"
TEXT_MODEL = "text_model."

_KOHYA_TEXT = {"text_encoder": ("lora_te_", "lora_te1_"), "text_encoder_2": ("lora_te2_",)}
# What a name begins with, and the component that it means; the longer ones first.
_OWNERS = (
    ("lora_te2_", "text_encoder_2"),
    ("text_encoder_2.", "text_encoder_2"),
    ("lora_te1_", "text_encoder"),
    ("lora_te_", "text_encoder"),
    ("text_encoder.", "text_encoder"),
)
# What programs put before a module's path, in any order and number.
_COMPILED = ("_orig_mod.", "_orig_mod_")
_WRAPPERS = ("base_model.model.", "base_model.", "module.")
_UNET_ROOTS = ("model.diffusion_model.", "diffusion_model.", "unet.", "model.")
# ComfyUI's names of the text encoders, after any of its own prefixes.
_ENCODERS = {
    "clip_l.": "text_encoder",
    "te1.": "text_encoder",
    "conditioner.embedders.0.": "text_encoder",
    "cond_stage_model.": "text_encoder",
    "clip_g.": "text_encoder_2",
    "te2.": "text_encoder_2",
    "conditioner.embedders.1.": "text_encoder_2",
    "text_encoder_2.": "text_encoder_2",
    "text_encoder.": "text_encoder",
}
_ENCODER_ROOTS = ("transformer.", "model.", "base_model.model.", "base_model.")
# Early diffusers kept the factors of attention in a processor, named after the projection.
_PROCESSOR_PARTS = {
    "to_q": "to_q_lora",
    "to_k": "to_k_lora",
    "to_v": "to_v_lora",
    "to_out.0": "to_out_lora",
}
_TEXT_PARTS = {
    "q_proj": "to_q_lora",
    "k_proj": "to_k_lora",
    "v_proj": "to_v_lora",
    "out_proj": "to_out_lora",
}


@dataclass(frozen=True, slots=True)
class Spellings:
    """Every way to name a module of one target.

    Attributes:
        places: Module name to the weight.
        ambiguous: Module name to the two weights that it could be; it is in `places` too.
    """

    places: Mapping[str, Place] = field(default_factory=dict)
    ambiguous: Mapping[str, tuple[Place, Place]] = field(default_factory=dict)


def spell(targets: Mapping[str, Iterable[str]]) -> Spellings:
    """Spell every weight of a target in every known way.

    Args:
        targets: Component to its keys; only those that end in `.weight` can be adapted.
    """
    places: dict[str, Place] = {}
    ambiguous: dict[str, tuple[Place, Place]] = {}
    for component, keys in targets.items():
        names = _unet_names(keys) if component == UNET else _text_names(component, keys)
        for name, key in names:
            place = (component, key)
            other = places.setdefault(name, place)
            if other != place:
                ambiguous[name] = (other, place)
    return Spellings(places, ambiguous)


def simplified(name: str) -> str:
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
    for prefix, component in _ENCODERS.items():
        if name.startswith(prefix):
            return f"{component}.{_without(name.removeprefix(prefix), _ENCODER_ROOTS)}"
    if name.startswith(TEXT_MODEL):
        return f"text_encoder.{name}"
    return f"{UNET}.{_without(name, (*_UNET_ROOTS, *_WRAPPERS))}"


def owner(name: str) -> str:
    """Return the text encoder that a name says it belongs to, or `unet`."""
    name = simplified(name)
    return next((component for prefix, component in _OWNERS if name.startswith(prefix)), UNET)


def _without(name: str, prefixes: tuple[str, ...]) -> str:
    """Take prefixes off as often as they are there."""
    while prefix := next((p for p in prefixes if name.startswith(p)), ""):
        name = name.removeprefix(prefix)
    return name


def _unet_names(keys: Iterable[str]) -> Iterator[tuple[str, str]]:
    keys = sorted(keys)
    try:
        ldm = unet_to_ldm(keys)
    except CheckpointError:
        # A UNet with blocks of its own has no single-file names, so no LoRA can use them.
        ldm = {}
    for key in keys:
        if not key.endswith(".weight"):
            continue
        paths = [key.removesuffix(".weight")]
        if key in ldm:
            paths.append(ldm[key].removesuffix(".weight"))
        for path in dict.fromkeys(paths):
            flat = path.replace(".", "_")
            for name in (f"lora_unet_{flat}", f"lycoris_{flat}", path, f"unet.{path}"):
                yield name, key
        for path in (paths[0], *_parts(paths[0], _PROCESSOR_PARTS, ".processor")):
            yield f"unet.{path}", key


def _text_names(component: str, keys: Iterable[str]) -> Iterator[tuple[str, str]]:
    for key in sorted(keys):
        if not key.endswith(".weight"):
            continue
        path = key.removesuffix(".weight")
        paths = [path]
        if not path.startswith("text_projection"):
            # transformers from 5.6 on leaves `text_model.` out, and older LoRAs have it.
            inner = path.removeprefix(TEXT_MODEL)
            paths = [inner, TEXT_MODEL + inner]
        for path in paths:
            for prefix in _KOHYA_TEXT.get(component, ()):
                yield prefix + path.replace(".", "_"), key
            for name in (path, *_parts(path, _TEXT_PARTS, "")):
                yield f"{component}.{name}", key


def _parts(path: str, table: Mapping[str, str], inside: str) -> Iterator[str]:
    for part, name in table.items():
        if path.endswith(f".{part}"):
            yield f"{path.removesuffix(f'.{part}')}{inside}.{name}"
