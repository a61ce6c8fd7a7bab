"""Parse WHEN: a moment of a state, as a user writes it. This module does no I/O."""

from __future__ import annotations

import contextlib
import re
from datetime import datetime, timedelta

_AGO = re.compile(r"(\d{1,9})(s|m|h|d|w)")
_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}
_REVISION = re.compile(r"r(\d{1,18})")
_DAY = re.compile(r"(today|yesterday)(?:[ T](\d{1,2}):(\d{2})(?::(\d{2}))?)?")
_ISO = re.compile(r"\d{4}-\d{2}-\d{2}(?:[T ]\d{2}(?::?\d{2}){0,2}(?:[.,]\d{1,6})?(?:Z|[+-]\d{2}:?\d{2})?)?")

FORMS = "10m (ago; s, m, h, d or w), 'yesterday 18:00' (local), ISO 8601 such as 2026-01-31T18:00Z, or r1204 for revision 1204"


def parse_when(text: str, now: datetime) -> int | datetime:
    """Return the revision or the aware time that a text names. `now` is the aware local time.

    A time without a zone is local, with the offset that was in force at that moment.

    Raises:
        ValueError: The text names no moment. The message lists the forms.
    """
    text = text.strip()
    if found := _REVISION.fullmatch(text):
        return int(found[1])
    with contextlib.suppress(ValueError, OverflowError):  # such as 25:00, or the 30th of February
        if found := _AGO.fullmatch(text):
            return now - timedelta(**{_UNITS[found[2]]: int(found[1])})
        if found := _DAY.fullmatch(text):
            return _on_day(now, found)
        if _ISO.fullmatch(text):
            return _aware(datetime.fromisoformat(text))
    raise ValueError(f"{text!r} is not a moment: write {FORMS}")


def _on_day(now: datetime, found: re.Match[str]) -> datetime:
    day = now - timedelta(days=found[1] == "yesterday")
    hour, minute, second = (int(part or 0) for part in found.groups()[1:])
    return _aware(day.replace(hour=hour, minute=minute, second=second, microsecond=0, tzinfo=None))


def _aware(moment: datetime) -> datetime:
    """Return a moment with its zone. Without a zone, it is local: `astimezone` finds the offset of that moment."""
    return moment if moment.tzinfo is not None else moment.astimezone()
