"""The plots of docs/images: drawn from the tables of docs/benchmarks.md, and legible on light and on dark."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from xml.etree import ElementTree as ET

import pages
import plots
import pytest
import svg

IMAGES = sorted(plots.IMAGES.glob("*.svg"))
NAMESPACE = "{http://www.w3.org/2000/svg}"
CHARACTER = 0.56
"""The mean width of a character, in heights of the font; DejaVu Sans has 0.54."""
BOLD = 1.12

every_plot = pytest.mark.parametrize("image", IMAGES, ids=lambda image: image.stem)


def luminance(colour: str) -> float:
    """Return the relative luminance of WCAG 2."""
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    red, green, blue = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def boxes(image: Path) -> dict[tuple[str, float], tuple[float, float, float, float]]:
    """Return left, top, right and bottom of each text, by the text and its height."""
    found = {}
    for text in ET.parse(image).iter(f"{NAMESPACE}text"):
        content, x, y = text.text or "", float(text.get("x", 0)), float(text.get("y", 0))
        width = len(content) * svg.SIZE * CHARACTER * (BOLD if text.get("font-weight") else 1)
        left = x - {"start": 0.0, "middle": width / 2, "end": width}[text.get("text-anchor", "start")]
        found[content, y] = (left, y - svg.SIZE * 0.8, left + width, y + svg.SIZE * 0.25)
    return found


def test_there_is_a_plot_for_each_drawing() -> None:
    """docs/images has the plots of `plots.py`, and no other."""
    assert [image.stem for image in IMAGES] == sorted(plots.PLOTS)


@every_plot
def test_a_plot_shows_the_figures_of_the_page(image: Path) -> None:
    """A plot is what `python tests/benchmarks/plots.py` draws from the tables as they are."""
    assert image.read_text() == plots.PLOTS[image.stem](plots.PAGE.read_text())


@every_plot
def test_no_label_is_on_another_or_cut_off(image: Path) -> None:
    """No two texts overlap, and each is within the picture."""
    _, _, width, height = map(float, (ET.parse(image).getroot().get("viewBox") or "").split())
    found = boxes(image)
    assert len(found) >= 9
    for (one, first), (other, second) in itertools.combinations(found.items(), 2):
        apart = first[2] <= second[0] or second[2] <= first[0] or first[3] <= second[1] or second[3] <= first[1]
        assert apart, (one, other)
    for name, (left, top, right, bottom) in found.items():
        assert 0 <= left < right <= width, name
        assert 0 <= top < bottom <= height, name


@pytest.mark.parametrize("colours", [svg.LIGHT, svg.DARK], ids=["light", "dark"])
def test_colours_have_contrast(colours: dict[str, str]) -> None:
    """Each colour of a plot has a contrast of at least 4.5 : 1 on the background of the plot."""
    assert {role: contrast(colour, colours[svg.PAPER]) >= 4.5 for role, colour in colours.items()} == {
        role: role != svg.PAPER for role in colours
    }


@every_plot
def test_a_plot_has_its_own_background_and_both_schemes(image: Path) -> None:
    """A plot paints its background first, and has the colours for light and for dark."""
    root = ET.parse(image).getroot()
    shapes = [shape for shape in root if shape.tag not in {f"{NAMESPACE}title", f"{NAMESPACE}style"}]
    assert (shapes[0].get("class"), shapes[0].get("width")) == (svg.PAPER, root.get("width"))
    style = root.findtext(f"{NAMESPACE}style") or ""
    for colours in (svg.LIGHT, svg.DARK):
        assert all(f".{role} {{ color: {colour} }}" in style for role, colour in colours.items())
    assert "prefers-color-scheme: dark" in style
    assert re.findall(r'(?:fill|stroke)="#', image.read_text()) == []


def test_lines_differ_without_colour() -> None:
    """Each line of a plot has a mark of its own, and that mark beside its label."""
    root = ET.parse(plots.IMAGES / "change.svg").getroot()
    marks = [str(mark.get("d")) for mark in root.iter(f"{NAMESPACE}path")]
    sizes, rows = plots.by_size(plots.table_of(plots.PAGE.read_text(), "sizes"))
    assert len(set(marks)) == len(rows)
    assert {marks.count(mark) for mark in marks} == {len(sizes) + 1}


def test_a_stall_below_noise_has_no_bar() -> None:
    """A stall that cannot be measured says so, and only the others have a bar."""
    rows = plots.by_size(plots.table_of(plots.PAGE.read_text(), "stalls"))[1]
    below = sum(plots.BELOW_NOISE in row.values() and row["1 M keys"] == plots.BELOW_NOISE for row in rows)
    root = ET.parse(plots.IMAGES / "stall.svg").getroot()
    assert [text.text for text in root.iter(f"{NAMESPACE}text")].count(plots.BELOW_NOISE) == below > 0
    assert len(list(root.iter(f"{NAMESPACE}rect"))) == 1 + len(rows) - below
    assert [plots.stall_text(seconds) for seconds in (-0.0006, 0.0004, 0.0011)] == [
        "below noise",
        "below noise",
        "1.1 ms",
    ]


def test_cells_are_read_as_numbers() -> None:
    """A cell of a table gives the number that it shows, with its unit; a page without the table is an error."""
    cells = ("1.6 ms (7.9 x)", "200 µs (1 x)", "142,401", "1 M keys", "920 ns")
    assert [plots.number(cell) for cell in cells] == pytest.approx([1.6e-3, 2e-4, 142401, 1e6, 9.2e-7])
    with pytest.raises(ValueError, match="no table 'sizes'"):
        plots.table_of("# Figures\n", "sizes")


def test_a_run_writes_the_tables_that_the_page_has() -> None:
    """Each table of a run has the heads of that table in the page, from which the plots are drawn."""
    once = {"get": 1e-6, "set": 1e-6, "get stall": 0.0, "set stall": -0.1}
    durable = {"one": 1e-4, "hundred": 1e4, "p99": 1e-3, "one stall": 0.0, "hundred stall": 0.1}
    sized = {"change": 1e-4, "stall": 1e-2, "written": 40.0, "start": 1e-3}
    run = {
        "peers": [{"name": plots.OURS, "survives": "power cut", "setup": "as it comes"}],
        "numbers": {
            "operations": {loop: {plots.OURS: once} for loop in ("asyncio", "uvloop")},
            "writes": {loop: {plots.OURS: durable} for loop in ("asyncio", "uvloop")},
            "sizes": {size: {plots.OURS: sized} for size in ("1000", "10000", "100000", "1000000")},
            "footprint": {plots.OURS: {"keys": 1000, "ratio": 2.9, "import": 0.1}},
            "growth": {
                "counts": [1000, 100_000, 1_000_000],
                "rows": [{"call": "get", "cost": "O(1)", "seconds": [1e-6] * 3, "grows": False}],
            },
            "scan": {"scans": {plots.OURS: {"10": 1e-5, "1000": 1e-3}}, "setup": {plots.OURS: "get_all(prefix)"}},
        },
        "checks": {},
        "machines": {},
    }
    drawn = pages.drawn(run)
    assert drawn.keys() == pages.TABLES.keys()
    for name in drawn.keys() - {"machine"}:
        heads = [cell.strip() for cell in drawn[name].splitlines()[0].strip("|").split("|")]
        assert heads == list(plots.table_of(plots.PAGE.read_text(), name)[0]), name


def test_rows_of_one_part() -> None:
    """The rows of a part replace those for the same work, and new ones follow at the end. Nothing else changes."""
    page = plots.PAGE.read_text()
    first = pages.checks({"checks": {"hot": [{"work": "first", "reached": "1", "bound": "", "met": True}]}})
    changed = pages.with_rows(page, ["| get of a scalar, set here / awaited dict lookup | 9 | <= 2 | **no** |"])
    assert pages.with_rows(changed, first.splitlines()[2:]) == changed.replace(
        "\n\n<!-- end -->\n\n## Half an hour", "\n| first | 1 |  |  |\n\n<!-- end -->\n\n## Half an hour"
    )
    lines = set(changed.splitlines()) ^ set(page.splitlines())
    assert {line.split(" | ")[0] for line in lines} == {"| get of a scalar, set here / awaited dict lookup"}
    assert pages.with_rows(page, []) == page
