"""LoRA files of every form: which keys make up a module, and which weight it changes.

A module's delta is `weight * alpha / rank` times the product of its factors, reshaped to the
weight. How factors multiply is in `delta`, how modules are named in `names`.

Source: Hu et al. 2021, arXiv:2106.09685; for convolutions the kohya convention, where `down`
carries the kernel and `up` is 1x1; LyCORIS for LoCon, LoHa and LoKr.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from merge.header import element_count
from merge.keymap import CONV_IN
from merge.lora.forms import Product, product_of
from merge.lora.metadata import KEY, ComponentConfig, read_config
from merge.lora.module import AdapterModule, AdapterTable
from merge.lora.names import TEXT_MODEL, UNET, Place, Spellings, owner, spell
from merge.lora.roles import ALPHA, MAGNITUDE, split_role

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]

# Width of the text that cross-attention reads, and who reads such a text.
_WIDTHS = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 2048: "SDXL"}


@dataclass(slots=True)
class _Parts:
    """The keys of one module by role, and those that came second."""

    names: dict[str, str] = field(default_factory=dict)
    extra: list[str] = field(default_factory=list)


def parse_adapters(
    shapes: Shapes, metadata: Mapping[str, str], targets: Mapping[str, Shapes]
) -> AdapterTable:
    """Match every key of a LoRA file with a weight of the target.

    Args:
        shapes: The file's keys and shapes.
        metadata: The file's `__metadata__`; diffusers keeps alphas there.
        targets: Component, e.g. `unet`, to its keys and shapes.

    Returns:
        The modules, and a problem for each key that fits nothing, so that none is skipped.
    """
    problems: list[str] = []
    try:
        configs = read_config(metadata, targets)
    except ValueError as error:
        problems.append(str(error))
        configs = read_config({}, targets)
    groups = _group(shapes, problems)
    builder = _Builder(shapes, targets, spell(targets), configs)
    modules: dict[Place, AdapterModule] = {}
    stems: dict[Place, str] = {}
    strange = 0
    for stem, parts in groups.items():
        try:
            module = builder.build(stem, parts)
        except ValueError as error:
            problems.append(str(error))
            strange += 1
            continue
        place = (module.component, module.key)
        if place in modules:
            problems.append(
                f"{stem}: {module.key} is already changed by {stems[place]}, another spelling of it"
            )
            continue
        modules[place] = module
        stems[place] = stem
    for component, config in configs.items():
        paths = [_path(name, key) for name, key in modules if name == component]
        problems += [
            f"{KEY}: alpha_pattern {pattern!r} fits no module"
            # A pattern without a component's name is for the UNet, if it is there at all.
            for pattern in config.unused_patterns(paths)
            if paths or component == UNET
        ]
    if strange and (line := _other_family(groups, shapes, targets.get(UNET, {}))):
        problems.insert(0, line)
    return AdapterTable(tuple(modules[place] for place in sorted(modules)), tuple(problems))


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
    spellings: Spellings
    configs: Mapping[str, ComponentConfig]

    def build(self, stem: str, parts: _Parts) -> AdapterModule:
        """Make a module of its keys.

        Raises:
            ValueError: it cannot be applied; the message is the problem.
        """
        if parts.extra:
            raise ValueError(
                f"{parts.extra[0]}: the module has this factor twice, in two spellings"
            )
        component, key = self._place(stem)
        names = dict(parts.names)
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
        channels = self._fit(stem, component, key, product)
        rows, columns = product.shape[0], element_count(product.shape[1:])
        config = self.configs[component]
        if magnitude is not None:
            self._check_magnitude(magnitude, rows)
        elif config.is_dora:
            raise ValueError(f"{stem}: {KEY} says use_dora, and the module has no magnitude")
        factors = tuple((_bare(role), name) for role, name in sorted(names.items()))
        # Without a low-rank factor there is no rank, and LyCORIS gives alpha no effect.
        counts = product.rank > 0
        alpha = config.find_alpha(_path(component, key)) if counts and alpha_key is None else None
        return AdapterModule(
            component,
            key,
            product.form,
            factors,
            product.rank,
            alpha_key if counts else None,
            alpha,
            rows,
            columns,
            channels,
            magnitude,
            config.is_rank_stabilised,
            () if counts or alpha_key is None else (alpha_key,),
        )

    def _place(self, stem: str) -> Place:
        if stem in self.spellings.ambiguous:
            (_, first), (_, second) = self.spellings.ambiguous[stem]
            raise ValueError(f"{stem}: {first} and {second} have the same name in this spelling")
        place = self.spellings.places.get(stem)
        if place is not None:
            return place
        component = owner(stem)
        if component not in self.targets:
            raise ValueError(
                f"{stem}: it belongs to {component}, and the target given here has none "
                "(exclude can leave its keys out)"
            )
        raise ValueError(f"{stem}: the target has no weight of this name")

    def _fit(self, stem: str, component: str, key: str, product: Product) -> int:
        """Return how many input channels are covered where these are not all, else 0."""
        weight = self.targets[component][key]
        shape = product.shape
        if len(weight) >= 2 and shape[0] == weight[0]:
            if _squeezed(shape) == _squeezed(weight):
                return 0
            # Some forms hide the kernel in the columns.
            columns, row = element_count(shape[1:]), element_count(weight[1:])
            kernel = element_count(weight[2:])
            is_hidden = len(shape) == 2 and len(weight) > 2 and product.form in ("loha", "lokr")
            if is_hidden and columns == row:
                return 0
            shows_kernel = shape[2:] == weight[2:]
            is_narrow = (component, key) == (UNET, CONV_IN) and columns < row
            is_narrow &= shows_kernel or (is_hidden and columns % kernel == 0)
            if is_narrow:
                return columns // kernel
        raise ValueError(
            f"{stem}: its delta has shape {list(shape)} and {key} has shape {list(weight)}"
        )

    def _check_magnitude(self, name: str, rows: int) -> None:
        shape = self.shapes[name]
        # peft writes (1, out, 1, 1) for a convolution, LyCORIS means (1, in, 1, 1) by that.
        is_row_wise = bool(shape) and shape[0] == rows
        is_row_wise |= "lora_magnitude" in name and len(shape) > 1 and shape[1] == rows
        if is_row_wise and element_count(shape) == rows:
            return
        if shape and shape[0] == 1 and "dora_scale" in name:
            raise ValueError(
                f"{name}: a DoRA scale of shape {list(shape)} is one for each input, and only one "
                f"for each of the {rows} outputs is supported"
            )
        raise ValueError(
            f"{name}: DoRA needs one magnitude for each of the {rows} outputs, not shape "
            f"{list(shape)}"
        )


def _bare(role: str) -> str:
    return role.removeprefix("hada_").removeprefix("lokr_")


def _path(component: str, key: str) -> str:
    """Return a module's whole path; a pattern names its end."""
    path = key.removesuffix(".weight")
    return path if component == UNET else TEXT_MODEL + path.removeprefix(TEXT_MODEL)


def _squeezed(shape: Shape) -> Shape:
    # A 1x1 convolution and a linear layer hold the same numbers in the same order.
    return (*shape[:2], *(size for size in shape[2:] if size != 1))


def _other_family(stems: Mapping[str, _Parts], shapes: Shapes, target: Shapes) -> str:
    """Say so when the LoRA was made for another kind of Stable Diffusion."""
    theirs = _context(
        (stem, shapes[parts.names["down"]])
        for stem, parts in stems.items()
        if "down" in parts.names
    )
    ours = _context((_path(UNET, key), shape) for key, shape in target.items())
    if not theirs or not ours or theirs == ours:
        return ""
    words = [_WIDTHS.get(width, f"width {width}") for width in (theirs, ours)]
    return (
        f"it looks like a LoRA for {words[0]}, and the target is {words[1]}: its cross-attention "
        f"reads a text of width {theirs}, the target's one of {ours}"
    )


def _context(weights: Iterable[tuple[str, Shape]]) -> int:
    return next(
        (
            shape[1]
            for name, shape in weights
            if "attn2" in name and name.endswith(("to_k", "to_v", "to_k_lora", "to_v_lora"))
            if len(shape) > 1
        ),
        0,
    )
