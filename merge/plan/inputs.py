"""The inputs of a plan: their files, and where each of their tensors is."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field

from merge.header.dtypes import DTYPE_WORDS
from merge.header.model import TensorSpec
from merge.plan.model import PlanFile, TensorRef
from merge.plan.opening import Opened, OpenedSources
from merge.reader.checkpoint import Checkpoint
from merge.reader.kinds.quantized import FLOAT8

FLOATS = ("F16", "BF16", "F32", *FLOAT8)


@dataclass
class Inputs:
    """Every model of a recipe, as files with numbers and tensors with places.

    Attributes:
        components: That the recipe merges.
        sources: The models with their headers read.
        files: Inputs whose tensors are read; a `TensorRef` names one by its index.
    """

    components: tuple[str, ...]
    sources: OpenedSources
    files: list[PlanFile] = field(default_factory=list)
    _offsets: dict[tuple[str, str], int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for opened in self.sources.models:
            self._add_files(opened)

    def written(self) -> Iterator[tuple[str, Checkpoint]]:
        """Yield the target's components whose files we write: the main one, and what is merged."""
        parts = self.sources.target.parts
        for name in dict.fromkeys((self.sources.family.main.name, *self.components)):
            if name in parts:
                yield name, parts[name]

    def parts(self, opened: Opened) -> Iterator[tuple[str, Checkpoint]]:
        """Yield the components of a model that the recipe merges; a LoRA is one without a name."""
        for name, part in opened.parts.items():
            if name in ("", *self.components):
                yield name, part

    def ref(self, opened: Opened, component: str, key: str) -> TensorRef:
        """Return where a tensor of a component, or of a LoRA, is."""
        checkpoint = opened.parts[component]
        offset = self._offsets[opened.role, component]
        scale = None
        if key in checkpoint.scales:
            scale = _ref(offset, *checkpoint.scales[key])
        return dataclasses.replace(_ref(offset, *checkpoint.tensors[key]), scale=scale)

    def spelling(self, opened: Opened, component: str, key: str) -> str | None:
        """Return a key as a model spells it: text encoders come with and without `text_model.`."""
        checkpoint = opened.parts.get(component)
        if checkpoint is None or key in checkpoint.tensors:
            return None if checkpoint is None else key
        part = self.sources.family.component(component)
        other = part.respell(key) if part is not None else key
        return other if other in checkpoint.tensors else None

    def _add_files(self, opened: Opened) -> None:
        main = self.sources.family.main.name
        sources = opened.model.weights.values()
        for (name, part), files in zip(opened.parts.items(), sources, strict=False):
            if name not in ("", main, *self.components):
                continue
            self._offsets[opened.role, name] = len(self.files)
            for source, file in zip(files, part.files, strict=True):
                self.files.append(
                    PlanFile(
                        opened.role, source.name, source.path, file.stamp, source.expected_sha256
                    )
                )


def _ref(offset: int, index: int, spec: TensorSpec) -> TensorRef:
    return TensorRef(offset + index, spec.dtype, spec.shape, spec.start, spec.size_bytes)


def unsupported(code: str) -> str:
    """Return why a dtype cannot be merged."""
    word = DTYPE_WORDS.get(code)
    name = f"{code} ({word})" if word else code
    return f"{name} cannot be merged (float16, bfloat16, float32 and float8 can)"
