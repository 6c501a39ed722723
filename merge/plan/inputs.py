"""The inputs of a plan: their files, and where each of their tensors is."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field

from merge.header import DTYPE_WORDS, TensorSpec
from merge.kinds import FLOAT8
from merge.lora import is_lora
from merge.plan.model import PlanFile, TensorRef
from merge.plan.opening import Opened, OpenedSources
from merge.reader import Checkpoint
from merge.recipe.schema import Recipe

FLOATS = ("F16", "BF16", "F32", *FLOAT8)


@dataclass
class Inputs:
    """Every model of a recipe, as files with numbers and tensors with places.

    Attributes:
        recipe: For the components that it merges.
        sources: The models with their headers read.
        files: Inputs whose tensors are read; a `TensorRef` names one by its index.
    """

    recipe: Recipe
    sources: OpenedSources
    files: list[PlanFile] = field(default_factory=list)
    _offsets: dict[tuple[str, str], int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for opened in self.sources.models:
            self._add_files(opened)

    def written(self) -> Iterator[tuple[str, Checkpoint]]:
        """Yield the target's components whose files we write: the UNet's, and what is merged."""
        for name in dict.fromkeys(("unet", *self.recipe.components)):
            checkpoint = self.sources.target.component(name)
            if checkpoint is not None:
                yield name, checkpoint

    def parts(self, opened: Opened) -> Iterator[tuple[str, Checkpoint]]:
        """Yield the components of a model that the recipe merges; a LoRA is one without a name."""
        if is_lora(opened.checkpoint.tensors):
            yield "", opened.checkpoint
            return
        for name in self.recipe.components:
            checkpoint = opened.component(name)
            if checkpoint is not None:
                yield name, checkpoint

    def ref(self, opened: Opened, component: str, key: str) -> TensorRef:
        """Return where a tensor of a component, or of a LoRA (`unet`), is."""
        checkpoint = opened.component(component)
        assert checkpoint is not None
        offset = self._offsets[opened.role, component]
        scale = None
        if key in checkpoint.scales:
            scale = _ref(offset, *checkpoint.scales[key])
        return dataclasses.replace(_ref(offset, *checkpoint.tensors[key]), scale=scale)

    def spelling(self, opened: Opened, component: str, key: str) -> str | None:
        """Return a key as a model spells it: text encoders come with and without `text_model.`."""
        checkpoint = opened.component(component)
        if checkpoint is None or key in checkpoint.tensors:
            return None if checkpoint is None else key
        if component == "unet":
            return None
        prefix = "text_model."
        other = key.removeprefix(prefix) if key.startswith(prefix) else prefix + key
        return other if other in checkpoint.tensors else None

    def _add_files(self, opened: Opened) -> None:
        model = opened.model
        sources = {"unet": model.weights, **model.text_encoders}
        parts = {"unet": opened.checkpoint, **opened.text}
        for name, checkpoint in parts.items():
            if name not in ("unet", *self.recipe.components):
                continue
            self._offsets[opened.role, name] = len(self.files)
            for source, file in zip(sources[name], checkpoint.files, strict=True):
                self.files.append(
                    PlanFile(
                        opened.role, source.name, source.path, file.stamp, source.expected_sha256
                    )
                )


def _ref(offset: int, index: int, spec: TensorSpec) -> TensorRef:
    return TensorRef(offset + index, spec.dtype, spec.shape, spec.start, spec.size_bytes)


def qualified(component: str, key: str) -> str:
    """Return the name that patterns are matched with."""
    return key if component in ("unet", "") else f"{component}.{key}"


def unsupported(code: str) -> str:
    """Return why a dtype cannot be merged."""
    word = DTYPE_WORDS.get(code)
    name = f"{code} ({word})" if word else code
    return f"{name} cannot be merged (float16, bfloat16, float32 and float8 can)"
