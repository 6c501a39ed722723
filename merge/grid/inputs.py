"""What is edited: pictures with instructions, each with one seed or several."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from merge.errors import ImageError, RecipeError, SourceNotFoundError
from merge.grid.model import Sample
from merge.recipe.schema import Recipe
from merge.verify.edits import DEFAULT_EDITS, read_edits
from merge.verify.model import Edit

_LOG = logging.getLogger(__name__)
_SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
MAX_SAMPLES = 4096


@dataclass(frozen=True, slots=True)
class Inputs:
    """What is asked to be edited.

    Attributes:
        edits: A YAML or JSON list, as for `verify`, or edits; None: the recipe's.
        images: A folder of pictures, instead; each is edited with the instructions in turn.
        instructions: A text file with these, one on each line.
        samples: How many edits there are: more than there are edits and seeds repeat them with
            new noise. None: every edit with every seed.
    """

    edits: str | Path | tuple[Edit, ...] | None = None
    images: str | Path | None = None
    instructions: str | Path | None = None
    samples: int | None = None


def find_edits(recipe: Recipe, inputs: Inputs) -> tuple[Edit, ...]:
    """Return what to edit: what is named, what the recipe has, or what comes with the tool.

    Args:
        recipe: Its `verify.edits` are taken where nothing else is named.
        inputs: What is named.

    Raises:
        RecipeError: a list is not valid or empty, or both ways are named.
        ImageError: a picture is not there, or there is none.
        SourceNotFoundError: there is no such folder or file.
    """
    edits, images, instructions = inputs.edits, inputs.images, inputs.instructions
    if (images is None) != (instructions is None):
        raise RecipeError(
            "a folder of pictures and a list of instructions belong together",
            [],
            hint="give both --images FOLDER and --instructions FILE, or --edits FILE",
        )
    if edits is not None and images is not None:
        raise RecipeError("--edits and --images are both given", [], hint="choose one")
    if images is not None and instructions is not None:
        return _cross(Path(images), Path(instructions))
    if isinstance(edits, tuple):
        if not edits:
            raise RecipeError("there is nothing to edit", [], hint="name at least one edit")
        return edits
    if edits is not None:
        return tuple(read_edits(edits))
    if recipe.verify.edits:
        found = tuple(_of_recipe(recipe))
        paths = [path for edit in found for path in (edit.image, *edit.expected) if path]
        missing = [path for path in paths if not path.is_file()]
        if missing:
            raise ImageError(
                f"verify.edits: there is no picture {', '.join(map(str, missing))}",
                hint="paths are relative to the recipe file; --edits names another list",
            )
        return found
    _LOG.warning(
        "no edits are named: drawn pictures are edited, which photographs need not agree with; "
        "name yours under verify.edits, or with --edits or --images"
    )
    return DEFAULT_EDITS


def make_samples(
    edits: Sequence[Edit], seeds: Sequence[int], count: int | None = None, *, is_seed_fixed: bool
) -> tuple[Sample, ...]:
    """Return each edit with each of its seeds.

    Args:
        edits: What to do.
        seeds: The recipe's, for edits without one of their own.
        count: As many samples as that: edits are repeated with new noise until there are enough.
        is_seed_fixed: The seeds win over those of the edits.
    """
    first = [
        Sample(edit, seed)
        for edit in edits
        for seed in ([edit.seed] if edit.seed is not None and not is_seed_fixed else seeds)
    ]
    if count is None:
        return tuple(first)
    samples = first[:count]
    taken = {(id(sample.edit), sample.seed) for sample in samples}
    largest = max((sample.seed for sample in first), default=0)
    for seed in itertools.count(largest + 1):
        for edit in edits:
            if len(samples) >= count:
                return tuple(samples)
            if (id(edit), seed) not in taken:
                samples.append(Sample(edit, seed % 2**63))
    raise AssertionError("no end")


def _of_recipe(recipe: Recipe) -> list[Edit]:
    return [
        Edit(
            Path(spec.image),
            spec.instruction,
            spec.seed,
            spec.before_caption,
            spec.after_caption,
            tuple(Path(name) for name in spec.expected),
            spec.expected_limit,
            steps=spec.steps,
            timesteps=None if spec.timesteps is None else tuple(spec.timesteps),
        )
        for spec in recipe.verify.edits
    ]


def _cross(images: Path, instructions: Path) -> tuple[Edit, ...]:
    """Return every picture of a folder with every instruction of a file."""
    if not images.is_dir():
        raise SourceNotFoundError(f"there is no folder {images}", hint="--images takes a folder")
    pictures = sorted(
        path
        for path in images.iterdir()
        if path.suffix.lower() in _SUFFIXES and not path.name.startswith(".")
    )
    if not pictures:
        raise ImageError(
            f"there is no picture in {images}", hint=f"looked for {', '.join(sorted(_SUFFIXES))}"
        )
    try:
        text = instructions.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SourceNotFoundError(
            f"the instructions {instructions} cannot be read: {error}",
            hint="a text file with one instruction on each line",
        ) from error
    lines = [line.strip() for line in text.splitlines()]
    words = [line for line in lines if line and not line.startswith("#")]
    if not words:
        raise RecipeError(f"{instructions} has no instruction", [], hint="write one on each line")
    # Every picture once before any comes again, each time with another instruction.
    found = [
        Edit(picture, words[(index + turn) % len(words)])
        for turn in range(len(words))
        for index, picture in enumerate(pictures)
    ]
    if len(found) > MAX_SAMPLES:
        _LOG.warning("%d pictures and instructions: the first %d", len(found), MAX_SAMPLES)
    return tuple(found[:MAX_SAMPLES])
