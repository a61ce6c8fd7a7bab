"""All servers with several workers that share a state: kills, signals, refused workers and faults.

`nox -s shared` runs this file. An ordinary run has `test_servers.py`.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import aiohttp
import pytest
from server_clients import Tally, clients, wrong
from server_counting import NAME
from server_processes import Server, served
from server_runs import STOPS_ALL, all_follow, check, count_while_owners_are_killed, end, kill_owners, stored

import lab_state
from lab_state import Config, FileStorage, Manager

SECONDS = float(os.environ.get("LAB_STATE_SHARED_SECONDS", "30"))
"""How long owners are killed in each run, in seconds."""

KILLED = [
    ("uvicorn", "starlette", ("--loop", "asyncio")),
    ("uvicorn", "fastapi", ()),
    ("uvicorn", "litestar", ()),
    ("gunicorn", "starlette", ("--max-requests", "20")),
    ("gunicorn-asgi", "starlette", ("--max-requests", "20")),
    ("gunicorn-aiohttp", "aiohttp", ("--max-requests", "20")),
    ("hypercorn", "starlette", ()),
    ("granian", "starlette", ("--respawn-failed-workers",)),
]
"""The servers, with the application and further options of each."""

ALL = ["uvicorn", "gunicorn", "gunicorn-asgi", "gunicorn-aiohttp", "hypercorn", "granian"]

pytestmark = pytest.mark.timeout(600)


def app_of(kind: str) -> str:
    return "aiohttp" if kind == "gunicorn-aiohttp" else "starlette"


@asynccontextmanager
async def loaded(
    kind: str, directory: Path, *more: str, longest: float = 30.0, environment: dict[str, str] | None = None
) -> AsyncIterator[tuple[Server, asyncio.Task[None], Tally]]:
    """Run a server and 200 clients during the block, which must end the server by `end`."""
    tally = Tally()
    async with served(kind, directory, *more, app=app_of(kind), environment=environment) as (server, running):
        try:
            async with clients(tally, server.port, longest=longest):
                yield server, running, tally
        except BaseException as error:
            error.add_note(f"{tally}; owner {server.owner()}; {server.said()}")
            raise
    print(f"{kind}: {tally}, ended with {server.statuses}")


def workers_of(server: Server) -> set[int]:
    """Return the workers of a server that have the state open or are starting: all processes of its session but itself."""
    assert server.process is not None
    found = subprocess.run(["pgrep", "-s", f"{server.process.pid}"], capture_output=True, text=True, check=True)
    return {int(line) for line in found.stdout.split()} - {server.process.pid}


# Kills


@pytest.mark.parametrize(("kind", "app", "more"), KILLED)
async def test_each_request_is_counted_once(kind: str, app: str, more: tuple[str, ...], tmp_path: Path) -> None:
    """Each acknowledged request is counted exactly once, while owners are killed, and the server is started again if it ends."""
    await count_while_owners_are_killed(kind, tmp_path, *more, app=app, seconds=SECONDS)


# Signals


@pytest.mark.parametrize("kind", ALL)
async def test_sigterm_to_all_processes(kind: str, tmp_path: Path) -> None:
    """SIGTERM to the server and all workers at once, as systemd sends it, ends the server, and each acknowledged request is in the state."""
    async with loaded(kind, tmp_path) as (server, running, tally):
        await all_follow(server, 3)
        await tally.more(500)
        took = await end(server, running, tally, all_workers=True)
    print(f"{kind}: SIGTERM to all: {took:.1f} s")
    await check(server, tally, is_plain=kind in STOPS_ALL)


@pytest.mark.parametrize("kind", ALL)
async def test_sighup(kind: str, tmp_path: Path) -> None:
    """After SIGHUP the server has new workers, which answer, and each acknowledged request is counted once."""
    # By default, uvicorn gives up if a new worker does not serve after 5 s.
    more = ("--timeout-worker-healthcheck", "30") if kind == "uvicorn" else ()
    async with loaded(kind, tmp_path, *more) as (server, running, tally):
        await tally.more(500)
        old = workers_of(server)
        assert server.process is not None
        server.process.send_signal(signal.SIGHUP)
        async with asyncio.timeout(90):
            await tally.until(lambda: tally.roles.keys() - old and server.owner() not in old)
        await tally.more(500)
        await end(server, running, tally)
    assert server.statuses == [0]
    await check(server, tally, is_plain=kind == "uvicorn")


async def test_uvicorn_reloads(tmp_path: Path) -> None:
    """`uvicorn --reload` starts the application again after a change of a file, and each acknowledged request is counted once."""
    watched = tmp_path / "watched"
    watched.mkdir()
    changed = watched / "changed.py"
    changed.write_text("")
    more = ("--workers", "1", "--reload", "--reload-dir", str(watched))
    async with loaded("uvicorn", tmp_path, *more) as (server, running, tally):
        for _ in range(3):
            await tally.more(300)
            old = server.owner()
            changed.write_text(f"# {old}")
            os.utime(changed, (time.time() + 5, time.time() + 5))
            await tally.until(lambda: server.owner() != old)  # noqa: B023 -- it is called here only
        await tally.more(300)
        await end(server, running, tally)
    await check(server, tally, is_plain=True)


async def test_two_servers_overlap(tmp_path: Path) -> None:
    """A new server starts while the old one runs, and goes on when the old one stops. Each acknowledged request is counted once."""
    tally = Tally()
    state = {"STATE_DIRECTORY": str(tmp_path / "state")}
    for place in ("old", "new"):
        (tmp_path / place).mkdir()
    async with (
        served("uvicorn", tmp_path / "old", environment=state) as (old, old_running),
        served("uvicorn", tmp_path / "new", environment=state) as (new, new_running),
        clients(tally, new.port),
    ):
        answered: dict[str, int] = {}
        more = asyncio.create_task(count_until_refused(old.port, answered))
        await tally.until(lambda: len(answered) >= 100 and len(tally.numbers) >= 500)
        old.end()
        await old_running
        kills = await kill_owners(new, tally, 5)
        await more
        await end(new, new_running, tally)
    print(f"two servers: {tally}, {len(answered)} by the old one, {kills} kills, {old.statuses} and {new.statuses}")
    kept = await stored(new.state)
    by_old = {key.removeprefix("id/"): kept.pop(key) for key in list(kept) if key.startswith("id/old-")}
    assert {name: by_old.get(name) for name in answered} == answered
    assert kept.pop("count/old") == len(by_old)
    assert not wrong(kept, tally)
    assert new.statuses == [0]


async def count_until_refused(port: int, answered: dict[str, int]) -> None:
    """Send one request after the other to a server until it ends. Note the numbers that were answered."""
    async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as session:
        while True:
            name = f"old-{len(answered)}"
            try:
                async with session.post("/count", params={"id": name}) as response:
                    answered[name] = (await response.json())["number"]
            except aiohttp.ClientConnectorError:
                if answered:
                    return
                await asyncio.sleep(0.1)
            except aiohttp.ClientError:
                pass


# Refused workers


@contextmanager
def other_release(directory: Path) -> Iterator[str]:
    """Make a copy of the package that has another version of the protocol. Yield the directory to import it from."""
    copy = directory / "release"
    shutil.copytree(Path(lab_state.__file__).parent, copy / "lab_state", ignore=shutil.ignore_patterns("__pycache__"))
    messages = copy / "lab_state" / "shared" / "_messages.py"
    text = messages.read_text()
    assert "\nPROTOCOL = 1\n" in text
    messages.write_text(text.replace("\nPROTOCOL = 1\n", "\nPROTOCOL = 2\n"))
    yield str(copy)


REFUSED = {
    "uvicorn": {0},
    "gunicorn": {1, 3},
    "gunicorn-asgi": {1, 3},
    "gunicorn-aiohttp": {1, 3},
    "hypercorn": {0, 1, 241},  # 241 if it ends a worker that is being started
    "granian": {1},
}
"""The statuses with which the servers end when their workers are refused. docs/workers.md has them."""


async def status_of_refused(kind: str, directory: Path, reason: str, environment: dict[str, str] | None = None) -> None:
    """Run a server whose workers are refused, and check how it ends."""
    async with served(kind, directory, app=app_of(kind), environment=environment) as (server, running):
        async with asyncio.timeout(60):
            await asyncio.shield(running)
        assert reason in server.log.read_text()
    print(f"{kind}: refused, ended with {server.statuses}")
    assert set(server.statuses) <= REFUSED[kind], server.said()


@pytest.mark.parametrize("kind", ALL)
async def test_a_state_that_is_not_shared(kind: str, tmp_path: Path) -> None:
    """A server ends if a manager that does not share has the state. The log says so."""
    async with Manager(NAME, FileStorage(tmp_path / "state")):
        await status_of_refused(kind, tmp_path, "see docs/workers.md")


@pytest.mark.parametrize("kind", ALL)
async def test_a_directory_that_cannot_be_made(kind: str, tmp_path: Path) -> None:
    """A server ends if the directory of the state cannot be made. The log says so."""
    (tmp_path / "state").write_text("")
    await status_of_refused(kind, tmp_path, "UnsupportedError")


@pytest.mark.parametrize("kind", ALL)
async def test_another_release_is_refused(kind: str, tmp_path: Path) -> None:
    """A server with another version of the protocol ends beside a running one. The log says so, and the running one goes on."""
    with other_release(tmp_path) as release:
        async with Manager(Config(NAME, shared=True), FileStorage(tmp_path / "state")) as running:
            before = os.environ.get("PYTHONPATH", "")
            path = os.pathsep.join(filter(None, [release, str(Path(__file__).parent), before]))
            await status_of_refused(kind, tmp_path, "another version", {"PYTHONPATH": path})
            await running.set("still", "here")


# Workers that hang


async def stop_one(server: Server, tally: Tally, role: str) -> int:
    """Stop a worker with SIGSTOP, and return its process id.

    First wait until an owner and a follower have answered. Otherwise all clients could be connected to the stopped worker.
    """
    await tally.until(lambda: find_follower(server, tally))
    pid = server.owner() if role == "owner" else find_follower(server, tally)
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    return pid


def find_follower(server: Server, tally: Tally) -> int | None:
    """Return a worker that has answered as a follower and runs."""
    alive = workers_of(server) - {server.owner()}
    return next((pid for pid, role in tally.roles.items() if role == "follower" and pid in alive), None)


@pytest.mark.parametrize(("kind", "more"), [("uvicorn", ()), ("gunicorn", ("--timeout", "5"))])
async def test_a_silent_owner_is_killed(kind: str, more: tuple[str, ...], tmp_path: Path) -> None:
    """A server kills an owner that gives no sign of life, and another worker takes over. Each acknowledged request is counted once."""
    async with loaded(kind, tmp_path, *more) as (server, running, tally):
        await tally.more(500)
        silent = await stop_one(server, tally, "owner")
        async with asyncio.timeout(60):
            await tally.until(lambda: server.owner() != silent)
        await tally.more(500)
        await end(server, running, tally)
    await check(server, tally, is_plain=True)


@pytest.mark.parametrize("role", ["owner", "follower"])
async def test_a_worker_at_a_breakpoint(role: str, tmp_path: Path) -> None:
    """A worker that is stopped for 65 s goes on. Meanwhile calls that need it raise `UnavailableError`. Each acknowledged request is counted once."""
    async with loaded("granian", tmp_path, longest=100) as (server, running, tally):
        await tally.more(500)
        pid = await stop_one(server, tally, role)
        began = asyncio.get_running_loop().time()
        before = len(tally.numbers)
        if role == "owner":
            await tally.refusals(1)
            assert 8 < asyncio.get_running_loop().time() - began < 20  # `owner_timeout` is 10 s
            assert "gave no sign of life" in server.log.read_text() or "given no sign of life" in server.log.read_text()
        await asyncio.sleep(began + 65 - asyncio.get_running_loop().time())
        meanwhile = len(tally.numbers) - before
        os.kill(pid, signal.SIGCONT)
        await tally.more(500)
        await tally.until(lambda: pid in tally.roles)
        await end(server, running, tally)
    print(f"granian: {role} stopped for 65 s: {meanwhile} acknowledged meanwhile")
    assert (meanwhile > 200) == (role == "follower")
    await check(server, tally, is_plain=True)


async def test_a_child_of_a_killed_owner(tmp_path: Path) -> None:
    """A child that an owner has forked does not keep the state. Each acknowledged request is counted once."""
    async with (
        loaded("uvicorn", tmp_path) as (server, running, tally),
        aiohttp.ClientSession(f"http://127.0.0.1:{server.port}") as session,
    ):
        await tally.more(500)
        forked: set[int] = set()
        while server.owner() not in forked:
            async with session.post("/fork", headers={"Connection": "close"}) as response:
                forked.add((await response.json())["pid"])
        killed = server.owner()
        assert killed is not None
        os.kill(killed, signal.SIGKILL)
        async with asyncio.timeout(20):
            await tally.until(lambda: server.owner() != killed)
        await tally.more(500)
        await end(server, running, tally)
    await check(server, tally, is_plain=True)


# Files


@contextmanager
def small_disk() -> Iterator[Path]:
    """Mount a file system in memory of 1 MiB. Only root may do so."""
    point = Path("/tmp") / f"lab-state-servers-{os.getpid()}"
    point.mkdir()
    try:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1M", "tmpfs", str(point)], check=True)
        try:
            yield point
        finally:
            subprocess.run(["umount", "-l", str(point)], check=True)
    finally:
        point.rmdir()


async def test_a_full_disk(tmp_path: Path) -> None:
    """On a full disk requests are answered with 503. With room again, they are counted. Each acknowledged request is counted once."""
    with small_disk() as disk:
        state = disk / "state"
        async with loaded("uvicorn", tmp_path, environment={"STATE_DIRECTORY": str(state)}) as (server, running, tally):
            await tally.more(300)
            filler = disk / "filler"
            with filler.open("wb", buffering=0) as file:
                try:
                    while file.write(bytes(4096)):
                        pass
                except OSError:
                    pass
            await tally.refusals(500)
            at_full = len(tally.numbers)
            owner = server.owner()
            filler.unlink()
            await tally.more(500)
            assert server.owner() == owner
            await end(server, running, tally)
        print(f"a full disk: {at_full} acknowledged before, {len(tally.numbers)} in the end")
        await check(server, tally, is_plain=True)


async def test_a_directory_that_is_deleted(tmp_path: Path) -> None:
    """After the directory of the state was deleted, no request is acknowledged until the server is started again."""
    async with loaded("uvicorn", tmp_path) as (server, running, tally):
        await tally.more(500)
        shutil.rmtree(server.state)
        await tally.refusals(500)
        before = len(tally.numbers)
        await tally.refusals(500)
        assert len(tally.numbers) == before
        await end(server, running, tally)
    shutil.rmtree(server.state, ignore_errors=True)
    async with loaded("uvicorn", tmp_path) as (server, running, tally):
        await tally.more(500)
        await end(server, running, tally)
    await check(server, tally, is_plain=True)


async def test_64_workers(tmp_path: Path) -> None:
    """64 workers share a state, and go on after two owners were killed. Each acknowledged request is counted once."""
    async with loaded("gunicorn", tmp_path, "-w", "64", "--preload") as (server, running, tally):
        await all_follow(server, 63)
        for _ in range(2):
            killed = server.owner()
            assert killed is not None
            os.kill(killed, signal.SIGKILL)
            await tally.until(lambda: server.owner() != killed)  # noqa: B023 -- it is called here only
            await tally.more(200)
        await end(server, running, tally)
    assert len(tally.roles) >= 8
    await check(server, tally, is_plain=True)
