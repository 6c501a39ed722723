"""LoRA files: which keys make up a module, which weight it changes, and by what scale.

A module is a pair of factors, `down` of shape `(rank, in[, kh, kw])` and `up` of shape
`(out, rank[, 1, 1])`. Its delta is `weight * alpha / rank * up @ down`, reshaped to the weight.

Two spellings are read: kohya's over diffusers block names, which the published LCM-LoRAs use
(`lora_unet_mid_block_resnets_0_conv1.lora_down.weight`, `.lora_up.weight`, `.alpha`), and the one
of peft in diffusers (`unet.mid_block.resnets.0.conv1.lora_A.weight`, `.lora_B.weight`).

Source: Hu et al. 2021, arXiv:2106.09685; for convolutions the kohya convention, where `down`
carries the kernel and `up` is 1x1.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from merge.header import element_count
from merge.keymap import CONV_IN, kohya_stems

_ROLES = {
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".alpha": "alpha",
}
# Fragments of keys that are read by no rule here, and why.
_REFUSED: tuple[tuple[str, str], ...] = (
    ("dora_scale", "DoRA is not additive: it rescales the weight that it is applied to"),
    ("lora_magnitude_vector", "DoRA is not additive: it rescales the weight it is applied to"),
    ("hada_", "LoHa is not supported"),
    ("lokr_", "LoKr is not supported"),
    ("lora_mid", "LoCon with a middle factor is not supported"),
    (".lora.down.", "this old diffusers spelling is not supported"),
    (".lora.up.", "this old diffusers spelling is not supported"),
    ("_lora.down.", "this old diffusers spelling is not supported"),
    ("_lora.up.", "this old diffusers spelling is not supported"),
    ("lora_te", "it belongs to a text encoder, and only the UNet is merged"),
    ("text_encoder", "it belongs to a text encoder, and only the UNet is merged"),
    ("lora_unet_input_blocks", "SGM block names are not supported"),
    ("lora_unet_output_blocks", "SGM block names are not supported"),
    ("lora_unet_middle_block", "SGM block names are not supported"),
    ("diffusion_model.", "the diffusion_model. spelling is not supported"),
)
_LORA_FRAGMENTS = (
    *(suffix for suffix in _ROLES if suffix != ".alpha"),
    *("dora_scale", "hada_w", "lokr_w", ".lora.down.", ".lora.up.", "_lora.down.", "_lora.up."),
)


@dataclass(frozen=True, slots=True)
class LoraModule:
    """One adapted weight.

    Attributes:
        key: The UNet key that it changes.
        down: Key of the `(rank, in[, kh, kw])` factor in the file.
        up: Key of the `(out, rank[, 1, 1])` factor in the file.
        rank: Inner dimension.
        alpha_key: Key of the scalar alpha in the file, if there is one.
        alpha: Alpha stated in the file's metadata; None: in `alpha_key`, or scale 1.
        channels: Input channels that it covers, fewer than the weight's for a 4-channel
            `conv_in`; 0 when it covers all.
    """

    key: str
    down: str
    up: str
    rank: int
    alpha_key: str | None
    alpha: float | None
    channels: int


@dataclass(frozen=True, slots=True)
class LoraTable:
    """All of a LoRA file.

    Attributes:
        modules: In the order of their keys.
        problems: One line for each key or module that cannot be applied.
    """

    modules: tuple[LoraModule, ...]
    problems: tuple[str, ...]


@dataclass(slots=True)
class _Parts:
    down: str = ""
    up: str = ""
    alpha: str | None = None
    extra: list[str] = field(default_factory=list)


def is_lora(names: Iterable[str]) -> bool:
    """Return True when the keys are those of an adapter of any kind, supported or not."""
    return any(fragment in name for name in names for fragment in _LORA_FRAGMENTS)


def parse_lora(
    shapes: Mapping[str, tuple[int, ...]],
    metadata: Mapping[str, str],
    target: Mapping[str, tuple[int, ...]],
) -> LoraTable:
    """Match every key of a LoRA file with a weight of the target UNet.

    Args:
        shapes: The file's keys and shapes.
        metadata: The file's `__metadata__`; peft keeps alphas there.
        target: The UNet's keys and shapes.

    Returns:
        The modules, and a problem for each key that fits nothing, so that none is skipped.
    """
    groups: dict[str, _Parts] = {}
    problems: list[str] = []
    for name in sorted(shapes):
        suffix = next((suffix for suffix in _ROLES if name.endswith(suffix)), None)
        reason = next((why for fragment, why in _REFUSED if fragment in name), "")
        if suffix is None or reason:
            problems.append(f"{name}: {reason or 'not a LoRA key that is known'}")
            continue
        parts = groups.setdefault(name.removesuffix(suffix), _Parts())
        role = _ROLES[suffix]
        if getattr(parts, role):
            parts.extra.append(name)
        setattr(parts, role, name)
    try:
        stems = kohya_stems(target)
    except ValueError as error:
        return LoraTable((), (*problems, str(error)))
    alphas = _MetadataAlphas.parse(metadata, problems)
    modules: dict[str, LoraModule] = {}
    for stem, parts in groups.items():
        module = _build_module(stem, parts, shapes, target, stems, alphas)
        if isinstance(module, str):
            problems.append(module)
        elif module.key in modules:
            problems.append(f"{stem}: {module.key} is already changed by {modules[module.key].up}")
        else:
            modules[module.key] = module
    paths = [key.removesuffix(".weight") for key in modules]
    problems += [
        f"lora_adapter_metadata: alpha_pattern {pattern!r} fits no module"
        for pattern in alphas.patterns
        if not any(alphas.covers(pattern, path) for path in paths)
    ]
    return LoraTable(tuple(modules[key] for key in sorted(modules)), tuple(problems))


def _build_module(
    stem: str,
    parts: _Parts,
    shapes: Mapping[str, tuple[int, ...]],
    target: Mapping[str, tuple[int, ...]],
    stems: Mapping[str, str],
    alphas: _MetadataAlphas,
) -> LoraModule | str:
    if parts.extra:
        return f"{parts.extra[0]}: the module has this factor twice, in two spellings"
    path = stem.removeprefix("unet.")
    key = stems.get(stem, f"{path}.weight")
    if key not in target:
        return f"{stem}: the target has no weight of this name"
    if not parts.down or not parts.up:
        return f"{stem}: it has only one of its two factors"
    down, up, weight = shapes[parts.down], shapes[parts.up], target[key]
    if len(down) < 2 or len(up) < 2 or not 0 < down[0] == up[1] or element_count(up[2:]) != 1:
        return f"{stem}: factors {list(up)} and {list(down)} do not multiply"
    if parts.alpha is not None and element_count(shapes[parts.alpha]) != 1:
        return f"{parts.alpha}: alpha must be one number, not of shape {list(shapes[parts.alpha])}"
    fits = len(weight) >= 2 and up[0] == weight[0] and _kernel(down) == _kernel(weight)
    narrow = key == CONV_IN and down[1] < weight[1]
    if not fits or (down[1] != weight[1] and not narrow):
        return (
            f"{stem}: its delta has shape {[up[0], *down[1:]]} and {key} has shape {list(weight)}"
        )
    rank = down[0]
    alpha = None if parts.alpha else alphas.find(key.removesuffix(".weight"))
    return LoraModule(key, parts.down, parts.up, rank, parts.alpha, alpha, down[1] if narrow else 0)


def _kernel(shape: tuple[int, ...]) -> tuple[int, ...]:
    # A 1x1 convolution and a linear layer hold the same numbers in the same order.
    return tuple(size for size in shape[2:] if size != 1)


@dataclass(frozen=True, slots=True)
class _MetadataAlphas:
    """Alphas that diffusers keeps as JSON under `lora_adapter_metadata`."""

    default: float | None = None
    patterns: Mapping[str, float] = field(default_factory=dict)

    @staticmethod
    def parse(metadata: Mapping[str, str], problems: list[str]) -> _MetadataAlphas:
        text = metadata.get("lora_adapter_metadata")
        if text is None:
            return _MetadataAlphas()
        try:
            tree: Any = json.loads(text)
            problems += [
                f"lora_adapter_metadata: {flag} is not supported"
                for flag in ("use_dora", "use_rslora")
                if tree.get(f"unet.{flag}", tree.get(flag))
            ]
            alpha = tree.get("unet.lora_alpha", tree.get("lora_alpha"))
            patterns = tree.get("unet.alpha_pattern", tree.get("alpha_pattern")) or {}
            return _MetadataAlphas(
                None if alpha is None else float(alpha),
                {str(name): float(value) for name, value in patterns.items()},
            )
        except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            problems.append(f"lora_adapter_metadata cannot be read: {error}")
            return _MetadataAlphas()

    def find(self, path: str) -> float | None:
        """Return the alpha for a module; None when nothing is stated."""
        for pattern, alpha in self.patterns.items():
            if self.covers(pattern, path):
                return alpha
        return self.default

    @staticmethod
    def covers(pattern: str, path: str) -> bool:
        """Return True when a pattern names the end of a module's path, as in peft."""
        return path == pattern or path.endswith(f".{pattern}")
