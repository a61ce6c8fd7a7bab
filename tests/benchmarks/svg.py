"""Two kinds of plots as SVG: text stays text, and mid colours on no background read on light and on dark."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import cycle, pairwise
from typing import NamedTuple
from xml.sax.saxutils import escape

INK = "#6e7781"
OURS, DUMPS, OTHERS = "#2f81f7", "#d9730d", "#8b949e"
_FONT = "font-family:system-ui,-apple-system,'Segoe UI',Helvetica,Arial,sans-serif;font-size:13px"
_LINE = 17
_DASHES = ("", "7 3", "2 3", "7 3 2 3", "12 4", "4 2", "1 2", "12 3 3 3")
"""What tells lines of one colour apart where they cross."""


class Series(NamedTuple):
    """A line or a bar: its name, its colour, and its value at each place."""

    name: str
    colour: str
    values: Mapping[float, float]


class Drawing:
    """Shapes, and how they are written down."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self._size = (width, height)
        self._title = title
        self._shapes: list[str] = []

    def text(
        self, x: float, y: float, text: str, colour: str = INK, *, anchor: str = "start", bold: bool = False
    ) -> None:
        weight = ' font-weight="600"' if bold else ""
        self._shapes.append(
            f'<text x="{x:.1f}" y="{y:.1f}" fill="{colour}" text-anchor="{anchor}"{weight}>{escape(text)}</text>'
        )

    def line(
        self, points: Sequence[tuple[float, float]], colour: str, width: float, opacity: float = 1, dash: str = ""
    ) -> None:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        dashed = f' stroke-dasharray="{dash}"' if dash else ""
        self._shapes.append(
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{width}" '
            f'stroke-opacity="{opacity}" stroke-linejoin="round"{dashed}/>'
        )

    def dot(self, x: float, y: float, colour: str) -> None:
        self._shapes.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"/>')

    def bar(self, x: float, y: float, width: float, height: float, colour: str) -> None:
        self._shapes.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(width, 1):.1f}" height="{height}" rx="2" fill="{colour}"/>'
        )

    def __str__(self) -> str:
        width, height = self._size
        shapes = "\n".join(self._shapes)
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
            f'role="img" style="{_FONT}">\n<title>{escape(self._title)}</title>\n{shapes}\n</svg>\n'
        )


def short(number: float) -> str:
    """Return a number as 1 k, 10 k or 1 M."""
    for unit, name in ((1e6, " M"), (1e3, " k")):
        if number >= unit:
            return f"{number / unit:g}{name}"
    return f"{number:g}"


def duration(seconds: float) -> str:
    seconds = float(f"{seconds:.2g}")
    for unit, name in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if seconds >= unit:
            return f"{seconds / unit:g} {name}"
    return f"{seconds * 1e9:g} ns"


def _decades(low: float, high: float) -> list[float]:
    return [10.0**power for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]


def _apart(wanted: list[float]) -> list[float]:
    """Return places for labels near where they belong, none on another; two that are too near give way equally."""
    order = sorted(range(len(wanted)), key=wanted.__getitem__)
    places = list(wanted)
    for _ in range(200):
        for before, after in pairwise(order):
            too_near = _LINE - (places[after] - places[before])
            if too_near > 0:
                places[before] -= too_near / 2
                places[after] += too_near / 2
    return places


def lines(title: str, across: str, series: Sequence[Series]) -> str:
    """Draw durations over sizes, both logarithmic, each line with its name at its end."""
    left, right, top, bottom, width, height = 70, 225, 40, 50, 780, 420
    ticks_x = sorted({x for one in series for x in one.values})
    values = [value for one in series for value in one.values.values()]
    ticks_y = _decades(min(values), max(values))
    drawing = Drawing(width, height, title)
    drawing.text(left, 22, title, bold=True)

    def place(value: float, ticks: Sequence[float], low: float, high: float) -> float:
        span = math.log10(ticks[-1] / ticks[0])
        return low + (high - low) * math.log10(value / ticks[0]) / span

    def at(x: float, y: float) -> tuple[float, float]:
        return place(x, ticks_x, left, width - right), place(y, ticks_y, height - bottom, top)

    for tick in ticks_y:
        y = at(ticks_x[0], tick)[1]
        drawing.line([(left, y), (width - right, y)], INK, 1, 0.3)
        drawing.text(left - 8, y + 4, duration(tick), anchor="end")
    for tick in ticks_x:
        drawing.text(at(tick, ticks_y[0])[0], height - bottom + 20, short(tick), anchor="middle")
    drawing.text((left + width - right) / 2, height - 8, across, anchor="middle")
    ends = [at(*max(one.values.items())) for one in series]
    dashes = cycle(_DASHES)
    for one, end, y in zip(series, ends, _apart([end[1] for end in ends]), strict=True):
        bold = one.colour == OURS
        points = [at(*point) for point in sorted(one.values.items())]
        drawing.line(points, one.colour, 3.5 if bold else 2, dash=next(dashes) if one.colour == OTHERS else "")
        drawing.dot(*end, one.colour)
        label = f"{one.name}, {duration(max(one.values.items())[1])}"
        drawing.text(width - right + 14, y + 4, label, bold=bold)
    return str(drawing)


def bars(title: str, below: str, series: Sequence[tuple[str, str, float, str]], *, logarithmic: bool = False) -> str:
    """Draw one bar each, from the left: its name, its colour, its length, and the text after it."""
    left, right, top, step, width = 210, 110, 40, 28, 760
    height = top + step * len(series) + 34
    drawing = Drawing(width, height, title)
    drawing.text(12, 22, title, bold=True)
    longest = max(value for _, _, value, _ in series)
    ticks = _decades(max(min(value for _, _, value, _ in series), longest / 1e6), longest)
    for number, (name, colour, value, written) in enumerate(series):
        y = top + step * number
        share = value / longest
        if logarithmic:
            share = max(0.0, math.log10(max(value, ticks[0]) / ticks[0]) / math.log10(longest / ticks[0]))
        length = (width - left - right) * share
        drawing.text(left - 10, y + 15, name, anchor="end", bold=colour == OURS)
        drawing.bar(left, y + 3, length, 17, colour)
        drawing.text(left + max(length, 1) + 8, y + 16, written, bold=colour == OURS)
    drawing.text(12, height - 12, below)
    return str(drawing)
