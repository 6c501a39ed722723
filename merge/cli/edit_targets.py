"""Which pictures the `edit` command reads and which files it writes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from merge.errors import ImageError, OutputError, OutputExistsError, SourceNotFoundError, list_first

SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}


@dataclass(frozen=True, slots=True)
class EditTarget:
    """One picture to make.

    Attributes:
        image: The picture to edit.
        seed: Of its noise.
        output: The PNG.
    """

    image: Path
    seed: int
    output: Path


def image_targets(image: Path, output: Path, seeds: Sequence[int]) -> list[EditTarget]:
    """Return the edits of one picture; with several seeds, `-SEED` goes before the suffix.

    Raises:
        click.BadParameter: the output's name does not end in .png.
    """
    if output.suffix.lower() != ".png":
        raise click.BadParameter(f"{output} must end in .png", param_hint="'-o'")
    return [EditTarget(image, seed, _with_seed(output, seed, seeds)) for seed in seeds]


def folder_targets(folder: Path, output: Path, seeds: Sequence[int]) -> list[EditTarget]:
    """Return the edits of a folder's pictures, by name: NAME.png, or NAME-SEED.png for several.

    Files of other kinds and hidden ones are no pictures here; the files are not opened.

    Raises:
        SourceNotFoundError: there is no such folder.
        ImageError: no file in it has the suffix of a picture.
        OutputError: the output is a file.
    """
    if not folder.is_dir():
        raise SourceNotFoundError(
            f"there is no folder {folder}", hint="--images takes a folder; name one picture plainly"
        )
    if output.exists() and not output.is_dir():
        raise OutputError(f"{output} is a file", hint="with --images, -o names a folder")
    files = sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()
    )
    if not files:
        raise ImageError(
            f"there is no picture in {folder}", hint=f"looked for {', '.join(sorted(SUFFIXES))}"
        )
    # Of cat.png and cat.jpg, or of Cat.png where file names have no case, both must be kept.
    clash = any(count > 1 for count in Counter(path.stem.casefold() for path in files).values())
    places = {path: output / f"{path.name if clash else path.stem}.png" for path in files}
    return [
        EditTarget(path, seed, _with_seed(place, seed, seeds))
        for path, place in places.items()
        for seed in seeds
    ]


def _with_seed(output: Path, seed: int, seeds: Sequence[int]) -> Path:
    """Return the PNG of one of several seeds; that of a single one keeps its name."""
    if len(seeds) == 1:
        return output
    return output.with_name(f"{output.stem}-{seed}{output.suffix}")


def check_outputs(targets: Sequence[EditTarget], *, overwrite: bool) -> None:
    """Refuse to write over anything, before any work is done.

    Raises:
        OutputExistsError: an output exists, and need not be replaced.
        OutputError: an output is a folder, or the picture to edit itself.
    """
    inputs = {target.image.resolve() for target in targets}
    own = [target.output for target in targets if target.output.resolve() in inputs]
    if own:
        raise OutputError(
            f"{list_first(own)} would be replaced by an edit of itself",
            hint="choose another place with -o",
        )
    folders = [target.output for target in targets if target.output.is_dir()]
    if folders:
        raise OutputError(f"{list_first(folders)} is a folder", hint="name a PNG with -o")
    found = [target.output for target in targets if target.output.exists()]
    if found and not overwrite:
        raise OutputExistsError(
            f"{list_first(found)} {'exists' if len(found) == 1 else 'exist'} already",
            hint="add --overwrite, or choose another place with -o",
        )
