"""Connections that are more than a plain URL: a user with few rights, TLS, Sentinel."""

from __future__ import annotations

import asyncio
import contextlib
import re
import ssl
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import trustme
from mirrored import mirror_of
from redis.asyncio.sentinel import Sentinel

from lab_state import Config, Manager, MemoryStorage, RedisCache, UnavailableError

PAGE = Path(__file__).parents[2] / "docs" / "cache.md"
PATIENCE = 60.0


def manager(cache: RedisCache) -> Manager:
    return Manager(Config(name="jobs", flush_interval=0), MemoryStorage(), cache)


def documented() -> tuple[list[str], list[str]]:
    """Return the commands that the page says a writer needs, and a reader."""
    needed = re.search(
        r"^The user needs.*?: `([A-Z\s]+)`; a reader needs only `([A-Z\s]+)`",
        PAGE.read_text(),
        re.DOTALL | re.MULTILINE,
    )
    assert needed is not None
    return needed[1].split(), needed[2].split()


async def test_the_documented_rights_suffice(own_redis: Any) -> None:
    """A writer and readers need only the commands that the page lists."""
    server = own_redis()
    writer, reader = documented()
    for user, commands in (("writer", writer), ("reader", reader)):
        rights = [f"+{command.lower()}" for command in commands]
        server.call(
            "ACL", "SETUSER", user, "on", ">word", "~lab_state:*", "resetchannels", "&lab_state:*", "-@all", *rights
        )
    written = RedisCache(f"redis://writer:word@127.0.0.1:{server.port}")
    read = RedisCache(f"redis://reader:word@127.0.0.1:{server.port}")
    async with read.reader("jobs") as remote, read.reader("jobs", local=True) as local:
        for life in (1, 2):  # the second one takes the copy of the first over
            async with manager(written) as state:
                await state.set_many({f"{life}/{number}": number for number in range(200)}, ttl=1000)
                await state.set("stays", life)
                await state.set("stays", life, ttl=1000)
                await state.set("stays", life)
                await state.delete_all(f"{life}/1")
                await state.delete_all()
                revision = await state.set("stays", life)
                for each in (remote, local):
                    await each.wait_revision(revision, timeout=PATIENCE)
                    assert await each.get_all() == {"stays": life}
                    assert (await each.keys(), await each.exists("stays"), await each.revision()) == (
                        ["stays"],
                        True,
                        revision,
                    )
            server.call("FLUSHALL")


@contextlib.asynccontextmanager
async def with_tls(port: int, context: ssl.SSLContext) -> AsyncIterator[int]:
    """Yield a port that passes on what is said in TLS."""
    tasks: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        with contextlib.suppress(OSError, asyncio.CancelledError):
            there = await asyncio.open_connection("127.0.0.1", port)
            pumps = [asyncio.create_task(pump(*pair)) for pair in ((reader, there[1]), (there[0], writer))]
            try:
                await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for each in pumps:
                    each.cancel()
                await asyncio.gather(*pumps, return_exceptions=True)
                there[1].transport.abort()
        writer.transport.abort()
        tasks.discard(task)

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for task in tasks.copy():
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def test_tls(redis_server: Any, tmp_path: Path, until: Any) -> None:
    """`rediss://` works with a trusted certificate. With another one it is an error, and nothing is sent."""
    authority, other = trustme.CA(), trustme.CA()
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("localhost").configure_cert(context)
    for name, each in (("trusted.pem", authority), ("other.pem", other)):
        each.cert_pem.write_to_path(str(tmp_path / name))
    async with with_tls(redis_server.port, context) as port:
        url = f"rediss://localhost:{port}?ssl_ca_certs={tmp_path}"
        cache = RedisCache(f"{url}/trusted.pem")
        async with manager(cache) as state, cache.reader("jobs", local=True) as reader:
            revision = await state.set("job", {"n": 1})
            await reader.wait_revision(revision, timeout=PATIENCE)
            assert await reader.get("job") == {"n": 1}
        async with manager(RedisCache(f"{url}/other.pem")) as state:
            await state.set("job", {"n": 2})
            await until(lambda: mirror_of(state).error is not None)
            assert f"localhost:{port}" in str(mirror_of(state).error)
        assert redis_server.call("HGET", "lab_state:{jobs}", "job") == b'{"n":1}'


async def test_a_failover(own_redis: Any, own_sentinel: Any, until: Any) -> None:
    """After Sentinel has made a replica the primary, the mirror is filled there, and readers never go back."""
    first = own_redis()
    second = own_redis("--replicaof", "127.0.0.1", str(first.port))
    await until(lambda: second.call("INFO", "replication")["master_link_status"] == "up", PATIENCE)
    watching = own_sentinel(
        f"sentinel monitor here 127.0.0.1 {first.port} 1",
        "sentinel down-after-milliseconds here 300",
        "sentinel failover-timeout here 2000",
    )
    await until(lambda: known(watching), PATIENCE)
    sentinel = Sentinel(  # type: ignore[no-untyped-call]
        [("127.0.0.1", watching.port)]
    )
    cache = RedisCache(sentinel.master_for("here").connection_pool)
    async with manager(cache) as state, cache.reader("jobs") as reader:
        await reader.wait_revision(await state.set("n", 1), timeout=PATIENCE)
        first.kill()
        revision = await state.set("n", 2)  # not held up
        await until(lambda: mirror_of(state).revision == revision, PATIENCE)
        assert second.call("HGET", "lab_state:{jobs}", "n") == b"2"
        with contextlib.suppress(UnavailableError):  # the first attempt may go to a connection that has died
            assert await reader.get("n") == 2
        await reader.wait_revision(revision, timeout=PATIENCE)
        assert await reader.get("n") == 2
    for each in sentinel.sentinels:  # the caller's own
        await each.aclose()


def known(sentinel: Any) -> bool:
    """Return whether it has found the replica."""
    return bool(sentinel.call("SENTINEL", "replicas", "here"))


async def test_certificates_are_read_in_a_thread(monkeypatch: Any, until: Any) -> None:
    """Each attempt to connect with TLS creates its context in a thread, also while the server is down."""
    made: list[str] = []
    real = ssl.create_default_context

    def noted(*args: Any, **options: Any) -> ssl.SSLContext:
        made.append(threading.current_thread().name)
        return real(*args, **options)

    monkeypatch.setattr(ssl, "create_default_context", noted)
    async with manager(RedisCache("rediss://127.0.0.1:1")) as state:
        await until(lambda: mirror_of(state).error is not None)
        await until(lambda: len(made) > 1)
    assert set(made) == {"lab_state TLS"}
