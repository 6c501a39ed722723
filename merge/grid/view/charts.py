"""Charts of a page: where every line, dot and word of an SVG goes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from merge.verify.document import number

COLORS = 6  # that are told apart; with more lines only the one that matters has a color

_CHARACTER = 7.6  # widest usual width of a letter of the charts' 13 px, in px
_TEXT_HEIGHT = 17
_GUIDE_Y = 14
_GUIDE_GAP = 6
_ROW_HEIGHT = 30
_LONGEST_NAME = 17  # letters of a row's name; the whole is in its title


@dataclass(frozen=True, slots=True)
class Point:
    """One value.

    Attributes:
        x: On the axis; of a row, unused.
        y: The value.
        title: Shown when the pointer rests on it.
        low: Where its interval begins, if it has one.
        high: Where its interval ends.
        is_best: Whether it is the one that was found best.
    """

    x: float
    y: float
    title: str
    low: float | None = None
    high: float | None = None
    is_best: bool = False


@dataclass(frozen=True, slots=True)
class Line:
    """Values that belong together.

    Attributes:
        name: In the legend.
        points: In any order.
        color: Class of its color.
        is_banded: Whether the intervals are drawn.
    """

    name: str
    points: tuple[Point, ...]
    color: str = "c0"
    is_banded: bool = False


@dataclass(frozen=True, slots=True)
class Text:
    """A word and where it stands."""

    x: float
    y: float
    text: str
    anchor: str = "middle"
    title: str = ""


@dataclass(frozen=True, slots=True)
class Dot:
    """A mark, a hint for the pointer, and its class."""

    x: float
    y: float
    title: str
    kind: str = ""


@dataclass(frozen=True, slots=True)
class Stroke:
    """A line of a chart and the band around it, as the data of two paths."""

    color: str
    path: str
    band: str
    dots: tuple[Dot, ...]


@dataclass(frozen=True, slots=True)
class Drawing:
    """A chart, ready to be written down.

    Attributes:
        width: In px.
        height: In px.
        label: What a screen reader says.
        strokes: Lines, the last on top.
        rules: Thin lines of the ground: x0, y0, x1, y1.
        guides: Dashed lines: x0, y0, x1, y1.
        texts: All words.
        picks: Marks on the axis.
    """

    width: float
    height: float
    label: str
    strokes: tuple[Stroke, ...]
    rules: tuple[tuple[float, float, float, float], ...]
    guides: tuple[tuple[float, float, float, float], ...]
    texts: tuple[Text, ...]
    picks: tuple[Dot, ...] = ()


def color_of(index: int, count: int, is_important: bool) -> str:
    """Return the color of one of several lines."""
    if count <= COLORS:
        return f"c{index}"
    return "c0" if is_important else "rest"


def draw_curves(
    lines: Sequence[Line],
    *,
    label: str,
    x_name: str,
    size: tuple[int, int] = (320, 190),
    ticks: int = 2,
    guides: Iterable[tuple[float, str]] = (),
    picks: Sequence[float] = (),
) -> Drawing:
    """Draw lines over a numeric axis.

    Args:
        lines: At least one, with at least one point.
        label: What a screen reader says.
        x_name: Of the axis.
        size: In px.
        ticks: 2 for the lowest and highest value, else about so many round ones.
        guides: Values of the axis that get a dashed line, and its name.
        picks: Values that are marked on the axis; equal ones are stacked.
    """
    width, height = size
    guides = list(guides)
    points = [point for line in lines for point in line.points]
    banded = [point for line in lines if line.is_banded for point in line.points]
    ys = [point.y for point in points] + [
        bound for point in banded for bound in (point.low, point.high) if bound is not None
    ]
    y_values = _ticks(min(ys), max(ys), ticks)
    left = 12 + _CHARACTER * max(len(number(value)) for value in y_values)
    stacked = max((list(picks).count(value) for value in picks), default=0)
    bottom = height - 2 * _TEXT_HEIGHT - 8
    floor = bottom - 10 - 9 * stacked
    xs = [point.x for point in points]
    to_x = _scale([*xs, *picks, *(x for x, _ in guides)], left + 8, width - 14)
    named = _guide_texts(guides, to_x, width)
    top = 12.0 if not named else max(text.y for text in named) + 12
    to_y = _scale(ys, floor, top)
    best = [point.x for point in points if point.is_best]
    texts = [
        *(Text(left - 6, to_y(value) + 4.5, number(value), "end") for value in y_values),
        *_x_texts([min(xs), max(xs), *best, *sorted(set(xs))], to_x, bottom + 17, width),
        Text((left + width) / 2, height - 5, x_name),
        *named,
    ]
    return Drawing(
        width,
        height,
        label,
        tuple(_stroke(line, to_x, to_y) for line in _important_last(lines)),
        (*((left, to_y(v), width, to_y(v)) for v in y_values), (left, bottom, width, bottom)),
        tuple((to_x(x), top - 6, to_x(x), bottom) for x, _ in guides),
        tuple(texts),
        tuple(_stack(picks, to_x, bottom)),
    )


def draw_rows(rows: Sequence[tuple[str, Line]], *, label: str, width: int = 320) -> Drawing:
    """Draw the values of each name as dots in a row of its own.

    Args:
        rows: Name and values.
        label: What a screen reader says.
        width: In px.
    """
    values = [point.y for _, line in rows for point in line.points]
    longest = max(min(len(name), _LONGEST_NAME) for name, _ in rows)
    left = 8 + _CHARACTER * longest
    to_x = _scale(values, left + 10, width - 12)
    bottom = 6 + _ROW_HEIGHT * len(dict(rows))
    centers = {name: 6 + _ROW_HEIGHT * (index + 0.5) for index, name in enumerate(dict(rows))}
    low, high = min(values), max(values)
    ends = [Text(to_x(low), bottom + 15, number(low), "start")]
    if number(low) != number(high):
        ends.append(Text(to_x(high), bottom + 15, number(high), "end"))
    strokes = []
    for name, line in rows:
        dots = tuple(
            Dot(to_x(p.y), centers[name], p.title, "best" if p.is_best else "") for p in line.points
        )
        strokes.append(Stroke(line.color, "", "", dots))
    names = [Text(left - 6, y + 4.5, _shorten(name), "end", name) for name, y in centers.items()]
    return Drawing(
        width,
        bottom + 22,
        label,
        tuple(strokes),
        tuple((left, y, width, y) for y in centers.values()),
        (),
        (*names, *ends),
    )


def _shorten(name: str) -> str:
    return name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 1]}…"


class _Scale:
    """A line from values to px; a range of one value is put in the middle."""

    def __init__(self, low: float, high: float, start: float, end: float) -> None:
        self._low, self._span = low, high - low
        self._start, self._end = start, end

    def __call__(self, value: float) -> float:
        share = (value - self._low) / self._span if self._span > 0 else 0.5
        return round(self._start + share * (self._end - self._start), 1)


def _scale(values: Sequence[float], start: float, end: float) -> _Scale:
    return _Scale(min(values), max(values), start, end)


def _ticks(low: float, high: float, count: int) -> list[float]:
    span = high - low
    if count <= 2 or span <= 0:
        return [low] if number(low) == number(high) else [low, high]
    rough = span / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    first = math.ceil(low / step)
    return [index * step for index in range(first, math.floor(high / step) + 1)]


def _x_texts(values: Sequence[float], to_x: _Scale, y: float, width: float) -> list[Text]:
    """Return names of as many values as have room, those that matter first."""
    placed: dict[float, tuple[float, float]] = {}
    for value in values:
        if value in placed:
            continue
        half = _CHARACTER * len(number(value)) / 2
        middle = min(to_x(value), width - half)
        if all(abs(middle - other) >= half + size + 8 for other, size in placed.values()):
            placed[value] = (middle, half)
    return [Text(round(middle, 1), y, number(v)) for v, (middle, _) in placed.items()]


def _guide_texts(guides: Sequence[tuple[float, str]], to_x: _Scale, width: float) -> list[Text]:
    """Return the names of dashed lines: to the left of the first, to the right of the last.

    One that has no room there goes to the other side, in a line of its own.
    """
    texts = []
    last = max((x for x, _ in guides), default=0.0)
    for x, name in sorted(guides):
        place, length = to_x(x), _CHARACTER * len(name) + _GUIDE_GAP
        is_left = x < last
        has_room = place >= length if is_left else place + length <= width
        y = _GUIDE_Y if has_room else _GUIDE_Y + _TEXT_HEIGHT
        if is_left == has_room:
            texts.append(Text(place - _GUIDE_GAP, y, name, "end"))
        else:
            texts.append(Text(place + _GUIDE_GAP, y, name, "start"))
    return texts


def _important_last(lines: Sequence[Line]) -> list[Line]:
    return sorted(lines, key=lambda line: (line.color != "rest", line.is_banded))


def _stroke(line: Line, to_x: _Scale, to_y: _Scale) -> Stroke:
    points = sorted(line.points, key=lambda point: point.x)
    band = ""
    if line.is_banded:
        upper = [(p.x, p.high) for p in points if p.low is not None and p.high is not None]
        lower = [(p.x, p.low) for p in points if p.low is not None and p.high is not None]
        around = [(to_x(x), to_y(y)) for x, y in (*upper, *reversed(lower)) if y is not None]
        band = _path(around)
    dots = (Dot(to_x(p.x), to_y(p.y), p.title, "best" if p.is_best else "") for p in points)
    return Stroke(line.color, _path((to_x(p.x), to_y(p.y)) for p in points), band, tuple(dots))


def _path(places: Iterable[tuple[float, float]]) -> str:
    corners = " L".join(f"{x:g} {y:g}" for x, y in places)
    return f"M{corners}" if corners else ""


def _stack(picks: Sequence[float], to_x: _Scale, bottom: float) -> list[Dot]:
    return [
        Dot(to_x(pick), bottom - 6 - 9 * list(picks[:index]).count(pick), number(pick))
        for index, pick in enumerate(picks)
    ]
