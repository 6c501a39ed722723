"""Draw the picture of the README: source, target and merged side by side.

python scripts/demo/gallery.py outputs/demo        # an export of the recipe `demo`

Needs nothing but the committed models.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from evaluate import GUIDANCE, HERE, MODELS
from export import EXAMPLES
from PIL import Image, ImageDraw, ImageFont

from merge import EditSettings, edit, load_editor

_SCALE = 5
_GAP = 14
_SEED = 0
_INK, _PAPER = (40, 44, 52), (255, 255, 255)


def draw(merged: Path, out: Path) -> None:
    """Edit the demo's pictures with target and merged model and write them in rows.

    Args:
        merged: An export of the recipe `demo`.
        out: The PNG to write.
    """
    sources = [MODELS / "pictures" / f"{text.replace(' ', '-')}.png" for text in EXAMPLES]
    rows = [("source", [Image.open(path).convert("RGB") for path in sources])]
    for title, folder, scheduler, steps in (
        ("target, 50 steps", MODELS / "target", "own", 50),
        ("target, 4 steps", MODELS / "target", "lcm", 4),
        ("merged, 4 steps", merged, "lcm", 4),
    ):
        editor = load_editor(folder, device="cpu", scheduler=scheduler)
        settings = EditSettings(steps=steps, guidance_scale=GUIDANCE, seed=_SEED)
        rows.append(
            (
                title,
                [
                    edit(editor, path, text, settings).to_pil()
                    for path, text in zip(sources, EXAMPLES, strict=True)
                ],
            )
        )
    _lay_out(rows).save(out, optimize=True)


def _lay_out(rows: list[tuple[str, list[Image.Image]]]) -> Image.Image:
    side = rows[0][1][0].width * _SCALE
    left, top = 130, 34
    width = left + len(EXAMPLES) * (side + _GAP)
    sheet = Image.new("RGB", (width, top + len(rows) * (side + _GAP)), _PAPER)
    pen = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=15)
    for column, text in enumerate(EXAMPLES):
        middle = left + column * (side + _GAP) + side / 2
        pen.text((middle, top / 2), text.replace("the ground ", "it "), _INK, font, anchor="mm")
    for row, (title, pictures) in enumerate(rows):
        y = top + row * (side + _GAP)
        pen.text((left - _GAP, y + side / 2), title, _INK, font, anchor="rm")
        for column, picture in enumerate(pictures):
            enlarged = picture.resize((side, side), Image.Resampling.NEAREST)
            sheet.paste(enlarged, (left + column * (side + _GAP), y))
    return sheet


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("merged", type=Path, help="an export of the recipe `demo`")
    parser.add_argument("--out", type=Path, default=HERE / "edits.png")
    arguments = parser.parse_args()
    draw(arguments.merged, arguments.out)


if __name__ == "__main__":
    main()
