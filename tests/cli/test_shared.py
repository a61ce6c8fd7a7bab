"""A client of a shared state without a copy: which owner gets a call, and what is known if none answers."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from command import start
from commanded import World, owner, set_to
from msgspec import Raw

from lab_state import Config, ConflictError, FileStorage, Manager, UnavailableError, UnsupportedError
from lab_state.cli import _client
from lab_state.cli._client import Client
from lab_state.shared._open_calls import NEVER


async def test_the_next_owner_gets_the_call(tmp_path: Path) -> None:
    """An owner that dies before its answer leaves the call to the next owner, which makes it once. Its check is not valid there."""
    storage = FileStorage(tmp_path)
    async with owner(tmp_path) as first, Manager(Config(name="shop", shared=True), storage) as second:
        client = Client(storage, "shop")
        assert await client.connect()
        assert (client.pid, client.revision) == (first.pid, 1)
        first.send_signal(signal.SIGSTOP)
        calling = asyncio.create_task(client.call(set_to(b"1")))
        await asyncio.sleep(0)
        first.kill()
        made = await calling
        assert (made.revision, client.pid) == (2, os.getpid())
        assert await second.get("a") == 1
        await client.call(set_to(b"2"))
        assert (await second.get("a"), second.revision) == (2, 3)
        await client.aclose()
        await client.aclose()


async def test_an_owner_that_stops_hands_the_call_over(tmp_path: Path) -> None:
    """The command waits while one owner ends and the next one begins."""
    world = World("shared", tmp_path)
    state = tmp_path / "state"
    async with owner(state) as first, Manager(Config(name="shop", shared=True), FileStorage(state)) as second:
        first.send_signal(signal.SIGSTOP)
        setting = await asyncio.to_thread(start, "set", world.state, "a", "7", cwd=tmp_path)
        first.kill()
        done = await asyncio.to_thread(setting.wait)
        assert (done.code, done.out) == (0, "revision 2\n")
        await second.set(
            "b", 8
        )  # if the command took the lock first, the process has the change only after its own takeover
        assert await second.get("a") == 7


async def test_no_next_owner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the owner dies and no process follows, the error says that the outcome is unknown."""
    monkeypatch.setattr(_client, "PATIENCE", 0.2)
    async with owner(tmp_path) as first:
        client = Client(FileStorage(tmp_path), "shop")
        assert await client.connect()
        first.send_signal(signal.SIGSTOP)
        calling = asyncio.create_task(client.call(set_to(b"1")))
        await asyncio.sleep(0)
        first.kill()
        with pytest.raises(UnavailableError, match="made once, or not at all") as raised:
            await calling
        assert raised.value.outcome == "unknown"
        await client.aclose()


async def test_an_owner_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An owner without a sign of life ends the call, and so does one that does not reach a revision."""
    async with owner(tmp_path) as first:
        client = Client(FileStorage(tmp_path), "shop")
        assert await client.connect()
        monkeypatch.setattr(_client, "PATIENCE", 0.2)
        with pytest.raises(UnavailableError, match="has not made revision 5 durable"):
            await client.reach(5)
        await client.reach(1)
        first.send_signal(signal.SIGSTOP)
        with pytest.raises(UnavailableError, match=rf"pid {first.pid}\) gave no sign of life.* made once") as raised:
            await client.call(set_to(b"1"))
        assert raised.value.outcome == "unknown"
        later: Any = Client(FileStorage(tmp_path), "shop")
        with pytest.raises(UnavailableError, match=r"gave no sign of life.* Nothing was changed") as raised:
            await later.connect()
        assert raised.value.outcome is None
        later._connection.link.close()
        await client.aclose()


async def test_a_check_that_does_not_hold(tmp_path: Path) -> None:
    """A refused call raises `ConflictError`, and the next call is made."""
    async with owner(tmp_path):
        client = Client(FileStorage(tmp_path), "shop")
        assert await client.connect()
        from lab_state.shared._messages import Changes, MakeChanges  # noqa: PLC0415

        changes = Changes(set={"a": Raw(b"1")})
        with pytest.raises(ConflictError):
            await client.call(lambda n, ack, at: MakeChanges(n, ack, at, ["a"], [], changes), NEVER)
        assert (await client.call(set_to(b"2"))).revision == 2
        await client.aclose()


async def test_no_owner(tmp_path: Path) -> None:
    """Without a socket, there is no owner, and nothing to close."""
    client = Client(FileStorage(tmp_path), "shop")
    assert not await client.connect()
    assert await client.may_appear()
    await client.aclose()


async def test_an_owner_that_has_the_lock_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When an owner has ended, the lock may be free for a moment. The client waits for the next owner."""
    monkeypatch.setattr(_client, "_NEXT", 3600.0)  # a start takes longer on a busy machine
    client = Client(FileStorage(tmp_path), "shop")
    async with owner(tmp_path) as first:
        assert await client.connect()
        first.kill()
    again = asyncio.create_task(client.connect_again())
    await asyncio.sleep(0)
    async with Manager(Config(name="shop", shared=True), FileStorage(tmp_path)):
        assert await again
        await client.aclose()


async def test_an_owner_that_announces_itself_later(tmp_path: Path) -> None:
    """A process has the lock before its lock file says that it shares the state. The client waits for the announcement."""
    client = Client(FileStorage(tmp_path), "shop")
    async with Manager("shop", FileStorage(tmp_path)):
        assert [await client.may_appear() for _ in range(2)] == [True, True]
    async with Manager(Config(name="shop", shared=True), FileStorage(tmp_path)):
        assert await client.connect_again()
        await client.aclose()


async def test_a_next_holder_that_does_not_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client does not wait for it for long."""
    monkeypatch.setattr(_client, "_NEXT", 3600.0)
    client = Client(FileStorage(tmp_path), "shop")
    async with owner(tmp_path) as first:
        assert await client.connect()
        first.kill()
    async with Manager("shop", FileStorage(tmp_path)):
        assert not await client.connect_again()
    await client.aclose()


@pytest.mark.parametrize(
    ("says", "error"),
    [(b"HTTP/1.1 400 Bad Request\r\n\r\n", "another program answers"), (b"", None)],
)
async def test_another_program_at_the_socket(tmp_path: Path, says: bytes, error: str | None) -> None:
    """A program that answers with other bytes is an error. One that closes the connection is no owner."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(says)
        writer.close()

    server = await asyncio.start_unix_server(answer, tmp_path / "shop.sock")
    client = Client(FileStorage(tmp_path), "shop")
    if error is None:
        assert not await client.connect()
    else:
        with pytest.raises(UnsupportedError, match=error):
            await client.connect()
    await client.aclose()
    server.close()
