"""The whole recipe schema, as frozen dataclasses.

The schema is closed: a field that is not here is an error. OmegaConf turns YAML into these types,
so annotations stay within what it understands.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# Root mean square difference of pictures in 0 to 1. A hundredth of the pixels may be quite wrong.
EXPECTED_LIMIT = 0.1


@dataclass(frozen=True)
class ModelRef:
    """Where a model is: on the Hub (`repo`) or on this disk (`path`).

    Attributes:
        repo: Hub id `org/name`.
        path: Folder or weight file; absolute once loaded.
        revision: Branch, tag or commit of `repo`.
        subfolder: Folder inside the model that holds it.
        variant: Preferred weight variant such as `fp16`; components without it use their plain
            files.
        file: One weight file of `repo`, when it has several.
        config: Folder or Hub repo with the configs of a single weight file.
        ema: Which of a file's two sets of weights is taken, where it holds a moving average beside
            the plain ones: `auto` (the average, where it is whole), true or false.
        sha256: Weight file, relative to the model, to its expected SHA-256.
    """

    repo: str | None = None
    path: str | None = None
    revision: str | None = None
    subfolder: str | None = None
    variant: str | None = None
    file: str | None = None
    config: str | None = None
    ema: Any = "auto"
    sha256: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class DistilledRef(ModelRef):
    """A distilled model; its own weight multiplies the recipe's.

    Attributes:
        weight: Finite, dimensionless.
    """

    weight: float = 1.0


@dataclass(frozen=True)
class Models:
    """The models of a merge.

    Attributes:
        base: What the full distilled models started from; None when all are LoRAs.
        distilled: One or more few-step models or LoRAs.
        target: The InstructPix2Pix model that receives the delta.
    """

    target: ModelRef
    distilled: list[DistilledRef]
    base: ModelRef | None = None

    @property
    def by_role(self) -> dict[str, ModelRef]:
        """Return role to model; distilled ones have numbers where there are several."""
        roles = {"target": self.target}
        if self.base is not None:
            roles["base"] = self.base
        several = len(self.distilled) > 1
        for index, ref in enumerate(self.distilled):
            roles[f"distilled[{index}]" if several else "distilled"] = ref
        return roles

    def with_roles(self, refs: Mapping[str, Any]) -> Models:
        """Return models in place of these, by the same roles."""
        distilled = [ref for role, ref in refs.items() if role not in ("target", "base")]
        return Models(refs["target"], distilled, refs.get("base"))


@dataclass(frozen=True)
class SchedulerSpec:
    """The scheduler written into the export.

    Attributes:
        class_name: A diffusers scheduler.
        config: Values that replace the target's.
    """

    class_name: str = "LCMScheduler"
    config: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class OutputSpec:
    """What is written, and where.

    Attributes:
        folder: Relative to the current folder.
        single_file: Also write one LDM/SGM file.
        other_dtype: Of the components that are not merged; `keep` copies them as they are.
    """

    folder: str = "outputs/${name}"
    single_file: bool = False
    other_dtype: str = "keep"


@dataclass(frozen=True)
class EditSpec:
    """One edit that proves the merge.

    Attributes:
        image: Path of the picture.
        instruction: What to change.
        seed: Overrides the recipe's seeds.
        before_caption: Text of the picture as it is, for directional similarity.
        after_caption: Text of the picture as it should become.
        expected: Pictures of which the result must be near to one; empty: none is known.
        expected_limit: Largest root mean square difference to the nearest, values in 0 to 1.
        steps: Overrides the recipe's steps and timesteps.
        timesteps: Overrides them too, with explicit ones.
    """

    image: str
    instruction: str
    seed: int | None = None
    before_caption: str | None = None
    after_caption: str | None = None
    expected: list[str] = field(default_factory=list)
    expected_limit: float = EXPECTED_LIMIT
    steps: int | None = None
    timesteps: list[int] | None = None


@dataclass(frozen=True)
class CompareSpec:
    """How the target edits by itself: what merged models are compared with and tuned by.

    Attributes:
        steps: Of the target's own scheduler.
        guidance_scale: Of the instruction, at those steps; InstructPix2Pix's customary value.
        image_guidance_scale: Of the picture, at those steps; likewise.
    """

    steps: int = 50
    guidance_scale: float = 7.5
    image_guidance_scale: float = 1.5


@dataclass(frozen=True)
class VerifySpec:
    """Settings of the closing edits.

    Attributes:
        edits: Empty: a picture that comes with the tool.
        steps: num_inference_steps.
        guidance_scale: Of the instruction; 1 turns guidance off.
        image_guidance_scale: 1 turns image guidance off.
        resolution: Short side in pixels.
        original_inference_steps: Length of the LCM schedule that steps are picked from.
        timesteps: Explicit timesteps instead of `steps`.
        seeds: One edit per seed.
        compare: The target's own settings.
    """

    edits: list[EditSpec] = field(default_factory=list)
    steps: int = 4
    guidance_scale: float = 2.0
    image_guidance_scale: float = 1.0
    resolution: int = 512
    original_inference_steps: int = 50
    timesteps: list[int] | None = None
    seeds: list[int] = field(default_factory=lambda: [0])
    compare: CompareSpec = field(default_factory=CompareSpec)


@dataclass(frozen=True)
class Recipe:
    """A recipe after defaults and overrides; README.md and recipes/README.md have every field."""

    name: str
    models: Models
    method: str = "add_difference"
    params: dict[str, Any] = field(default_factory=dict)
    weight: float = 1.0
    components: list[str] | None = None
    channel_rule: str = "skip"
    block_weights: dict[str, float] = field(default_factory=dict)
    exclude: list[str] = field(default_factory=list)
    guidance_embedding: str = "drop"
    bake_guidance: float | None = None
    compute_dtype: str = "float32"
    out_dtype: str = "float16"
    on_overflow: str = "error"
    allow_noop: bool = False
    allow_pickle: bool = False
    scheduler: SchedulerSpec = field(default_factory=SchedulerSpec)
    output: OutputSpec = field(default_factory=OutputSpec)
    verify: VerifySpec = field(default_factory=VerifySpec)
