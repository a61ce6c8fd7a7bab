"""Periods of time that a caller passes, and the check of the arguments for a history. This module does no I/O."""

from __future__ import annotations

import math
from datetime import timedelta
from typing import TypeAlias

Seconds: TypeAlias = float | timedelta

LONGEST_TTL = 10_000_000_000
"""The longest time to live, in seconds: about 317 years.

An expiry that far ahead, in milliseconds since 1970, is below 2**53. So every JSON reader reads it exactly.
"""


def check_history(history: Seconds | None, history_bytes: int | None) -> int | None:
    """Check the arguments `history` and `history_bytes` of a storage.

    Return the length of the history in whole milliseconds, rounded up; `None` without a history.

    Raises:
        ValueError: `history` is not above 0, or is longer than `LONGEST_TTL`. Or `history_bytes` is below 1.
        TypeError: `history` is not an `int`, a `float`, a `timedelta` or `None`. Or `history_bytes` is not an `int` or
            `None`. A `bool` is refused, too.
    """
    if history_bytes is not None and (isinstance(history_bytes, bool) or not isinstance(history_bytes, int)):
        raise TypeError(
            f"history_bytes must be an int of 1 or more, or None for no limit, not {type(history_bytes).__name__}"
        )
    if history_bytes is not None and history_bytes < 1:
        raise ValueError(f"history_bytes must be 1 or more, not {history_bytes}; None is no limit")
    if history is None:
        return None
    seconds = history.total_seconds() if isinstance(history, timedelta) else history
    if isinstance(seconds, bool) or not isinstance(seconds, int | float):
        raise TypeError(f"history must be a number of seconds, a timedelta or None, not {type(history).__name__}")
    if not 0 < seconds <= LONGEST_TTL:
        raise ValueError(f"history must be above 0 and at most {LONGEST_TTL} seconds; None keeps no history")
    return math.ceil(seconds * 1000)
