"""What a forked child makes of connections to Redis that it inherited."""

from __future__ import annotations

from typing import Any

from forked import error_of, in_child
from mirrored import mirror_of

from lab_state import Config, Manager, MemoryStorage, RedisCache
from lab_state.cache._redis_source import RedisSource


async def test_connections_are_refused_in_a_child_and_go_on_in_the_parent(redis_server: Any) -> None:
    """A child that uses the reader's or the mirror's connection is refused, and its end closes nothing for the parent."""
    cache = RedisCache(redis_server.url)
    state = Manager(Config(name="name", flush_interval=0), MemoryStorage(), cache)
    async with state, cache.reader("name") as reader, cache.reader("name", local=True) as local:
        for one in (reader, local):
            await one.wait_revision(await state.set("a", 1))
        source, mirror = reader._source, state._mirror
        assert isinstance(source, RedisSource)
        assert mirror is not None
        session: Any = mirror._session

        def use() -> list[list[str]]:
            return [error_of(session.look), error_of(lambda: source.fetch(["a"])), error_of(lambda: local.get("a"))]

        for _ in range(2):
            refusals = await in_child(use)
            assert [error for error, _ in refusals] == ["UnsupportedError"] * 3
            assert all("the parent of this forked process" in message for _, message in refusals)
        assert await in_child(lambda: [error_of(one.aclose) for one in (session, source)]) == [["returned", "None"]] * 2
        for one in (reader, local):
            await one.wait_revision(await state.set("a", 2))
            assert await one.get("a") == 2
        assert mirror_of(state).up
