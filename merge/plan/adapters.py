"""The LoRAs of a recipe: every module matched with a weight, its alpha read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from merge.errors import CheckpointError
from merge.header.model import TensorSpec
from merge.lora.module import AdapterModule, AdapterTable
from merge.lora.parse import parse_adapters
from merge.plan.findings import Findings
from merge.plan.model import LeftOut
from merge.plan.opening import Opened, OpenedSources
from merge.plan.patterns import match_exclude
from merge.reader.checkpoint import prefetch_scalars, read_scalar
from merge.recipe.schema import Recipe

# Component and key.
Place = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Adapter:
    """One module of a LoRA and its alpha."""

    module: AdapterModule
    alpha: float


@dataclass
class AdapterReader:
    """Matches LoRAs with the target's components.

    Attributes:
        recipe: For its exclusions.
        components: That the recipe merges.
        sources: For the target's keys.
        found: Filled by `read`.
    """

    recipe: Recipe
    components: tuple[str, ...]
    sources: OpenedSources
    found: Findings

    def read(self, opened: Opened) -> dict[Place, Adapter]:
        """Return a LoRA's modules by the weight that they change."""
        label = f"{opened.role} ({opened.model.label})"
        table = self._parse(opened)
        self.found.problems.extend([f"{label}: {problem}" for problem in table.problems])
        if not table.modules:
            self.found.problem(f"{label}: none of its keys fits the target")
        self._prefetch_alphas(opened, table)
        adapters: dict[Place, Adapter] = {}
        for module in table.modules:
            alpha = self._alpha(opened, module)
            if alpha is None:
                continue
            if not math.isfinite(alpha) or alpha == 0:
                name = module.alpha_key or table.source
                self.found.problem(f"{opened.role}: {name} is {alpha}, no usable alpha")
                continue
            adapters[module.component, module.key] = Adapter(module, alpha)
        self._check_components(label, adapters)
        self._check_dora(label, adapters)
        self._tell_scales(label, table)
        return adapters

    def _tell_scales(self, label: str, table: AdapterTable) -> None:
        """Say where scales are from that no tensor states, and warn where nothing does."""
        scaled = [m for m in table.modules if m.rank]
        stated = sum(m.alpha is not None for m in scaled)
        silent = sum(m.alpha is None and m.alpha_key is None for m in scaled)
        if stated:
            self.found.notes.append(
                f"{label}: the scale of {stated} of {len(scaled)} LoRA modules is from "
                f"{table.source}"
            )
        if silent:
            self.found.warnings.append(
                f"{label}: {silent} of {len(scaled)} LoRA modules state no alpha, so their scale "
                "is 1; if its trainer used another one, set its weight to alpha / rank"
            )

    def _parse(self, opened: Opened) -> AdapterTable:
        """Match the keys, but for those that fit nothing and are excluded by their own name."""
        checkpoint, targets = opened.checkpoint, self._targets()
        config = opened.model.adapter_config
        shapes = checkpoint.shapes
        family = self.sources.family
        table = parse_adapters(shapes, checkpoint.metadata, targets, family, config)
        used = {name for module in table.modules for name in module.names}
        excluded = {
            name: pattern
            for name in shapes
            if name not in used and (pattern := match_exclude(name, self.recipe.exclude))
        }
        self._check_idle(opened, used, set(excluded.values()))
        if not excluded:
            return table
        self.found.left_out.extend(
            LeftOut(opened.role, name, f"excluded by {pattern!r}")
            for name, pattern in sorted(excluded.items())
        )
        rest = {name: shape for name, shape in shapes.items() if name not in excluded}
        return parse_adapters(rest, checkpoint.metadata, targets, family, config)

    def _check_idle(self, opened: Opened, used: set[str], effective: set[str]) -> None:
        """Refuse patterns that name keys of modules, where only weights can be excluded."""
        targets, qualified = self._targets().items(), self.sources.family.qualified
        weights = {qualified(name, key) for name, keys in targets for key in keys}
        for pattern in self.recipe.exclude:
            if pattern in effective or any(match_exclude(key, [pattern]) for key in weights):
                continue
            if name := next((key for key in sorted(used) if match_exclude(key, [pattern])), None):
                self.found.problem(
                    f"exclude: {pattern!r} names {name} of {opened.role}; name the weight that it "
                    "changes, as the target spells it"
                )

    def _targets(self) -> Mapping[str, Mapping[str, tuple[int, ...]]]:
        return {name: part.shapes for name, part in self.sources.target.parts.items()}

    def _prefetch_alphas(self, opened: Opened, table: AdapterTable) -> None:
        specs: dict[int, list[TensorSpec]] = {}
        for module in table.modules:
            if module.alpha_key is not None:
                index, spec = opened.checkpoint.tensors[module.alpha_key]
                specs.setdefault(index, []).append(spec)
        for index, scalars in specs.items():
            prefetch_scalars(opened.checkpoint.files[index], scalars)

    def _alpha(self, opened: Opened, module: AdapterModule) -> float | None:
        if module.alpha_key is None:
            return module.divisor if module.alpha is None else module.alpha
        index, spec = opened.checkpoint.tensors[module.alpha_key]
        try:
            return read_scalar(opened.checkpoint.files[index], spec)
        except CheckpointError as error:
            self.found.problem(f"{opened.role}: {error.message}")
            return None

    def _check_components(self, label: str, adapters: Mapping[Place, Adapter]) -> None:
        """Refuse modules of components that the recipe does not merge."""
        counts: dict[str, int] = {}
        for component, key in adapters:
            if component not in self.components and not match_exclude(
                f"{component}.{key}", self.recipe.exclude
            ):
                counts[component] = counts.get(component, 0) + 1
        for component, count in sorted(counts.items()):
            merged = ", ".join([*self.components, component])
            self.found.problem(
                f"{label}: {count} of its modules belong to {component}, which is not merged "
                f"(components=[{merged}] merges it, exclude=['{component}.*'] leaves them out)"
            )

    def _check_dora(self, label: str, adapters: Mapping[Place, Adapter]) -> None:
        if self.sources.base is not None:
            return
        keys = [key for (_, key), adapter in adapters.items() if adapter.module.magnitude]
        if keys:
            self.found.problem(
                f"{label}: {len(keys)} of its modules are DoRA ({keys[0]}), which is not additive: "
                "it rescales the weight that it was trained on; name that model as models.base"
            )
