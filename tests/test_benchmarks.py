"""The benchmarks know every public call."""

from __future__ import annotations

import growth


def test_each_call_is_measured() -> None:
    """A public call that is not in the table of costs, or is there and gone, is an error."""
    growth.check_complete()
