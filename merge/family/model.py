"""What an architecture is, as data: its components, key names, blocks, rules and words."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]


@dataclass(frozen=True, slots=True)
class LoraNames:
    """How LoRA files name the modules of a component.

    Attributes:
        flat: Prefixes of Kohya's names, whose dots became underscores; the first one is written.
        roots: What tools put before a module's path instead of the component's name.
        inner_roots: What may follow one of these.
        starts: Beginnings of a path that tell the component by themselves.
        paths: All keys of the component to each one's paths, in every spelling; without `.weight`.
        processors: Module to the name of its factors in early diffusers.
        processor: What stands before that name.
        is_bare: True where the path alone means this component.
    """

    flat: tuple[str, ...]
    paths: Callable[[Iterable[str]], Mapping[str, tuple[str, ...]]]
    roots: tuple[str, ...] = ()
    inner_roots: tuple[str, ...] = ()
    starts: tuple[str, ...] = ()
    processors: Mapping[str, str] = field(default_factory=dict)
    processor: str = ""
    is_bare: bool = False


@dataclass(frozen=True, slots=True)
class Component:
    """One network of a pipeline.

    Attributes:
        name: Of its folder, and in recipes, e.g. `text_encoder_2`.
        title: In messages.
        file: Name of its weights in an export.
        class_name: What it is where nothing states that.
        is_mergeable: Whether a delta may touch it.
        inner: What some files leave out at the begin of every key.
        sizes: What its config states of its tensors: key of the config, end of a tensor's name,
            dimension.
        loras: How LoRA files name its modules; None where none can have any.
    """

    name: str
    title: str
    file: str
    class_name: str = ""
    is_mergeable: bool = False
    inner: str = ""
    sizes: tuple[tuple[str, str, int], ...] = ()
    loras: LoraNames | None = None

    @property
    def file_name(self) -> str:
        """Return the place of its weights in an export."""
        return f"{self.name}/{self.file}"

    @property
    def config_name(self) -> str:
        """Return the place of its config in a pipeline."""
        return f"{self.name}/config.json"

    def respell(self, key: str) -> str:
        """Return a key in its other spelling: with what some files leave out, or without."""
        return key.removeprefix(self.inner) if key.startswith(self.inner) else self.inner + key


@dataclass(frozen=True, slots=True)
class Widening:
    """The tensor that has more input channels in an editor than in the model it was trained from.

    Attributes:
        key: Of the main component.
        edit_channels: In an editor.
        axis: That counts them.
    """

    key: str
    edit_channels: int
    axis: int = 1


@dataclass(frozen=True, slots=True)
class GuidanceEmbedding:
    """What a distilled model may have to take its guidance scale as an input.

    Attributes:
        key: Of the main component: `(in, size)`.
        linear: The layer's weight that it feeds, `(out, in)`.
        bias: That layer's bias, which a fixed guidance scale can be folded into.
        field: Of the main component's config: not null where the embedding is there.
    """

    key: str
    linear: str
    bias: str
    field: str


@dataclass(frozen=True, slots=True)
class Blocks:
    """The names of a main component's blocks, for block weights and charts.

    Attributes:
        names: All keys to the block of each.
        is_name: True for a word in the form of a block name, whether or not it exists.
        sort: Orders names as data flows.
        layer: A key to the part of it that names its layer, for how specific a block name is.
        sides: How names begin, in groups that are counted on their own.
        rest: The block of what lies in none; empty where blocks have no names.
        group: A key to its larger block, for charts.
        group_rank: Orders those.
    """

    names: Callable[[Iterable[str]], dict[str, str]] = lambda keys: {}
    is_name: Callable[[str], bool] = lambda text: False
    sort: Callable[[Iterable[str]], list[str]] = lambda names: sorted(set(names))
    layer: Callable[[str], str] = lambda key: key
    sides: tuple[str, ...] = ()
    rest: str = ""
    group: Callable[[str], str] = lambda key: key.partition(".")[0]
    group_rank: Callable[[str], tuple[int, int, str]] = lambda name: (0, 0, name)


@dataclass(frozen=True, slots=True)
class SingleFile:
    """One file with several components under names of their own.

    Attributes:
        components: That it has to hold.
        implementation: Whose key names it has, for ModelSpec.
        caveat: What programs do with it that a user would not expect.
    """

    components: tuple[str, ...]
    implementation: str
    caveat: str = ""


@dataclass(frozen=True, slots=True)
class Family:
    """An architecture.

    Attributes:
        name: In manifests and plans.
        title: For people.
        is_like: Whether the main component's keys and shapes are of it.
        sign: What of them it looks for, in words.
        components: The main one first, then all that a pipeline or a LoRA of it may have, in the
            order in which they are written.
        pipeline_class: Of diffusers, that edits.
        plain_class: Of diffusers, that makes pictures from texts.
        modelspec: ModelSpec's name of a plain model, and of an editor.
        tag: The Hub's.
        resolution: Short side in pixels that edits were found to work at.
        alone: Key of a file that holds nothing but a main component to the component's own key;
            None where that is no such file.
        context: End of the name of a tensor whose second dimension is the width of the text
            embedding.
        pointwise: Ends of keys that are a 1x1 convolution in some models and a matrix in others.
        widening: None where an editor has the shapes of other models.
        guidance: None where distilled models take no guidance scale as an input.
        blocks: Names of the main component's blocks.
        single_file: None where it has no such form here.
        scheduler_keys: What an exported scheduler takes from the target's, as its `from_config`
            would. A class ignores what it does not know; what it knows and is not told gets its
            default, and DDIM's clips the latents.
        config_changes: Fields of the main component's config that an export changes.
        pipeline_options: For loading its pipeline.
        has_fixed_size: Whether edits work at `resolution` only, and calls have to state it.
        has_added_conditions: Whether the main component also takes the pooled text and the sizes
            of pictures.
        overflows_vae: Whether its VAE overflows in float16.
        can_edit: Whether this tool can edit with it.
    """

    name: str
    title: str
    is_like: Callable[[Shapes], bool]
    sign: str
    components: tuple[Component, ...]
    pipeline_class: str
    plain_class: str
    modelspec: tuple[str, str]
    tag: str
    resolution: int
    alone: Callable[[Shapes], dict[str, str] | None] = lambda shapes: None
    context: str = ""
    pointwise: tuple[str, ...] = ()
    widening: Widening | None = None
    guidance: GuidanceEmbedding | None = None
    blocks: Blocks = field(default_factory=Blocks)
    single_file: SingleFile | None = None
    scheduler_keys: tuple[str, ...] = ()
    config_changes: Mapping[str, Any] = field(default_factory=dict)
    pipeline_options: Mapping[str, Any] = field(default_factory=dict)
    has_fixed_size: bool = False
    has_added_conditions: bool = False
    overflows_vae: bool = False
    can_edit: bool = True

    @property
    def main(self) -> Component:
        """Return the component that every merge writes."""
        return self.components[0]

    def component(self, name: str) -> Component | None:
        """Return a component by its name."""
        return next((part for part in self.components if part.name == name), None)

    def merged(self, names: Collection[str] | None) -> tuple[str, ...]:
        """Return components that a recipe names in their order; the main one for None."""
        wanted = (self.main.name,) if names is None else names
        known = [part.name for part in self.components if part.name in wanted]
        return (*known, *(name for name in wanted if name not in known))

    def qualified(self, component: str, key: str) -> str:
        """Return the name that patterns are matched with: the main component's keys as they are."""
        return key if component in (self.main.name, "") else f"{component}.{key}"

    def is_widened(self, component: str, key: str) -> bool:
        """Return True for the tensor that an editor has more input channels of."""
        widening = self.widening
        return widening is not None and (component, key) == (self.main.name, widening.key)


@dataclass(frozen=True, slots=True)
class Recognised:
    """What the keys and shapes of a main component say about it.

    Attributes:
        family: Its architecture.
        in_channels: Of the tensor that an editor has wider; None where there is none.
        context: Width of the text embedding; 0 when it has none.
        has_guidance_embedding: True for a distilled model that takes its guidance scale.
    """

    family: Family
    in_channels: int | None
    context: int
    has_guidance_embedding: bool

    @property
    def is_edit(self) -> bool:
        """Return True for a model that takes a picture as well."""
        widening = self.family.widening
        return widening is None or self.in_channels == widening.edit_channels
