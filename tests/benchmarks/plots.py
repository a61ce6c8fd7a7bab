"""The plots of docs/images, drawn from the tables of docs/benchmarks.md: `python tests/benchmarks/plots.py`."""

from __future__ import annotations

import math
import re
from pathlib import Path

import svg
from svg import Bar, Role, Series

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "benchmarks.md"
IMAGES = ROOT / "docs" / "images"
OURS = "lab_state"
NONE = "-"
RATE = "writes a second, 100 tasks"
NOISE = 1e-3
BELOW_NOISE = "below noise"
"""A stall shorter than `NOISE`: the heartbeat cannot tell it from an idle event loop."""
MARK = "* survives SIGKILL, but not a power cut. All others survive both."
_UNITS = {"s": 1.0, "ms": 1e-3, "µs": 1e-6, "ns": 1e-9, "k": 1e3, "M": 1e6}

Rows = list[dict[str, str]]


def table_of(page: str, name: str) -> Rows:
    """Return the rows of a table between its markers, each by the heads of the columns."""
    block = re.search(rf"<!-- bench: {name} -->\n\n(.*?)\n<!-- end -->", page, re.DOTALL)
    if block is None:
        raise ValueError(f"the page has no table {name!r}: <!-- bench: {name} --> ... <!-- end -->")
    head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in block[1].splitlines()]
    return [dict(zip(head, row, strict=True)) for row in rows]


def number(cell: str) -> float:
    """Return the number that a cell begins with, times its unit: `1.6 ms (7.9 x)` is 0.0016."""
    figure, *unit = cell.split(" ")
    return float(figure.replace(",", "")) * (_UNITS[unit[0]] if unit else 1)


def stall_text(seconds: float) -> str:
    """Return a stall as text."""
    return svg.duration(seconds) if seconds >= NOISE else BELOW_NOISE


def rounded(figure: float) -> str:
    """Return a number with two digits, since more would mean nothing."""
    return f"{int(round(figure, 1 - math.floor(math.log10(figure)))) if figure else 0:,}"


def role(name: str) -> Role:
    return "ours" if name == OURS else "dumps" if name.startswith("dict") else "others"


def marked(row: dict[str, str]) -> str:
    """Return the name, with a mark if a change that returned can still be lost."""
    return row[""] + ("" if row["survives"] == "power cut" else " *")


def by_size(rows: Rows) -> tuple[list[str], Rows]:
    """Return the columns of sizes, and the rows that have a figure for the largest."""
    sizes = [head for head in rows[0] if head.endswith(" keys")]
    return sizes, [row for row in rows if row[sizes[-1]] != NONE]


def change(page: str) -> str:
    sizes, rows = by_size(table_of(page, "sizes"))
    series = [Series(marked(row), role(row[""]), {number(size): number(row[size]) for size in sizes}) for row in rows]
    series.sort(key=lambda one: -max(one.values.items())[1])
    return svg.lines("Time to make one change durable, by the size of the state", "keys in the state", series)


def stall(page: str) -> str:
    sizes, rows = by_size(table_of(page, "stalls"))
    largest = sizes[-1]
    found = [(None if row[largest] == BELOW_NOISE else number(row[largest]), row) for row in rows]
    found.sort(key=lambda one: (one[0] or 0, one[1][""] != OURS))
    return svg.bars(
        f"Longest stall of the event loop during one durable change, {largest}",
        [
            "Logarithmic scale, from 1 ms on. Shorter is better.",
            "Below noise: under 1 ms, too short to tell from an idle event loop.",
        ],
        [Bar(marked(row), role(row[""]), value, row[largest]) for value, row in found],
        low=NOISE,
    )


def writes(page: str) -> str:
    rows = sorted(table_of(page, "writes"), key=lambda row: -number(row[RATE]))
    return svg.bars(
        "Durable writes a second, from 100 tasks at once",
        ["Longer is better.", MARK],
        [Bar(marked(row), role(row[""]), number(row[RATE]), rounded(number(row[RATE]))) for row in rows],
    )


PLOTS = {"change": change, "stall": stall, "writes": writes}


def draw() -> None:
    """Draw each plot from the page as it is."""
    IMAGES.mkdir(exist_ok=True)
    for name, plot in PLOTS.items():
        (IMAGES / f"{name}.svg").write_text(plot(PAGE.read_text()))


if __name__ == "__main__":
    draw()
