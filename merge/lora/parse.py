"""LoRA files of every form: which keys make up a module, and which weight it changes.

A module's delta is `weight * alpha / rank` times the product of its factors, reshaped to the
weight. How factors multiply is in `delta`, how modules are named in `names`.

Source: Hu et al. 2021, arXiv:2106.09685; for convolutions the kohya convention, where `down`
carries the kernel and `up` is 1x1; LyCORIS for LoCon, LoHa and LoKr.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from merge.family.model import Family
from merge.header.dtypes import element_count
from merge.lora.forms.model import Product
from merge.lora.forms.table import bare, product_of
from merge.lora.metadata import ComponentConfig, read_config
from merge.lora.module import AdapterModule, AdapterTable
from merge.lora.names import Place, Spellings, owner, simplified, spell
from merge.lora.roles import ALPHA, DIFF, DIFF_BIAS, MAGNITUDE, split_role

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]


@dataclass(slots=True)
class _Parts:
    """The keys of one module by role, and those that came second."""

    names: dict[str, str] = field(default_factory=dict)
    extra: list[str] = field(default_factory=list)


def parse_adapters(
    shapes: Shapes,
    metadata: Mapping[str, str],
    targets: Mapping[str, Shapes],
    family: Family,
    config: Mapping[str, Any] | None = None,
) -> AdapterTable:
    """Match every key of a LoRA file with a weight of the target.

    Args:
        shapes: The file's keys and shapes.
        metadata: The file's `__metadata__`; diffusers keeps alphas there.
        targets: Component to its keys and shapes.
        family: The target's architecture.
        config: Parsed `adapter_config.json` of peft, if the LoRA has one.

    Returns:
        The modules, and a problem for each key that fits nothing, so that none is skipped.
    """
    problems: list[str] = []
    try:
        configs = read_config(metadata, targets, config)
    except ValueError as error:
        problems.append(str(error))
        configs = read_config({}, targets)
    groups = _group(shapes, problems)
    builder = _Builder(shapes, targets, family, spell(family, targets), configs)
    modules: dict[Place, AdapterModule] = {}
    stems: dict[Place, str] = {}
    for stem, parts in groups.items():
        try:
            found = list(builder.build(stem, parts))
        except ValueError as error:
            problems.append(str(error))
            continue
        for module in found:
            place = (module.component, module.key)
            if place in modules:
                problems.append(
                    f"{stem}: {module.key} is already changed by {stems[place]}, another spelling "
                    "of it"
                )
                continue
            modules[place] = module
            stems[place] = stem
    for component, stated in configs.items():
        paths = [builder.path(name, key) for name, key in modules if name == component]
        problems += [
            f"{stated.source}: alpha_pattern {pattern!r} fits no module"
            # A pattern without a component's name is for the main one, if it is there at all.
            for pattern in stated.unused_patterns(paths)
            if paths or component == family.main.name
        ]
    source = next((stated.source for stated in configs.values() if stated.alpha is not None), "")
    return AdapterTable(tuple(modules[place] for place in sorted(modules)), tuple(problems), source)


def _group(shapes: Shapes, problems: list[str]) -> dict[str, _Parts]:
    """Gather the keys of each module by its name."""
    groups: dict[str, _Parts] = {}
    for name in sorted(shapes):
        try:
            stem, role = split_role(name)
        except ValueError as error:
            problems.append(f"{name}: {error}")
            continue
        parts = groups.setdefault(stem, _Parts())
        if role in parts.names:
            parts.extra.append(name)
        else:
            parts.names[role] = name
    return groups


@dataclass(frozen=True, slots=True)
class _Builder:
    shapes: Shapes
    targets: Mapping[str, Shapes]
    family: Family
    spellings: Spellings
    configs: Mapping[str, ComponentConfig]

    def build(self, stem: str, parts: _Parts) -> Iterator[AdapterModule]:
        """Make the modules of a name's keys: one for the weight, one for the bias beside it.

        Raises:
            ValueError: it cannot be applied; the message is the problem.
        """
        if parts.extra:
            raise ValueError(
                f"{parts.extra[0]}: the module has this factor twice, in two spellings"
            )
        component, key = self._place(stem)
        names = dict(parts.names)
        bias = names.pop(DIFF_BIAS, None)
        if bias is not None:
            yield self._bias(stem, component, key, bias)
        if names:
            yield self._weight(stem, component, key, names)

    def _bias(self, stem: str, component: str, key: str, name: str) -> AdapterModule:
        bias = f"{key.removesuffix('.weight')}.bias"
        wanted, shape = self.targets[component].get(bias), self.shapes[name]
        if wanted != shape:
            what = f"{bias} has shape {list(wanted)}" if wanted else f"the target has no {bias}"
            raise ValueError(f"{name}: its difference has shape {list(shape)} and {what}")
        factors = ((DIFF, name),)
        return AdapterModule(component, bias, DIFF, factors, 0, None, None, element_count(shape), 1)

    def _weight(self, stem: str, component: str, key: str, names: dict[str, str]) -> AdapterModule:
        alpha_key = names.pop(ALPHA, None)
        magnitude = names.pop(MAGNITUDE, None)
        try:
            product = product_of({role: self.shapes[name] for role, name in names.items()})
        except ValueError as error:
            raise ValueError(f"{stem}: {error}") from None
        if alpha_key is not None and element_count(self.shapes[alpha_key]) != 1:
            raise ValueError(
                f"{alpha_key}: alpha must be one number, not of shape "
                f"{list(self.shapes[alpha_key])}"
            )
        self._fit(stem, component, key, product)
        rows, columns = product.shape[0], element_count(product.shape[1:])
        config, path = self.configs[component], self.path(component, key)
        by_input = False
        if magnitude is not None:
            by_input = self._check_magnitude(magnitude, rows, self.targets[component][key])
        elif config.is_dora:
            raise ValueError(
                f"{stem}: {config.source} says use_dora, and the module has no magnitude"
            )
        # Without a low-rank factor there is no rank, and LyCORIS gives alpha no effect.
        counts = product.rank > 0
        stated = config.find_rank(path)
        if counts and stated is not None and stated != product.rank and config.is_checked:
            raise ValueError(
                f"{stem}: {config.source} says rank {stated}, and its factors have {product.rank}"
            )
        alpha = config.find_alpha(path) if counts and alpha_key is None else None
        return AdapterModule(
            component,
            key,
            product.form,
            tuple((bare(role), name) for role, name in sorted(names.items())),
            product.rank,
            alpha_key if counts else None,
            alpha,
            rows,
            columns,
            magnitude,
            by_input,
            config.is_rank_stabilised,
            () if counts or alpha_key is None else (alpha_key,),
        )

    def path(self, component: str, key: str) -> str:
        """Return a module's whole path; a pattern names its end."""
        part = self.family.component(component)
        inner = part.inner if part is not None else ""
        return inner + key.removesuffix(".weight").removeprefix(inner)

    def _place(self, stem: str) -> Place:
        for name in (stem, simplified(self.family, stem)):
            if name in self.spellings.ambiguous:
                (_, first), (_, second) = self.spellings.ambiguous[name]
                raise ValueError(
                    f"{stem}: {first} and {second} have the same name in this spelling"
                )
            place = self.spellings.places.get(name)
            if place is not None:
                return place
        component = owner(self.family, stem)
        if component not in self.targets:
            raise ValueError(
                f"{stem}: it belongs to {component}, and the target given here has none "
                "(exclude can leave its keys out)"
            )
        raise ValueError(f"{stem}: the target has no weight of this name")

    def _fit(self, stem: str, component: str, key: str, product: Product) -> None:
        """Check the delta's shape against the weight's.

        Raises:
            ValueError: it is another one, and not that of a narrower input.
        """
        weight = self.targets[component][key]
        shape = product.shape
        if product.form == DIFF and shape == weight:
            return
        if len(weight) >= 2 and shape[0] == weight[0]:
            if _squeezed(shape) == _squeezed(weight):
                return
            # Some forms hide the kernel in the columns.
            columns, row = element_count(shape[1:]), element_count(weight[1:])
            kernel = element_count(weight[2:])
            is_hidden = len(shape) == 2 and len(weight) > 2 and product.form in ("loha", "lokr")
            if is_hidden and columns == row:
                return
            shows_kernel = shape[2:] == weight[2:]
            is_narrow = self.family.is_widened(component, key) and columns < row
            is_narrow &= shows_kernel or (is_hidden and columns % kernel == 0)
            if is_narrow:
                return
        raise ValueError(
            f"{stem}: its delta has shape {list(shape)} and {key} has shape {list(weight)}"
        )

    def _check_magnitude(self, name: str, rows: int, weight: Shape) -> bool:
        """Return True where DoRA's norms are of the inputs, False where they are of the rows.

        Raises:
            ValueError: they are neither.
        """
        shape = self.shapes[name]
        count = element_count(shape)
        # peft writes (1, out, 1, 1) for a convolution, LyCORIS means (1, in, 1, 1) by that.
        is_peft = "lora_magnitude" in name
        is_row_wise = bool(shape) and shape[0] == rows
        is_row_wise |= is_peft and len(shape) > 1 and shape[1] == rows
        is_by_input = not is_peft and len(shape) > 1 and shape[0] == 1 and shape[1] == weight[1]
        if is_by_input and count == weight[1] and rows > 1:
            return True
        if is_row_wise and count == rows:
            return False
        raise ValueError(
            f"{name}: DoRA needs one magnitude for each of the {rows} outputs or the {weight[1]} "
            f"inputs, not shape {list(shape)}"
        )


def _squeezed(shape: Shape) -> Shape:
    # A 1x1 convolution and a linear layer hold the same numbers in the same order.
    return (*shape[:2], *(size for size in shape[2:] if size != 1))
