"""Pictures drawn by code, for edits where nobody has named one."""

from __future__ import annotations

from collections.abc import Callable

from PIL import Image, ImageDraw, ImageFilter

# Drawn four times as large and reduced, which makes every edge smooth.
_OVERSAMPLING = 4
_UNITS = 16

Color = tuple[int, int, int]


def default_picture(size: int) -> Image.Image:
    """Draw a house on a hill by day.

    Args:
        size: Of each side in pixels.
    """
    return draw_picture("house", size)


def draw_picture(name: str, size: int) -> Image.Image:
    """Draw one of the pictures that come with the tool.

    Args:
        name: A key of `DRAWINGS`.
        size: Of each side in pixels.
    """
    canvas = _Canvas(size * _OVERSAMPLING)
    DRAWINGS[name](canvas)
    return canvas.image.resize((size, size), Image.Resampling.LANCZOS)


class _Canvas:
    """A square of 16 x 16 units."""

    def __init__(self, side: int) -> None:
        self.unit = side / _UNITS
        self.side = side
        self.image = Image.new("RGB", (side, side))
        self._draw = ImageDraw.Draw(self.image)

    def gradient(self, y0: float, y1: float, above: Color, below: Color) -> None:
        top, bottom = round(y0 * self.unit), round(y1 * self.unit)
        for y in range(top, bottom):
            t = (y - top) / max(1, bottom - top)
            color = tuple(round(a + (b - a) * t) for a, b in zip(above, below, strict=True))
            self._draw.line((0, y, self.side, y), color)

    def ellipse(self, x0: float, y0: float, x1: float, y1: float, color: Color) -> None:
        self._draw.ellipse(self._scale(x0, y0, x1, y1), fill=color)

    def rectangle(self, x0: float, y0: float, x1: float, y1: float, color: Color) -> None:
        self._draw.rectangle(self._scale(x0, y0, x1, y1), fill=color)

    def polygon(self, color: Color, *values: float) -> None:
        self._draw.polygon(self._scale(*values), fill=color)

    def blur(self, radius: float) -> None:
        self.image = self.image.filter(ImageFilter.GaussianBlur(radius * self.unit))
        self._draw = ImageDraw.Draw(self.image)

    def _scale(self, *values: float) -> list[float]:
        return [value * self.unit for value in values]


def _house(canvas: _Canvas) -> None:
    canvas.gradient(0, 16, (90, 160, 235), (210, 230, 250))
    canvas.ellipse(11.5, 1.5, 14, 4, (255, 236, 150))
    canvas.ellipse(-6, 8, 11, 22, (104, 160, 92))
    canvas.ellipse(4, 9.5, 24, 26, (82, 140, 76))
    canvas.rectangle(4.5, 8, 9, 12, (214, 196, 168))
    canvas.polygon((158, 72, 58), 4, 8, 6.75, 5.5, 9.5, 8)
    canvas.rectangle(6.2, 9.8, 7.3, 12, (96, 66, 46))
    canvas.rectangle(7.8, 9.2, 8.6, 10.2, (150, 190, 214))
    canvas.rectangle(12.6, 9, 13.1, 12, (92, 68, 46))
    canvas.ellipse(11.3, 6, 14.4, 9.8, (58, 112, 60))


def _boat(canvas: _Canvas) -> None:
    canvas.gradient(0, 9, (96, 168, 232), (206, 230, 246))
    canvas.gradient(9, 16, (206, 230, 246), (206, 230, 246))
    for x, y, width in ((1.5, 2.4, 3.4), (2.8, 1.8, 2.6), (10.6, 3.4, 3.8), (12.2, 2.8, 2.4)):
        canvas.ellipse(x, y, x + width, y + 1.2, (246, 249, 252))
    canvas.blur(0.12)
    canvas.polygon((126, 148, 168), 0, 9, 3.2, 7.4, 6, 8.4, 8.8, 9)
    canvas.gradient(9, 16, (52, 122, 178), (18, 66, 116))
    for row in range(8):
        for column in range(5):
            x = (column * 3.7 + row * 1.9) % 17 - 0.8
            y = 9.6 + row * 0.82
            canvas.ellipse(x, y, x + 0.9 + 0.1 * row, y + 0.1, (112, 172, 212))
    canvas.polygon((118, 66, 44), 4.6, 10.6, 11.8, 10.6, 10.7, 12, 5.7, 12)
    canvas.rectangle(4.6, 10.45, 11.8, 10.75, (232, 222, 206))
    canvas.rectangle(8, 3, 8.2, 10.5, (92, 62, 44))
    canvas.polygon((250, 246, 238), 8.35, 3.2, 8.35, 9.9, 11.9, 9.9)
    canvas.polygon((232, 226, 214), 7.85, 3.8, 7.85, 9.9, 4.9, 9.9)
    canvas.polygon((206, 58, 52), 8.2, 3, 8.2, 2.3, 9.3, 2.65)


def _apple(canvas: _Canvas) -> None:
    canvas.gradient(0, 10, (226, 216, 200), (204, 190, 170))
    canvas.gradient(10, 16, (164, 112, 68), (122, 78, 44))
    for row in range(1, 5):
        y = 10 + row * 1.3
        canvas.rectangle(0, y, 16, y + 0.06, (112, 70, 40))
    canvas.ellipse(4.3, 11.4, 12.6, 13.2, (92, 56, 32))
    canvas.blur(0.2)
    canvas.ellipse(4.4, 5.2, 9.4, 12.4, (186, 30, 36))
    canvas.ellipse(6.6, 5.2, 11.6, 12.4, (186, 30, 36))
    canvas.ellipse(5, 5.7, 10.6, 11.8, (204, 44, 44))
    canvas.ellipse(5.6, 6.3, 8.2, 9.4, (222, 84, 74))
    canvas.blur(0.05)
    canvas.ellipse(7.1, 5.2, 8.9, 6, (132, 22, 28))
    canvas.polygon((88, 58, 34), 7.9, 5.7, 8.2, 5.7, 8.7, 3.7, 8.4, 3.6)
    canvas.polygon((86, 140, 62), 8.5, 4.6, 9.4, 3.5, 11, 3.4, 10.2, 4.5)
    canvas.ellipse(6.1, 6.9, 6.9, 7.9, (244, 190, 182))
    canvas.blur(0.04)


DRAWINGS: dict[str, Callable[[_Canvas], None]] = {"house": _house, "boat": _boat, "apple": _apple}
