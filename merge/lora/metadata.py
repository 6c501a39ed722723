"""What is written about a LoRA beside its tensors: alphas, ranks, and what else counts.

Three places, the first that is there counts: `lora_adapter_metadata`, JSON in the file's metadata,
where diffusers keeps peft's `LoraConfig`, each field after its component, e.g. `unet.lora_alpha`;
`adapter_config.json`, the same fields in a file of its own, as peft writes it; plain numbers in the
file's metadata, such as `network_alpha`, as trainers do.

Source: `_pack_dict_with_prefix` and `LORA_ADAPTER_METADATA_KEY` in diffusers; `LoraConfig` and
`get_pattern_key` in peft; `ss_network_alpha` of kohya's trainers.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

KEY = "lora_adapter_metadata"
CONFIG_NAME = "adapter_config.json"
_FLAT_ALPHAS = ("lora_alpha", "network_alpha", "ss_network_alpha", "alpha")
_FLAT_RANKS = ("lora_rank", "network_dim", "ss_network_dim", "rank", "r")
# Of peft's LoraConfig, for a config that leaves it out.
_DEFAULT_ALPHA = 8.0
# A pattern is a regular expression that comes with the model.
_MOST_PATTERN = 200
# Starts that change the base model, so that the factors are relative to another one.
_MOVED_BASES = ("pissa", "olora", "corda", "loftq")
_PLAIN = {"LORA": "lora_alpha", "LOHA": "alpha", "LOKR": "alpha"}


@dataclass(frozen=True, slots=True)
class ComponentConfig:
    """What is stated about one component.

    Attributes:
        source: Where it is stated, for messages.
        alpha: Of every module that no pattern names; None when nothing is stated.
        patterns: Pattern of modules' paths to their alpha.
        rank: Of every module that no pattern names; None when nothing is stated.
        rank_patterns: Pattern of modules' paths to their rank.
        is_rank_stabilised: Whether alpha is divided by the root of the rank.
        is_dora: Whether every module must have a magnitude.
    """

    source: str = KEY
    alpha: float | None = None
    patterns: Mapping[str, float] = field(default_factory=dict)
    rank: int | None = None
    rank_patterns: Mapping[str, int] = field(default_factory=dict)
    is_rank_stabilised: bool = False
    is_dora: bool = False

    @property
    def is_checked(self) -> bool:
        """Return True where the ranks that are stated must be those of the factors."""
        # diffusers writes one rank for a file whose modules may have several.
        return self.source != KEY

    def find_alpha(self, path: str) -> float | None:
        """Return the alpha of a module; None when nothing is stated."""
        return next((a for p, a in self.patterns.items() if _covers(p, path)), self.alpha)

    def find_rank(self, path: str) -> int | None:
        """Return the rank of a module; None when nothing is stated."""
        return next((r for p, r in self.rank_patterns.items() if _covers(p, path)), self.rank)

    def unused_patterns(self, paths: Iterable[str]) -> Iterator[str]:
        """Return the patterns of alphas that name none of these modules."""
        paths = list(paths)
        for pattern in self.patterns:
            if not any(_covers(pattern, path) for path in paths):
                yield pattern


def read_config(
    metadata: Mapping[str, str],
    components: Iterable[str],
    config: Mapping[str, Any] | None = None,
) -> dict[str, ComponentConfig]:
    """Read what is stated about each component.

    Args:
        metadata: The file's `__metadata__`.
        components: E.g. `unet`; a field without a component's name holds for all of them.
        config: Parsed `adapter_config.json`, if the LoRA has one.

    Raises:
        ValueError: it cannot be read, or says that the LoRA is of a kind that cannot be added.
    """
    text = metadata.get(KEY)
    if text is None and config is None:
        flat = _flat(metadata)
        return dict.fromkeys(components, flat)
    source = KEY if text is not None else CONFIG_NAME
    try:
        tree: Any = json.loads(text) if text is not None else config
        found = {component: _component(tree, component, source) for component in components}
    except (
        ValueError,
        TypeError,
        AttributeError,
        ArithmeticError,
        RecursionError,
        re.error,
    ) as error:
        raise ValueError(f"{source} cannot be read: {error}") from None
    if text is None:
        assert config is not None
        _refuse_kinds(config)
    return found


def _component(tree: Any, component: str, source: str) -> ComponentConfig:
    def get(name: str) -> Any:
        return tree.get(f"{component}.{name}", tree.get(name))

    is_file = source == CONFIG_NAME
    kind = str(tree.get("peft_type") or "LORA") if is_file else "LORA"
    alpha = get(_PLAIN.get(kind, "lora_alpha"))
    if alpha is None and is_file:
        alpha = _DEFAULT_ALPHA
    rank = get("r")
    return ComponentConfig(
        source,
        None if alpha is None else float(alpha),
        {_pattern(name): float(v) for name, v in (get("alpha_pattern") or {}).items()},
        None if rank is None else int(rank),
        {_pattern(name): int(v) for name, v in (get("rank_pattern") or {}).items()},
        bool(get("use_rslora")),
        bool(get("use_dora")),
    )


def _refuse_kinds(config: Mapping[str, Any]) -> None:
    """Refuse what a plain sum of the factors would get wrong.

    Raises:
        ValueError: the message names the field.
    """
    kind = str(config.get("peft_type") or "LORA")
    if kind not in _PLAIN:
        raise ValueError(f"{CONFIG_NAME}: peft_type {kind} is not supported; LORA is")
    start = str(config.get("init_lora_weights") or "")
    if start.lower().startswith(_MOVED_BASES):
        raise ValueError(
            f"{CONFIG_NAME}: init_lora_weights {start} changes the base model, so that the "
            "factors do not fit another one; save it as a plain LoRA "
            "(path_initial_model_for_weight_conversion in peft)"
        )
    for name in ("fan_in_fan_out", "layer_replication", "target_parameters"):
        if config.get(name):
            raise ValueError(f"{CONFIG_NAME}: {name} {config[name]!r} is not supported")


def _flat(metadata: Mapping[str, str]) -> ComponentConfig:
    """Read plain numbers of trainers."""
    alpha = _first(metadata, _FLAT_ALPHAS)
    rank = _first(metadata, _FLAT_RANKS)
    if alpha is None:
        return ComponentConfig()
    name, value = alpha
    # Trainers may give convolutions another rank, so theirs is no claim about every module.
    is_claim = rank is not None and not rank[0].startswith("ss_")
    return ComponentConfig(
        f"the metadata's {name}",
        value,
        rank=int(rank[1]) if rank is not None and is_claim else None,
    )


def _first(metadata: Mapping[str, str], names: Iterable[str]) -> tuple[str, float] | None:
    for name in names:
        try:
            value = float(metadata.get(name, ""))
        except ValueError:
            continue
        if math.isfinite(value) and value > 0:
            return name, value
    return None


def _pattern(text: str) -> str:
    if len(text) > _MOST_PATTERN:
        raise ValueError(f"the pattern {text[:40]!r} is too long")
    re.compile(text)
    return text


def _covers(pattern: str, path: str) -> bool:
    """Return True when a pattern names a module, or the end of its path, as in peft."""
    if path == pattern or path.endswith(f".{pattern}"):
        return True
    return re.match(rf"(.*\.)?({pattern})$", path) is not None
