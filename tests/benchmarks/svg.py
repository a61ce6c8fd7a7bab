"""Two kinds of plots as SVG. Text stays text. A plot has its own background, and colours for light and for dark.

No single colour has a contrast of 4.5 : 1 on white and on the dark background of the site. So each plot paints its
background, and takes the colours of the reader's colour scheme. It stays legible on a page of the other scheme.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import cycle, pairwise
from typing import Literal, NamedTuple
from xml.sax.saxutils import escape

Role = Literal["ink", "ours", "dumps", "others"]
PAPER = "paper"
LIGHT = {PAPER: "#ffffff", "ink": "#57606a", "ours": "#0969da", "dumps": "#b34700", "others": "#57606a"}
DARK = {PAPER: "#131416", "ink": "#b1bac4", "ours": "#58a6ff", "dumps": "#f0883e", "others": "#b1bac4"}
SIZE = 14
_LINE = 19
_FONT = f"font-family:system-ui,-apple-system,'Segoe UI',Helvetica,Arial,sans-serif;font-size:{SIZE}px"
_DASHES = ("7 3", "2 3", "7 3 2 3", "12 4", "4 2", "12 3 3 3")
# Around the point 0,0: circle, square, triangle, diamond, triangle that points down, plus, cross.
_MARKS = (
    "M-5,0a5,5 0 1,0 10,0a5,5 0 1,0 -10,0z",
    "M-4.5,-4.5h9v9h-9z",
    "M0,-6l6,10h-12z",
    "M0,-6.5l6.5,6.5l-6.5,6.5l-6.5,-6.5z",
    "M0,6l6,-10h-12z",
    "M-2,-6h4v4h4v4h-4v4h-4v-4h-4v-4h4z",
    "M-6,-3l3,-3l3,3l3,-3l3,3l-3,3l3,3l-3,3l-3,-3l-3,3l-3,-3l3,-3z",
)


class Series(NamedTuple):
    """A line: its name, its role, and its value at each place."""

    name: str
    role: Role
    values: Mapping[float, float]


class Bar(NamedTuple):
    """A bar: its name, its role, its length, and the text after it. Without a length there is only the text."""

    name: str
    role: Role
    value: float | None
    text: str


class Drawing:
    """Shapes, and how they are written down."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self._size = (width, height)
        self._title = title
        self._shapes: list[str] = []
        self.text(12, 24, title, bold=True)

    def text(
        self, x: float, y: float, text: str, role: Role = "ink", *, anchor: str = "start", bold: bool = False
    ) -> None:
        weight = ' font-weight="600"' if bold else ""
        self._shapes.append(
            f'<text class="{role}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{weight}>{escape(text)}</text>'
        )

    def line(
        self, points: Sequence[tuple[float, float]], role: Role, width: float, opacity: float = 1, dash: str = ""
    ) -> None:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        dashed = f' stroke-dasharray="{dash}"' if dash else ""
        self._shapes.append(
            f'<polyline class="{role} line" points="{path}" stroke-width="{width}" '
            f'stroke-opacity="{opacity}" stroke-linejoin="round"{dashed}/>'
        )

    def mark(self, x: float, y: float, role: Role, shape: str) -> None:
        full = " full" if role == "ours" else ""
        self._shapes.append(f'<path class="{role} mark{full}" d="{shape}" transform="translate({x:.1f},{y:.1f})"/>')

    def bar(self, x: float, y: float, width: float, height: float, role: Role) -> None:
        self._shapes.append(
            f'<rect class="{role}" x="{x:.1f}" y="{y:.1f}" width="{max(width, 1):.1f}" height="{height}" rx="2"/>'
        )

    def __str__(self) -> str:
        width, height = self._size
        shapes = "\n".join(self._shapes)
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
            f'role="img" style="{_FONT}">\n<title>{escape(self._title)}</title>\n<style>\n{_style(LIGHT)}\n'
            f"@media (prefers-color-scheme: dark) {{\n{_style(DARK)}\n}}\n"
            ".line { fill: none; stroke: currentColor } .mark { stroke: currentColor; stroke-width: 1.5 }\n"
            ".full { fill: currentColor } text, rect { fill: currentColor }\n</style>\n"
            f'<rect class="{PAPER}" width="{width}" height="{height}" rx="6"/>\n{shapes}\n</svg>\n'
        )


def _style(colours: Mapping[str, str]) -> str:
    roles = " ".join(f".{role} {{ color: {colour} }}" for role, colour in colours.items())
    return f"{roles} .mark {{ fill: {colours[PAPER]} }}"


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


def _apart(wanted: list[float], lowest: float) -> list[float]:
    """Return places for labels near where they belong, a line apart and none below the lowest."""
    order = sorted(range(len(wanted)), key=wanted.__getitem__)
    places = list(wanted)
    for _ in range(200):
        for before, after in pairwise(order):
            too_near = _LINE - (places[after] - places[before])
            if too_near > 0:
                places[before] -= too_near / 2
                places[after] += too_near / 2
    for index in reversed(order):
        places[index] = min(places[index], lowest)
        lowest = places[index] - _LINE
    return places


def lines(title: str, across: str, series: Sequence[Series]) -> str:
    """Draw durations over sizes, both logarithmic. Each line has a mark of its own, and its name at its end."""
    left, right, top, bottom, width, height = 70, 260, 50, 62, 710, 480
    ticks_x = sorted({x for one in series for x in one.values})
    values = [value for one in series for value in one.values.values()]
    ticks_y = _decades(min(values), max(values))
    drawing = Drawing(width, height, title)

    def place(value: float, ticks: Sequence[float], low: float, high: float) -> float:
        span = math.log10(ticks[-1] / ticks[0])
        return low + (high - low) * math.log10(value / ticks[0]) / span

    def at(x: float, y: float) -> tuple[float, float]:
        return place(x, ticks_x, left, width - right), place(y, ticks_y, height - bottom, top)

    for tick in ticks_y:
        y = at(ticks_x[0], tick)[1]
        drawing.line([(left, y), (width - right, y)], "ink", 1, 0.3)
        drawing.text(left - 12, y + 5, duration(tick), anchor="end")
    for tick in ticks_x:
        drawing.text(at(tick, ticks_y[0])[0], height - bottom + 24, short(tick), anchor="middle")
    drawing.text((left + width - right) / 2, height - 12, across, anchor="middle")
    ends = [at(*max(one.values.items())) for one in series]
    labels = _apart([end[1] for end in ends], height - bottom)
    dashes, marks = cycle(_DASHES), cycle(_MARKS)
    drawn = [(one, end, y, next(dashes), next(marks)) for one, end, y in zip(series, ends, labels, strict=True)]
    for one, end, y, dash, mark in sorted(drawn, key=lambda one: one[0].role == "ours"):  # ours above the others
        ours = one.role == "ours"
        points = [at(*point) for point in sorted(one.values.items())]
        beside = (width - right + 26, y)
        drawing.line([end, beside], "ink", 1, 0.5)
        drawing.line(points, one.role, 3.5 if ours else 2, dash="" if ours else dash)
        for point in [*points, beside]:
            drawing.mark(*point, one.role, mark)
        label = f"{one.name}, {duration(max(one.values.items())[1])}"
        drawing.text(beside[0] + 14, y + 5, label, bold=ours)
    return str(drawing)


def bars(title: str, below: Sequence[str], series: Sequence[Bar], *, low: float | None = None) -> str:
    """Draw one bar each, from the left, and lines of text below them. With `low`, they are logarithmic from there on."""
    left, right, top, step, width = 170, 100, 44, 29, 620
    height = top + step * len(series) + 12 + 20 * len(below)
    drawing = Drawing(width, height, title)
    longest = max(one.value for one in series if one.value is not None)
    for number, one in enumerate(series):
        y = top + step * number
        ours = one.role == "ours"
        drawing.text(left - 10, y + 17, one.name, anchor="end", bold=ours)
        length = 0.0
        if one.value is not None:
            share = math.log10(one.value / low) / math.log10(longest / low) if low else one.value / longest
            length = (width - left - right) * share
            drawing.bar(left, y + 3, length, 18, one.role)
        drawing.text(left + length + 8, y + 17, one.text, bold=ours)
    for number, line in enumerate(below):
        drawing.text(12, top + step * len(series) + 18 + 20 * number, line)
    return str(drawing)
