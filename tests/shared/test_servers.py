"""uvicorn with four workers that share a state: 200 clients, and owners that are killed all the time.

`nox -s shared` runs `servers_in_full.py` as well: with other servers, signals and faults.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from server_clients import Tally, wrong
from server_runs import count_while_owners_are_killed


async def test_each_request_is_counted_once(tmp_path: Path) -> None:
    """Each acknowledged request is counted exactly once, also if its client had to repeat it, and is in the JSON file after a stop."""
    await count_while_owners_are_killed("uvicorn", tmp_path, seconds=4)


@pytest.mark.parametrize(
    ("state", "found"),
    [
        ({"id/c1-1-0": 1, "id/c1-1-1": 2, "count/c1": 2}, ""),
        ({"id/c1-1-0": 1, "count/c1": 1}, "c1-1-1 was answered with 2, and the state has None"),
        ({"id/c1-1-0": 1, "id/c1-1-1": 3, "count/c1": 3}, "c1-1-1 was answered with 2, and the state has 3"),
        ({"id/c1-1-0": 1, "id/c1-1-1": 2, "count/c1": 3}, "count/c1 is 3, and 2 ids have 2 numbers"),
        ({"id/c1-1-0": 1, "id/c1-1-1": 2, "id/c1-1-2": 3, "count/c1": 3}, ""),
        ({"id/c1-1-0": 1, "id/c1-1-1": 2, "id/c1-1-2": 2, "count/c1": 2}, "count/c1 is 2, and 3 ids have 2 numbers"),
        ({"id/c1-1-0": 1, "id/c1-1-1": 2, "id/c1-9-9": 3, "count/c1": 3}, "the state has ids for which no client waits: ['c1-9-9']"),
    ],
)  # fmt: skip
def test_the_check_finds_what_is_wrong(state: dict[str, Any], found: str) -> None:
    """A lost id, a number that was given twice, and an id that was counted twice are found."""
    tally = Tally()
    for number in (1, 2):
        tally.acknowledge(f"c1-1-{number - 1}", {"number": number, "pid": 1, "role": "owner"}, 0.1)
    tally.unanswered.add("c1-1-2")
    assert wrong(state, tally)[:1] == [found] * bool(found)


def test_another_number_for_the_same_id_is_found() -> None:
    """Two answers to one id must have the same number."""
    tally = Tally()
    for number in (1, 2):
        tally.acknowledge("c1-1-0", {"number": number, "pid": 1, "role": "owner"}, 0.1)
    assert tally.broken == ["c1-1-0 was answered with 1 and then with 2"]
