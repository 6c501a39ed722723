"""Draw the picture of the README: the same edits in fifty steps and in few, unmerged and merged.

    python scripts/demo/gallery.py

Needs nothing but the committed models. Which edits are shown is a rule, not a taste: of the
validation edits that two steps get wrong unmerged and right merged, for each of the commonest
instructions the one whose unmerged picture is of median distance from a right answer. A red frame
says that the picture is wrong.
"""

from __future__ import annotations

import argparse
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import world
from choice import load_choice
from lines import TARGET_50
from PIL import Image, ImageDraw, ImageFont
from scoring import HERE, Setting, checkpoint, draw_edits, edit_pictures, score
from world import VALIDATION_SEED

COUNT = 400
_SHOWN = 5
_SIDE, _GAP, _LEFT, _TITLE, _CAPTION = 128, 12, 4, 62, 34
_FRAME = 4
_INK, _PAPER, _WRONG = (40, 44, 52), (255, 255, 255), (220, 38, 38)


@dataclass(frozen=True, slots=True)
class _Column:
    title: str
    pictures: np.ndarray
    right: list[bool]


def draw(out: Path) -> None:
    """Choose the edits, make their pictures, write them in rows."""
    edits = draw_edits(VALIDATION_SEED, COUNT)
    choice = load_choice()
    two = Setting("target", 2, timesteps=choice.timesteps[2])
    four = Setting("target", 4, timesteps=choice.timesteps[4])
    with tempfile.TemporaryDirectory() as scratch:
        target = checkpoint(two, Path(scratch))
        merged = checkpoint(Setting("demo", 2, choice.weight), Path(scratch))
        plain, moved = score(target, two, edits), score(merged, two, edits)
        chosen = _choose(edits.instructions, plain.right, moved.right, plain.distance)
        few = _take(edits, chosen)
        columns = [_Column("source", world.render(few.source), [True] * len(chosen))]
        for title, folder, setting in (
            ("target\n50 steps", target, TARGET_50),
            ("unmerged\n4 steps", target, four),
            ("merged\n4 steps", merged, four),
            ("unmerged\n2 steps", target, two),
            ("merged\n2 steps", merged, two),
        ):
            pictures, _ = edit_pictures(folder, setting, few, seeds=chosen)
            right = world.score(few, pictures).is_right.tolist()
            columns.append(_Column(title, pictures, right))
    helped = sum(m and not p for p, m in zip(plain.right, moved.right, strict=True))
    harmed = sum(p and not m for p, m in zip(plain.right, moved.right, strict=True))
    print(
        f"in two steps the merge mends {helped} of {COUNT} validation edits and breaks {harmed}; "
        f"shown: {', '.join(few.instructions)}"
    )
    _lay_out(columns, few.instructions).save(out, optimize=True)


def _choose(
    instructions: list[str],
    plain: tuple[bool, ...],
    merged: tuple[bool, ...],
    distance: tuple[float, ...],
) -> list[int]:
    """Return the edits to show, the commonest instruction first."""
    mended = [i for i in range(len(plain)) if merged[i] and not plain[i]]
    common = Counter(instructions[i] for i in mended)
    chosen = []
    for instruction in sorted(common, key=lambda text: (-common[text], text))[:_SHOWN]:
        found = [i for i in mended if instructions[i] == instruction]
        found.sort(key=lambda i: distance[i])
        chosen.append(found[len(found) // 2])
    return chosen


def _take(edits: world.Edits, chosen: list[int]) -> world.Edits:
    def scenes(whole: world.Scenes) -> world.Scenes:
        return world.Scenes(whole.sky[chosen], whole.ground[chosen], whole.tiles[chosen])

    return world.Edits(
        scenes(edits.source),
        scenes(edits.outcome),
        [edits.instructions[i] for i in chosen],
        edits.is_open[chosen],
        edits.valid[chosen],
    )


def _lay_out(columns: list[_Column], captions: list[str]) -> Image.Image:
    row_height = _CAPTION + _SIDE + _GAP
    width = 2 * _LEFT + len(columns) * (_SIDE + _GAP) - _GAP
    sheet = Image.new("RGB", (width, _TITLE + len(captions) * row_height), _PAPER)
    pen = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=23)
    for index, column in enumerate(columns):
        x = _LEFT + index * (_SIDE + _GAP)
        pen.multiline_text(
            (x + _SIDE / 2, _TITLE / 2), column.title, _INK, font, "mm", align="center"
        )
        for row, picture in enumerate(column.pictures):
            small = Image.fromarray((picture * 255).round().astype(np.uint8))
            enlarged = small.resize((_SIDE, _SIDE), Image.Resampling.NEAREST)
            y = _TITLE + row * row_height + _CAPTION
            sheet.paste(enlarged, (x, y))
            if not column.right[row]:
                frame = (x - _FRAME, y - _FRAME, x + _SIDE + _FRAME - 1, y + _SIDE + _FRAME - 1)
                pen.rectangle(frame, outline=_WRONG, width=_FRAME)
    for row, caption in enumerate(captions):
        place = (_LEFT, _TITLE + row * row_height + _CAPTION / 2)
        pen.text(
            place,
            f"\N{LEFT DOUBLE QUOTATION MARK}{caption}\N{RIGHT DOUBLE QUOTATION MARK}",
            _INK,
            font,
            anchor="lm",
        )
    return sheet


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=HERE / "edits.png")
    draw(parser.parse_args().out)


if __name__ == "__main__":
    main()
