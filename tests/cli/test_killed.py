"""SIGKILL before each call with which a subcommand touches a file: nothing that is half done looks whole."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from command import under
from each_subcommand import CASES, IN_FULL, check_again, check_whole, fresh, made, run

EVERY = 1 if IN_FULL else 23
"""The distance between two of the calls before which a process is killed."""

MOST = 300
"""More calls than any of the subcommands makes."""

NAMES = [name for name, case in CASES.items() if case.writes]


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with all that the subcommands need. Each kill has a copy."""
    return asyncio.run(made(tmp_path_factory.mktemp("killed")))


@pytest.mark.parametrize("half", [False, True] if IN_FULL else [True])
@pytest.mark.parametrize("name", NAMES)
async def test_killed_at_each_call(template: Path, tmp_path: Path, name: str, *, half: bool) -> None:
    """After a SIGKILL before any call, or in the middle of any write, the state is the old one or the new one. The command then works."""
    killed = 0
    for number in range(3, MOST, EVERY):
        place = await asyncio.to_thread(fresh, template, tmp_path / "place")
        done = await asyncio.to_thread(run, name, place, under(at=number, half=half))
        assert done.code in {0, -9}, (name, number, done)
        await check_whole(name, place, is_done=True if done.code == 0 else None)
        if done.code == 0:
            break
        killed += 1
        await check_again(name, place)
    assert 1 <= killed * EVERY < MOST - 1
