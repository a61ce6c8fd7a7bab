"""The runs that the tests of servers have in common: requests while owners are killed, and the end of a server."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from contextlib import suppress
from pathlib import Path
from typing import Any

import aiohttp
from server_clients import LONGEST, Tally, clients, wrong
from server_counting import NAME
from server_processes import Server, served

from lab_state import FileStorage, Manager

STOPS_ALL = {"uvicorn", "gunicorn", "gunicorn-asgi", "gunicorn-aiohttp", "granian"}
"""The servers whose workers all stop by themselves on SIGTERM. hypercorn kills those that are not the first to end."""

ENDS_IN = 45.0
"""The longest time in seconds from SIGTERM to the end of a server. gunicorn kills a worker that still runs after 30 s."""


async def kill_owners(server: Server, tally: Tally, seconds: float) -> int:
    """Kill one owner after the other for some seconds, and return their number.

    There is one kill each second, after 50 more acknowledgements. Each fourth kill hits the new owner at once.
    """
    loop = asyncio.get_running_loop()
    began, dead, kills = loop.time(), set[int | None](), 0
    while loop.time() < began + seconds:
        await tally.until(lambda: server.owner() not in {*dead, None})
        owner = server.owner()
        assert owner is not None
        with suppress(ProcessLookupError):  # it has ended by itself
            os.kill(owner, signal.SIGKILL)
            kills += 1
        dead.add(owner)
        if kills % 4:
            due = loop.time() + 1
            await tally.more(50)
            await tally.until(lambda: loop.time() >= due)  # noqa: B023 -- it is called here only
    await tally.until(lambda: server.owner() not in dead)
    await tally.more(50)
    return kills


async def end(server: Server, running: asyncio.Task[None], tally: Tally, *, all_workers: bool = False) -> float:
    """Stop a server while clients send requests. Return the seconds until it has ended."""
    began = asyncio.get_running_loop().time()
    tally.is_ending = True
    server.end(all_workers=all_workers)
    async with asyncio.timeout(ENDS_IN):
        await asyncio.shield(running)
    return asyncio.get_running_loop().time() - began


async def all_follow(server: Server, followers: int) -> None:
    """Wait until the owner has a number of followers. Until then, a worker that is being started may miss a SIGTERM."""
    async with aiohttp.ClientSession(f"http://127.0.0.1:{server.port}") as session, asyncio.timeout(120):
        known = 0
        while known < followers:
            async with session.get("/health", headers={"Connection": "close"}) as response:
                known = (await response.json())["managers"][NAME]["followers"] or 0


async def stored(directory: Path) -> dict[str, Any]:
    """Return the state in the files. The next owner finds the same."""
    async with Manager(NAME, FileStorage(directory)) as state:
        return await state.get_all()


async def check(server: Server, tally: Tally, *, is_plain: bool) -> None:
    """Check that the state has what was answered.

    Args:
        server: The server. It has ended.
        tally: What the clients have seen.
        is_plain: Whether the plain JSON file must have everything, without the journal.
    """
    if is_plain:
        found = wrong(json.loads((server.state / f"{NAME}.json").read_bytes()), tally)
        assert not found, found
    found = wrong(await stored(server.state), tally)
    assert not found, f"{found}; {server.said()}"


async def count_while_owners_are_killed(
    kind: str, directory: Path, *more: str, app: str = "starlette", seconds: float, all_workers: bool = False
) -> None:
    """Let 200 clients count, kill owners, stop the server, and check that each acknowledged id was counted once."""
    tally = Tally()
    async with served(kind, directory, *more, app=app, again=True) as (server, running):
        try:
            async with clients(tally, server.port):
                async with asyncio.timeout(4 * seconds + LONGEST):
                    kills = await kill_owners(server, tally, seconds)
                took = await end(server, running, tally, all_workers=all_workers)
        except BaseException as error:
            error.add_note(f"{tally}; owner {server.owner()}; {server.said()}")
            raise
    print(f"{kind} {app}: {seconds:g} s, {kills} kills, {tally}, ended in {took:.1f} s with {server.statuses}")
    assert kills >= 2
    # A worker of another server that was being started may have missed the SIGTERM, and was killed then.
    await check(server, tally, is_plain=kind == "uvicorn")
