"""The benchmarks know every public call, and every subcommand."""

from __future__ import annotations

import commands
import growth


def test_each_call_is_measured() -> None:
    """A public call that is not in the table of costs, or is there and gone, is an error."""
    growth.check_complete()


def test_each_subcommand_is_measured() -> None:
    """A subcommand that is not measured, without a reason for that, is an error. So is one that is gone."""
    commands.check_complete()
