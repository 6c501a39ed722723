"""What diffusers writes about a LoRA beside its tensors: JSON under `lora_adapter_metadata`.

Source: `_pack_dict_with_prefix` and `LORA_ADAPTER_METADATA_KEY` in diffusers; the fields are those
of peft's `LoraConfig`, each after its component, e.g. `unet.lora_alpha`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

KEY = "lora_adapter_metadata"


@dataclass(frozen=True, slots=True)
class ComponentConfig:
    """What the metadata says about one component.

    Attributes:
        alpha: Of every module that no pattern names; None when nothing is stated.
        patterns: End of a module's path to its alpha.
        is_rank_stabilised: Whether alpha is divided by the root of the rank.
        is_dora: Whether every module must have a magnitude.
    """

    alpha: float | None = None
    patterns: Mapping[str, float] = field(default_factory=dict)
    is_rank_stabilised: bool = False
    is_dora: bool = False

    def find_alpha(self, path: str) -> float | None:
        """Return the alpha of a module; None when nothing is stated."""
        for pattern, alpha in self.patterns.items():
            if _covers(pattern, path):
                return alpha
        return self.alpha

    def unused_patterns(self, paths: Iterable[str]) -> Iterator[str]:
        """Return the patterns that name none of these modules."""
        paths = list(paths)
        for pattern in self.patterns:
            if not any(_covers(pattern, path) for path in paths):
                yield pattern


def read_config(
    metadata: Mapping[str, str], components: Iterable[str]
) -> dict[str, ComponentConfig]:
    """Read what the metadata says about each component.

    Args:
        metadata: The file's `__metadata__`.
        components: E.g. `unet`; a field without a component's name holds for all of them.

    Raises:
        ValueError: it is no JSON of this kind.
    """
    text = metadata.get(KEY)
    if text is None:
        return {component: ComponentConfig() for component in components}
    try:
        tree: Any = json.loads(text)
        return {component: _component(tree, component) for component in components}
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError(f"{KEY} cannot be read: {error}") from None


def _component(tree: Any, component: str) -> ComponentConfig:
    def get(name: str) -> Any:
        return tree.get(f"{component}.{name}", tree.get(name))

    alpha = get("lora_alpha")
    patterns = get("alpha_pattern") or {}
    return ComponentConfig(
        None if alpha is None else float(alpha),
        {str(name): float(value) for name, value in patterns.items()},
        bool(get("use_rslora")),
        bool(get("use_dora")),
    )


def _covers(pattern: str, path: str) -> bool:
    """Return True when a pattern names the end of a module's path, as in peft."""
    return path == pattern or path.endswith(f".{pattern}")
