"""What a verification is made of: edits to run, pictures that came out, checks, measurements."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Self

from PIL import Image

from merge.editor.result import EditResult
from merge.editor.settings import EditSettings
from merge.recipe.schema import EXPECTED_LIMIT


@dataclass(frozen=True, slots=True)
class Check:
    """One measured value and its limit.

    Attributes:
        name: Stable name; `CHECKS` in `merge.verify.checks` says what each measures.
        value: The measurement.
        limit: What it was compared with.
        passed: The verdict.
        edit: Index of the edit that was measured, from 0; None for the model as a whole.
        detail: Names of what is at fault, such as files or tensors; empty when it passed.
    """

    name: str
    value: float
    limit: float
    passed: bool
    edit: int | None = None
    detail: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Edit:
    """One edit to run.

    Attributes:
        image: The picture; None takes the one that the tool draws under the name `drawing`.
        instruction: What to change.
        seed: Instead of the recipe's seeds.
        before_caption: Text of the picture as it is, for CLIP.
        after_caption: Text of the picture as it should become, for CLIP.
        expected: Pictures of which the result must be near to one; empty: none is known.
        expected_limit: Largest root mean square difference, values in 0 to 1, to the nearest.
        drawing: Name of a picture of `merge.verify.drawings`.
        steps: Instead of the recipe's steps and timesteps.
        timesteps: Likewise, explicit ones.
    """

    image: Path | None
    instruction: str
    seed: int | None = None
    before_caption: str | None = None
    after_caption: str | None = None
    expected: tuple[Path, ...] = ()
    expected_limit: float = EXPECTED_LIMIT
    drawing: str = "house"
    steps: int | None = None
    timesteps: tuple[int, ...] | None = None

    def settings(self, recipes: EditSettings, seed: int) -> EditSettings:
        """Return the settings of this edit, given the recipe's."""
        if self.timesteps is not None:
            count = len(self.timesteps)
            return replace(recipes, seed=seed, steps=count, timesteps=self.timesteps)
        if self.steps is not None:
            return replace(recipes, seed=seed, steps=self.steps, timesteps=None)
        return replace(recipes, seed=seed)

    @property
    def image_name(self) -> str:
        """Return the picture's file name, or the name of the drawing."""
        return self.image.name if self.image is not None else self.drawing


@dataclass(frozen=True, slots=True)
class Picture:
    """What one model made of one edit.

    Attributes:
        image: In 8 bits.
        settings: That made it.
        scheduler: `own` or `lcm`.
        unet_rows: Rows that the UNet evaluated, over all steps.
        seconds: Wall time of the edit without loading.
    """

    image: Image.Image
    settings: EditSettings
    scheduler: str
    unet_rows: int
    seconds: float

    @classmethod
    def of(cls, result: EditResult, scheduler: str) -> Self:
        """Return what an edit gave."""
        image = result.to_pil()
        return cls(image, result.settings, scheduler, result.unet_rows, result.seconds)


@dataclass(frozen=True, slots=True)
class EditRow:
    """One edit with one seed, and every picture of it.

    Attributes:
        edit: What was asked.
        seed: Of the noise.
        source: What the model saw.
        pictures: `merged`, and with a target `target` and `target_few`.
        metrics: For each picture, name of a metric to value; None where it is infinite.
        expected: The nearest of the right results, if any are known.
    """

    edit: Edit
    seed: int
    source: Image.Image
    pictures: Mapping[str, Picture]
    metrics: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict)
    expected: Image.Image | None = None

    @property
    def images(self) -> dict[str, Image.Image]:
        """Return every picture that there is, by its kind."""
        made = {kind: picture.image for kind, picture in self.pictures.items()}
        expected = {} if self.expected is None else {"expected": self.expected}
        return {"source": self.source, **made, **expected}


@dataclass(frozen=True, slots=True)
class ComparedTarget:
    """The unmerged model that pictures are compared with.

    Attributes:
        label: Hub id, or the name of the local folder.
        commit: The 40 hexadecimal digits that a Hub id was resolved to, or None.
        root: The pipeline folder.
        weights: The UNet's files.
        files: Every file that decides the pictures, by name inside the model.
    """

    label: str
    commit: str | None
    root: Path
    weights: tuple[Path, ...]
    files: Mapping[str, Path]


@dataclass(frozen=True, slots=True)
class CompareOptions:
    """How the target makes the pictures that merged ones are shown with.

    Attributes:
        model: A pipeline folder, or `org/name[@revision]` on the Hub.
        steps: Of the target's own scheduler.
        guidance_scale: Of the instruction, at those steps; InstructPix2Pix's customary value.
        image_guidance_scale: Of the picture, at those steps; likewise.
        cache: False makes every picture anew and keeps none.
    """

    model: str
    steps: int = 50
    guidance_scale: float = 7.5
    image_guidance_scale: float = 1.5
    cache: bool = True


@dataclass(frozen=True, slots=True)
class BlockNorm:
    """How far one block of the UNet moved.

    Attributes:
        name: `conv_in`, `down_blocks.0`, `mid_block` and so on.
        relative: Norm of merged minus target over norm of the target, Frobenius.
        parameters: Number of values in the block.
    """

    name: str
    relative: float
    parameters: int
