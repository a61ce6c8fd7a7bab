"""A real redis-server: its keys, and every way in which it fails."""

from __future__ import annotations

import asyncio
import json
import logging
import subprocess
import sys
from typing import Any

import pytest
from mirrored import mirror_of
from redis.asyncio import ConnectionPool

import lab_state.cache._connection
import lab_state.cache._feed
import lab_state.cache._mirror
import lab_state.cache._redis_session
import lab_state.cache._redis_source
from lab_state import Config, Manager, MemoryStorage, RedisCache, UnavailableError, UnsupportedError
from lab_state.cache._format import message

VALUES, EXPIRES = "lab_state:{name}", "lab_state:{name}:expires"


def manager(url: str, name: str = "name") -> Manager:
    return Manager(Config(name=name, flush_interval=0), MemoryStorage(), RedisCache(url))


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make heartbeats and pauses short."""
    monkeypatch.setattr(lab_state.cache._mirror, "HEARTBEAT_SECONDS", 0.02)
    monkeypatch.setattr(lab_state.cache._mirror, "_FIRST_PAUSE", 0.01)
    monkeypatch.setattr(lab_state.cache._mirror, "_LONGEST_PAUSE", 0.05)


async def same(state: Manager, url: str) -> None:
    """Check that the mirror becomes equal to the state, and that a new reader reads it."""
    async with RedisCache(url).reader("name") as reader:
        await reader.wait_revision(state.revision, timeout=20)
        assert await reader.get_all() == await state.get_all()


# What is kept where


async def test_the_layout(redis_server: Any, until: Any) -> None:
    """Two hashes, each with its head, and nothing else."""
    async with manager(redis_server.url) as state:
        await state.set("a", {"b": [1]})
        await state.set("t", "x", ttl=1000)
        await until(lambda: mirror_of(state).revision == 2)
        values = redis_server.call("HGETALL", VALUES)
        expires = redis_server.call("HGETALL", EXPIRES)
        head = json.loads(values.pop(b"$lab_state"))
        assert values == {b"a": b'{"b":[1]}', b"t": b'"x"'}
        assert head == {"format": 1, "revision": 2, "writer": head["writer"], "fill": head["fill"]}
        assert json.loads(expires.pop(b"$lab_state")) == head
        assert expires.keys() == {b"t"}
        assert {redis_server.call("TTL", key) for key in (VALUES, EXPIRES)} == {-1}
        assert sorted(redis_server.call("KEYS", "*")) == [VALUES.encode(), EXPIRES.encode()]


def test_a_prefix_that_redis_cannot_have() -> None:
    """The constructor refuses it, and not a later call."""
    with pytest.raises(ValueError, match=r"^the prefix '\\ud800' has a lone surrogate"):
        RedisCache("redis://localhost", prefix="\ud800")


async def test_prefix_and_database(redis_server: Any) -> None:
    """The prefix is a setting, and the database is the URL's."""
    cache = RedisCache(f"{redis_server.url}/3?socket_timeout=2", prefix="other:")
    async with Manager("name", MemoryStorage(), cache) as state, cache.reader("name") as reader:
        await state.set("a", 1)
        await state.flush()
        await reader.wait_revision(1)
        assert await reader.get("a") == 1
    assert redis_server.call("KEYS", "*") == []
    assert repr(cache) == f"<RedisCache 127.0.0.1:{redis_server.port}>"


async def test_a_pool_of_redis_py(redis_server: Any) -> None:
    """A pool of redis-py can have settings that a URL cannot. Its settings are used, and not its connections."""
    pool = ConnectionPool(host="127.0.0.1", port=redis_server.port, decode_responses=True)
    async with Manager("name", MemoryStorage(), RedisCache(pool)) as state:
        await state.set("a", 1)
        await state.flush()
        async with RedisCache(pool).reader("name") as reader:
            await reader.wait_revision(1)
    assert RedisCache(ConnectionPool())._dialer.path == "Redis by Sentinel"
    assert RedisCache("unix:///a/socket")._dialer.path == "unix:/a/socket"
    assert RedisCache("redis://")._dialer.path == "localhost:6379"


def test_a_url_that_is_none() -> None:
    """A URL is refused without being quoted."""
    with pytest.raises(ValueError, match="not a URL of Redis") as caught:
        RedisCache("http://user:password@host")
    assert "password" not in str(caught.value)


@pytest.mark.parametrize(
    "end", ["redis://host?unknown=5678", "rediss://host?ssl_cert_reqs=5678", "redis://host?retry=5678"]
)
def test_an_option_that_redis_py_refuses(end: str) -> None:
    """A wrong option of a URL is refused at once, and not at the first read. The message does not quote it."""
    with pytest.raises(ValueError, match="the options of redis-py") as caught:
        RedisCache(end)
    assert "5678" not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "redis://me:12345#rest@host",
        "redis://me:12345#rest",
        "redis://me:12345/rest@host",
        "redis://me:12345?rest@host",
        "redis://me:re@12345/st@host",
        "rediss://me:re@12345?st@host",
        "unix://me:re/12345@/a/socket",
    ],
)
def test_a_password_that_ends_too_early(url: str) -> None:
    """A URL that would show a part of the password as host, port or path is refused. The message has no part of it."""
    with pytest.raises(ValueError, match="write # as %23") as caught:
        RedisCache(url)
    assert "12345" not in str(caught.value)


def test_signs_in_a_url() -> None:
    """A password and an option may have any character, if it is escaped. A path may have an at sign."""
    for url in ("redis://me:1%2323%2F4%3F5%40@host:7000/2?client_name=a%40b", "redis://me:12@host:7000"):
        assert repr(RedisCache(url)) == "<RedisCache host:7000>"
    assert repr(RedisCache("unix:///a/b@c.sock?db=1")) == "<RedisCache unix:/a/b@c.sock>"


def test_without_redis_py() -> None:
    """Where redis-py is missing, the constructor raises an ImportError that names the extra and the command."""
    code = (
        "import sys; sys.modules['redis'] = None\n"
        "from lab_state import RedisCache\n"
        "try: RedisCache('redis://host')\n"
        "except ImportError as error: print(error.name, error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == (
        "redis RedisCache needs the extra redis: pip install 'lab-state[redis]', "
        "or pip install '.[redis]' in a clone of lab_state"
    )


async def test_a_fill_is_forgotten_if_it_is_never_finished(redis_server: Any) -> None:
    """Redis drops the keys of a fill that does not end."""
    from lab_state.cache import Seen, Slice  # noqa: PLC0415

    session = await RedisCache(redis_server.url).open("name", "one")

    async def dying() -> Any:
        for _ in range(20):
            yield Slice({"a": b"1"}, {"a": 1}, [])
        raise OSError("killed")

    with pytest.raises(OSError, match="killed"):
        await session.fill(1, dying(), Seen(None, 0))
    await session.aclose()
    left = redis_server.call("KEYS", "*")
    assert len(left) == 2
    assert all(0 < redis_server.call("TTL", key) <= 60 for key in left)


async def test_a_fill_that_redis_forgot_in_the_middle(redis_server: Any) -> None:
    """A fill whose keys Redis has dropped meanwhile does not replace the mirror."""
    from lab_state.cache import Seen, Slice  # noqa: PLC0415

    session = await RedisCache(redis_server.url).open("name", "one")

    async def slow() -> Any:
        for _ in range(20):
            yield Slice({"a": b"1"}, {}, [])
        await asyncio.to_thread(redis_server.call, "FLUSHALL")
        yield Slice({"b": b"1"}, {}, [])

    async def quick() -> Any:
        yield Slice({"a": b"1"}, {}, [])

    assert not await session.fill(1, slow(), Seen(None, 0))
    assert redis_server.call("KEYS", "*") == []
    assert await session.fill(1, quick(), await session.look())  # and nothing of that is held against the next
    await session.aclose()


async def test_a_step_that_is_too_large_to_be_told(
    redis_server: Any, until: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step that is too large for messages is sent as a resync, and local copies load it."""
    monkeypatch.setattr(lab_state.cache._redis_session, "MOST_MESSAGE_BYTES", 1000)
    cache = RedisCache(redis_server.url)
    async with manager(redis_server.url) as state, cache.reader("name", local=True) as reader:
        await reader.wait_revision(0)
        revision = await state.set_many({str(number): "x" * 100 for number in range(1000)}, ttl=1000)
        await reader.wait_revision(revision)
        await until(lambda: reader._local.fresh)
        assert await reader.get_all() == await state.get_all()


async def test_one_value_that_is_too_large_to_be_told(
    redis_server: Any, until: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step of one large value is sent as a resync. No message of its size is made."""
    monkeypatch.setattr(lab_state.cache._redis_session, "MOST_MESSAGE_BYTES", 1000)
    told: list[bytes] = []
    real = message

    def noted(*args: Any, **options: Any) -> bytes:
        told.append(real(*args, **options))
        return told[-1]

    monkeypatch.setattr(lab_state.cache._redis_session, "message", noted)
    cache = RedisCache(redis_server.url)
    async with manager(redis_server.url) as state, cache.reader("name", local=True) as reader:
        await reader.wait_revision(0)
        await reader.wait_revision(await state.set("large", ["x" * 5_000]))
        await until(lambda: reader._local.fresh)
        assert await reader.get("large") == ["x" * 5_000]
    assert max(map(len, told), default=0) < 1000


async def test_more_readers_than_connections_are_kept(redis_server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each read that runs has a connection. Only a few are kept afterwards."""
    monkeypatch.setattr(lab_state.cache._redis_source, "_MOST_FREE", 2)
    async with manager(redis_server.url) as state, RedisCache(redis_server.url).reader("name") as reader:
        await reader.wait_revision(await state.set("a", 1))
        assert await asyncio.gather(*(reader.get("a") for _ in range(10))) == [1] * 10
        assert len(reader._source._free) == 2  # type: ignore[attr-defined]


def test_an_older_redis_py(redis_server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Versions before redis-py 7 have no driver information, and work."""
    monkeypatch.delattr("redis.DriverInfo")
    assert "driver_info" not in RedisCache(redis_server.url)._dialer._options


# Failures


async def test_redis_dies_and_comes_back(own_redis: Any, until: Any, caplog: pytest.LogCaptureFixture) -> None:
    """While Redis is down, writes go on. The log has one line at the beginning and one at the end, and the mirror is filled."""
    caplog.set_level(logging.DEBUG, "lab_state")
    redis = own_redis()
    async with manager(redis.url) as state:
        await state.set("a", "secret")
        await until(lambda: mirror_of(state).revision == 1)
        redis.kill()
        await until(lambda: mirror_of(state).error is not None)
        for number in range(100):
            await state.set("b", number)
        assert not mirror_of(state).up
        await asyncio.to_thread(redis.start)
        await same(state, redis.url)
        await until(lambda: mirror_of(state).up)
    told = [record.message for record in caplog.records if record.levelname != "INFO"]  # without start and stop
    assert ["is not up to date" in line for line in told] == [True, False]
    assert "works again" in told[1]
    assert "secret" not in caplog.text


async def test_redis_comes_back_with_old_data(own_redis: Any, until: Any) -> None:
    """A reader refuses an older mirror than it has read, until the writer has filled it again."""
    redis = own_redis()
    async with manager(redis.url) as state, RedisCache(redis.url).reader("name") as reader:
        await reader.wait_revision(await state.set("a", 1))
        redis.call("SAVE")
        await reader.wait_revision(await state.set("a", 2))
        await asyncio.to_thread(redis.restart)
        while True:
            try:
                assert await reader.get("a") == 2
            except UnavailableError:
                await asyncio.sleep(0.001)
            else:
                break
        await same(state, redis.url)


@pytest.mark.parametrize(
    "commands",
    [[("FLUSHALL",)], [("SET", VALUES, "x")], [("DEL", EXPIRES)], [("DEL", VALUES)], [("LPUSH", EXPIRES, "x")]],
    ids=lambda commands: "-".join(map(str, commands[0])),
)
async def test_what_others_do_is_mended(redis_server: Any, until: Any, commands: list[tuple[str, ...]]) -> None:
    """After FLUSHALL, another type in our keys, or the loss of one of them, the mirror is filled within a heartbeat."""
    async with manager(redis_server.url) as state:
        await state.set("a", 1)
        await until(lambda: mirror_of(state).revision == 1)
        if commands[0][0] in {"SET", "LPUSH"}:
            redis_server.call("DEL", commands[0][1])
        for command in commands:
            redis_server.call(*command)
        await same(state, redis_server.url)
        redis_server.call(*(commands[0] if commands[0][0] != "LPUSH" else ("FLUSHALL",)))
        await state.set("b", 2)  # a step finds it as well
        await same(state, redis_server.url)


async def test_a_read_only_replica(own_redis: Any, until: Any) -> None:
    """A read-only replica refuses writes, and the status says what to do. After a failover to it, the mirror is filled there."""
    primary = own_redis()
    replica = own_redis("--replicaof", "127.0.0.1", str(primary.port))
    async with manager(replica.url) as state:
        await state.set("a", 1)
        await until(lambda: mirror_of(state).error is not None)
        assert "read-only replica; use the URL of the primary" in str(mirror_of(state).error)
        replica.call("REPLICAOF", "NO", "ONE")
        await same(state, replica.url)


async def test_out_of_memory(own_redis: Any, until: Any) -> None:
    """A full Redis keeps the last whole revision, and gets the rest when it has memory again."""
    redis = own_redis("--maxmemory", "3mb")
    async with manager(redis.url) as state, RedisCache(redis.url).reader("name") as reader:
        await reader.wait_revision(await state.set("a", 1))
        await state.set("large", "x" * 4_000_000)
        await until(lambda: "OutOfMemoryError" in str(mirror_of(state).error))
        assert "raise maxmemory" in str(mirror_of(state).error)
        await state.set("a", 2)
        assert await reader.get("a") == 1
        redis.call("CONFIG", "SET", "maxmemory", "100mb")
        await same(state, redis.url)


async def test_wrong_password(own_redis: Any, until: Any) -> None:
    """A refused password is reported without the password, with the remedy."""
    redis = own_redis("--requirepass", "right-one")
    right, wrong = (f"redis://:{word}-one@127.0.0.1:{redis.port}" for word in ("right", "wrong"))
    async with manager(wrong) as state:
        await until(lambda: mirror_of(state).error is not None)
        assert "refuses the user or the password" in str(mirror_of(state).error)
        assert "wrong-one" not in str(mirror_of(state).error)
    async with RedisCache(wrong).reader("name") as reader:
        with pytest.raises(UnsupportedError, match="refuses"):
            await reader.get("a")
    async with manager(right) as state:
        await state.set("a", 1)
        await same(state, right)


async def test_a_user_who_may_not(own_redis: Any, until: Any) -> None:
    """A missing right in the ACL is reported as such."""
    redis = own_redis()
    redis.call("ACL", "SETUSER", "poor", "on", ">word", "~*", "&*", "+@all", "-unlink")
    async with manager(f"redis://poor:word@127.0.0.1:{redis.port}") as state:
        await until(lambda: "NoPermissionError" in str(mirror_of(state).error))
        redis.call("ACL", "SETUSER", "poor", "+@all")
        await same(state, f"redis://poor:word@127.0.0.1:{redis.port}")


async def test_a_network_that_cuts(redis_server: Any, proxy_to: Any, until: Any) -> None:
    """A connection that is cut within a step loses nothing, repeats nothing, and needs no fill."""
    proxy = await proxy_to(redis_server.port)
    async with manager(proxy.url) as state:
        await until(lambda: mirror_of(state).up)
        for number in range(20):
            await state.set(f"key {number}", number)
            proxy.cut()
            await asyncio.sleep(0.005)
        await same(state, redis_server.url)


async def test_what_arrives_late_does_nothing(
    redis_server: Any, proxy_to: Any, until: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step that the network delivers after newer ones is not executed."""
    monkeypatch.setattr(lab_state.cache._connection, "_TIMEOUT", 0.1)
    proxy = await proxy_to(redis_server.port)
    async with manager(proxy.url) as state:
        await state.set("a", 1)
        await until(lambda: mirror_of(state).revision == 1)
        proxy.open.clear()
        await state.set("a", 2)
        await until(lambda: "does not answer in time" in str(mirror_of(state).error))
        await state.set("a", 3)
        proxy.open.set()
        await same(state, redis_server.url)


async def test_a_slow_network(redis_server: Any, proxy_to: Any) -> None:
    """A flush does not wait for a slow mirror, and the changes are merged."""
    proxy = await proxy_to(redis_server.port)
    async with manager(proxy.url) as state:
        proxy.delay = 0.05
        for number in range(200):
            await state.set("a", number)
        assert state.metrics().operations["mirror", "success"] < 50
        proxy.delay = 0
        await same(state, redis_server.url)


async def test_a_subscription_that_does_not_answer(
    redis_server: Any, proxy_to: Any, until: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A local copy is not shown while the network drops everything, and is loaded when it works again."""
    monkeypatch.setattr(lab_state.cache._redis_source, "_PING_SECONDS", 0.05)
    monkeypatch.setattr(lab_state.cache._feed, "SILENT_SECONDS", 0.05)
    proxy = await proxy_to(redis_server.port)
    async with manager(redis_server.url) as state, RedisCache(proxy.url).reader("name", local=True) as reader:
        await reader.wait_revision(await state.set("a", 1))
        await until(lambda: reader._local.fresh)
        proxy.open.clear()
        await until(lambda: not reader._local.fresh)
        await state.set("a", 2)
        proxy.open.set()
        await reader.wait_revision(2)
        await until(lambda: reader._local.fresh)
        assert await reader.get("a") == 2


async def test_old_connections_of_a_reader(own_redis: Any) -> None:
    """A read on a connection that was lost meanwhile is repeated on a new one."""
    redis = own_redis()
    async with manager(redis.url) as state:
        await same(state, redis.url)
        await state.set("a", 1)
        await same(state, redis.url)
    async with RedisCache(redis.url).reader("name") as reader:
        assert await asyncio.gather(*(reader.get("a") for _ in range(3))) == [1] * 3
        redis.call("SAVE")
        redis.kill()
        await asyncio.to_thread(redis.start)
        assert await reader.get("a") == 1
        redis.kill()
        with pytest.raises(UnavailableError, match=f"127.0.0.1:{redis.port}: ConnectionError"):
            await reader.get("a")


async def test_a_session_after_its_connection(redis_server: Any) -> None:
    """A session never connects again by itself, because the watched keys would be lost. It shows which mirror it has."""
    session = await RedisCache(redis_server.url).open("name", "one")
    assert repr(session) == f"<RedisSession of {VALUES!r}>"
    await session.aclose()
    with pytest.raises(UnavailableError, match="the connection was lost"):
        await session.look()


@pytest.mark.parametrize("closed", [True, False])
async def test_an_attribute_error_of_a_closed_connection_only(
    redis_server: Any, monkeypatch: pytest.MonkeyPatch, *, closed: bool
) -> None:
    """redis-py raises AttributeError where its stream was closed meanwhile. On an open connection it is a mistake in code."""
    session: Any = await RedisCache(redis_server.url).open("name", "one")
    connection = session._connection._connection

    async def mistaken(*_: object, **__: object) -> None:
        if closed:
            await connection.disconnect(nowait=True)
        raise AttributeError("'NoneType' object has no attribute 'drain'")

    with monkeypatch.context() as patched:
        patched.setattr(connection, "send_packed_command", mistaken)
        with pytest.raises(UnavailableError if closed else AttributeError, match="lost" if closed else "NoneType"):
            await session.look()
    await session.aclose()


async def test_a_user_who_may_not_look(own_redis: Any) -> None:
    """A user without the right to read or to subscribe gets an error that says so."""
    redis = own_redis()
    redis.call("ACL", "SETUSER", "poor", "on", ">word", "~*", "&*", "+@all", "-hget", "-subscribe")
    cache = RedisCache(f"redis://poor:word@127.0.0.1:{redis.port}")
    session = await cache.open("name", "one")
    with pytest.raises(UnsupportedError, match="NoPermissionError"):
        await session.look()
    await session.aclose()
    with pytest.raises(UnsupportedError, match="NoPermissionError"):
        await cache.reader("name")._source.subscribe()


@pytest.mark.parametrize("is_lost", [False, True], ids=["kept", "lost"])
async def test_a_reader_that_is_closed_during_a_read(redis_server: Any, *, is_lost: bool) -> None:
    """The read ends well, and its connection is closed after it. A later read keeps its connection again."""
    source: Any = RedisCache(redis_server.url).reader("name")._source
    await source.fetch(["a"])
    (connection,) = source._free
    if is_lost:  # the read opens another connection
        await connection._connection.disconnect(nowait=True)
    reading = asyncio.create_task(source.fetch(["a"]))
    await asyncio.sleep(0)
    await source.aclose()
    assert not reading.done()
    assert (await reading).values == {}
    assert (source._free, connection._connection.is_connected) == ([], False)
    await source.fetch(["a"])
    assert len(source._free) == 1
    await source.aclose()


async def test_an_answer_that_nobody_waits_for(redis_server: Any) -> None:
    """The answer to a ping whose caller was cancelled is not taken for the next one's."""
    subscription = await RedisCache(redis_server.url).reader("name")._source.subscribe()
    receiving = asyncio.create_task(subscription.receive())
    pinging = asyncio.create_task(subscription.ping())
    await asyncio.sleep(0)
    pinging.cancel()
    await subscription.ping()
    redis_server.call("PUBLISH", "lab_state:{name}:changes", "x")
    assert await receiving == b"x"
    await subscription.aclose()
