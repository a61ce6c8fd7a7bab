"""Texts for people: escaped keys, sizes, ages, and tables. This module does no I/O."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from datetime import UTC, datetime

_SHORT = {"\n": "\\n", "\r": "\\r", "\t": "\\t", "\\": "\\\\"}
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
_STEP = 1024
_AGES = ((86400, "d"), (3600, "h"), (60, "m"))
_LARGEST_TEN = 10


def shown(text: str, encoding: str = "utf-8") -> str:
    r"""Return a text in one line, which a terminal shows as it is. A backslash is doubled, so different texts have different results.

    A character that cannot be printed, or that the encoding does not have, is escaped: `\n`, `\x1b`, `\u202e`.
    """
    escaped = "".join(_SHORT.get(char) or (char if char.isprintable() else _escape(char)) for char in text)
    return escaped.encode(encoding, "backslashreplace").decode(encoding)


def as_utf8(path: str) -> str:
    r"""Return a path in a form that JSON can have: a byte that is not UTF-8 is escaped, such as `\udcff`."""
    return path.encode("utf-8", "backslashreplace").decode()


def shown_json(text: str, encoding: str = "utf-8") -> str:
    r"""Return JSON as a terminal may show it: the same JSON, with `\u…` in place of each character that cannot be printed.

    If the encoding is not one of Unicode, each character that is not ASCII is escaped, too.
    Line breaks between values are kept. Inside a string, JSON has no line break.
    """
    if text.isascii() and text.replace("\n", "").isprintable():
        return text
    plain = _is_plain if codecs.lookup(encoding).name.startswith("utf") else _is_plain_ascii
    return "".join(char if plain(char) else _escape_json(char) for char in text)


def _is_plain(char: str) -> bool:
    return char == "\n" or char.isprintable()


def _is_plain_ascii(char: str) -> bool:
    return _is_plain(char) and char.isascii()


def _escape_json(char: str) -> str:
    units = char.encode("utf-16-be")
    return "".join(f"\\u{units[at]:02x}{units[at + 1]:02x}" for at in range(0, len(units), 2))


def _escape(char: str) -> str:
    number = ord(char)
    if number <= 0xFF:  # noqa: PLR2004 -- two digits
        return f"\\x{number:02x}"
    return f"\\u{number:04x}" if number <= 0xFFFF else f"\\U{number:08x}"  # noqa: PLR2004 -- four digits


def counted(count: int, noun: str) -> str:
    """Return a number with a noun: `1 key`, `2 keys`. The argument `noun` is in the singular."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def changes_text(first: int, last: int) -> str:
    """Return the words for the changes between two revisions, both included: `change 3`, `changes 3 to 5`."""
    return f"change {first}" if first == last else f"changes {first} to {last}"


def size_text(count: float) -> str:
    """Return a number of bytes with a unit: `512 B`, `1.5 MiB`."""
    unit = 0
    while count >= _STEP and unit < len(_UNITS) - 1:
        count /= _STEP
        unit += 1
    return f"{count:.1f} {_UNITS[unit]}" if unit and count < _LARGEST_TEN else f"{count:.0f} {_UNITS[unit]}"


def age_text(seconds: float) -> str:
    """Return a time span with one unit: `12s`, `5m`, `3h`, `2d`."""
    for length, unit in _AGES:
        if seconds >= length:
            return f"{seconds / length:.0f}{unit}"
    return f"{max(0.0, seconds):.0f}s"


def time_text(milliseconds: int | None) -> str:
    """Return a time in ISO 8601, in UTC; empty if it is not known."""
    if not milliseconds:
        return ""
    try:
        moment = datetime.fromtimestamp(milliseconds / 1000, UTC)
    except (ValueError, OverflowError, OSError):  # a time of year 10,000 or later
        return f"{milliseconds} ms"
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def live_text(live: bool | None) -> str:  # noqa: FBT001 -- one value that is shown
    """Return the text for `StateView.live`."""
    return {True: "running", False: "stopped", None: "unknown"}[live]


def moment_text(live: bool | None, revision: int, durable: int) -> str:  # noqa: FBT001 -- one value that is shown
    """Return the text for the holder and the revisions of a `StateView`."""
    holder = "holder unknown" if live is None else live_text(live)
    return f"{holder}; revision {revision}, durable up to {durable}"


def columns(head: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> list[str]:
    """Return the lines of a table. The columns in `right` are aligned to the right."""
    widths = [max(len(row[place]) for row in (head, *rows)) for place in range(len(head))]
    lines: list[str] = []
    for row in (head, *rows):
        cells = [
            cell.rjust(width) if place in right else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return lines
