"""The fault matrix: which call fails, with which error, at which of its places in a life."""

from __future__ import annotations

import os
from itertools import product
from typing import Literal, NamedTuple

from injector import CALLS

ERRORS = ("EIO", "ENOSPC", "EDQUOT", "EROFS", "EACCES")
POSITIONS = 8
ALL = len(CALLS) * len(ERRORS) * POSITIONS
RUNS = int(os.environ.get("LAB_STATE_FAULT_RUNS", "112"))
FOR_GOOD = 1_000_000


class Run(NamedTuple):
    """One of them."""

    call: str
    error: str
    position: int

    @property
    def times(self) -> int:
        """How many calls fail: one, three, or all from there on."""
        return {3: FOR_GOOD, 5: 3, 6: FOR_GOOD}.get(self.position, 1)

    @property
    def end(self) -> Literal["kill", "stop"]:
        return "kill" if self._other % 2 else "stop"

    @property
    def interval(self) -> float | None:
        return 0 if self._other % 4 < 2 else None

    @property
    def _other(self) -> int:
        return self.position + ERRORS.index(self.error)

    def first(self, total: int) -> int:
        """Return the number of the first call that fails, of so many."""
        return 1 + self.position * (total - 1) // (POSITIONS - 1)


def spread(runs: int) -> list[Run]:
    """Return so many of all runs, evenly spread."""
    every = [Run(*run) for run in product(CALLS, ERRORS, range(POSITIONS))]
    return [every[number * len(every) // runs] for number in range(runs)]
