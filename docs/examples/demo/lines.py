"""The text that the demo sends: the lines of this project's own pages."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TypeAlias

PAGES = Path(__file__).parents[2]
Line: TypeAlias = dict[str, str | int]


def lines() -> list[Line]:
    """Return each line of the pages that is not blank, in the same random order each time."""
    found: list[Line] = []
    for path in sorted(PAGES.glob("*.md")):
        for number, text in enumerate(path.read_text("utf-8").splitlines(), 1):
            if text.strip():
                found.append({"page": path.stem, "number": number, "text": text})
    random.Random(1).shuffle(found)
    return found


def key_of(line: Line) -> str:
    """Return the key under which the applications store a line."""
    return f"line/{line['page']}/{line['number']}"


def counts_of(lines: Iterable[Line]) -> dict[str, int]:
    """Return the words of each page, under the key that the applications use."""
    counts = Counter[str]()
    for line in lines:
        counts[f"words/{line['page']}"] += len(str(line["text"]).split())
    return dict(counts)
