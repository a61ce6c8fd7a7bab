"""What every cache promises: it shows one whole revision at a time, and does not undo another writer's mirror."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest

from lab_state import Cache, CacheSession, Reader
from lab_state.cache import Seen, Slice, Step

NOTHING = Seen(None, 0)


async def parts(*slices: Slice) -> AsyncIterator[Slice]:
    for part in slices:
        yield part


def values(**entries: bytes) -> Slice:
    return Slice(entries, {}, [])


async def filled(cache: Cache, *, writer: str = "one", revision: int = 5) -> CacheSession:
    session = await cache.open("name", writer)
    assert await session.fill(revision, parts(values(a=b"1", b=b'"x"')), await session.look())
    return session


async def shown(cache: Any) -> tuple[int, dict[str, Any]]:
    async with cache.reader("name") as reader:
        return await reader.revision(), await reader.get_all()


async def test_nothing_is_there_at_first(cache: Cache) -> None:
    """There is no mirror before the first fill."""
    session = await cache.open("name", "one")
    assert await session.look() == NOTHING
    await session.aclose()
    await session.aclose()


async def test_a_fill_is_shown(cache: Any) -> None:
    """A fill puts values, revision and writer in place."""
    session = await filled(cache)
    assert await session.look() == ("one", 5)
    assert await shown(cache) == (5, {"a": 1, "b": "x"})
    await session.aclose()


async def test_an_empty_state_is_a_copy(cache: Any) -> None:
    """The mirror of a state without keys exists."""
    session = await cache.open("name", "one")
    assert await session.fill(0, parts(values()), NOTHING)
    assert await shown(cache) == (0, {})
    await session.aclose()


async def test_a_fill_replaces_everything(cache: Any) -> None:
    """A fill removes every earlier key and expiry time."""
    first = await filled(cache)
    step = parts(Slice({"c": b"3"}, {"c": 9_999_999_999_999}, []))
    assert await first.apply(Step(5, 6, cleared=False), step)
    second = await cache.open("name", "two")
    assert await second.fill(7, parts(values(c=b"1"), values(d=b"2")), await second.look())
    assert await shown(cache) == (7, {"c": 1, "d": 2})
    await first.aclose()
    await second.aclose()


async def test_steps_set_and_delete(cache: Any) -> None:
    """A step sets and deletes keys, and adds and removes expiry times. Deleting a missing key is no error."""
    session = await filled(cache)
    assert await session.apply(Step(5, 6, cleared=False), parts(Slice({"a": b"2"}, {"a": 1}, ["b", "never"])))
    assert await shown(cache) == (6, {})  # `a` has expired
    assert await session.apply(Step(6, 8, cleared=False), parts(values(a=b"3")))
    assert await shown(cache) == (8, {"a": 3})
    assert await session.apply(Step(8, 9, cleared=False), parts(Slice({"a": b"4"}, {"a": 9_999_999_999_999}, [])))
    assert await session.apply(Step(9, 10, cleared=False), parts(Slice({}, {}, ["a"])))
    assert await shown(cache) == (10, {})
    await session.aclose()


async def test_a_step_that_clears(cache: Any) -> None:
    """A step may clear everything first."""
    session = await filled(cache)
    assert await session.apply(Step(5, 6, cleared=True), parts(values(c=b"[]")))
    assert await shown(cache) == (6, {"c": []})
    assert await session.apply(Step(6, 7, cleared=True), parts(values()))
    assert await shown(cache) == (7, {})
    await session.aclose()


async def test_a_large_step_is_one_step(cache: Any) -> None:
    """A step with many slices, megabytes, and long and strange keys is one step, and all of it comes back."""
    session = await filled(cache)
    keys = {f"{number} \r\n é€ {'k' * 900}": b'"%b"' % (b"x" * 1000) for number in range(3000)}
    items = list(keys.items())
    slices = [Slice(dict(items[at : at + 100]), {}, []) for at in range(0, 3000, 100)]
    assert await session.apply(Step(5, 6, cleared=True), parts(*slices))
    revision, everything = await shown(cache)
    assert revision == 6
    assert everything == dict.fromkeys(keys, "x" * 1000)
    await session.aclose()


async def test_only_the_own_copy_is_changed(cache: Any) -> None:
    """A step on another writer's mirror, or on another revision, is refused."""
    first = await filled(cache)
    assert not await first.apply(Step(4, 6, cleared=False), parts(values(a=b"2")))
    second = await filled(cache, writer="two", revision=9)
    assert not await first.apply(Step(5, 6, cleared=False), parts(values(a=b"2")))
    assert await first.look() == ("two", 9)
    assert await shown(cache) == (9, {"a": 1, "b": "x"})
    await first.aclose()
    await second.aclose()


async def test_a_fill_over_something_else_is_not_made(cache: Any) -> None:
    """A fill is refused if another writer has written a mirror since `look`."""
    late = await cache.open("name", "late")
    seen = await late.look()
    session = await filled(cache)
    assert not await late.fill(3, parts(values(a=b"2")), seen)
    assert await shown(cache) == (5, {"a": 1, "b": "x"})
    assert await late.fill(6, parts(values(a=b"2")), await late.look())
    assert not await session.apply(Step(5, 7, cleared=False), parts(values(a=b"3")))
    await session.aclose()
    await late.aclose()


async def test_names_are_apart(cache: Any) -> None:
    """Each name has a separate mirror."""
    session = await filled(cache)
    other = await cache.open("other", "one")
    assert await other.look() == NOTHING
    assert await other.fill(1, parts(values(z=b"0")), NOTHING)
    assert await shown(cache) == (5, {"a": 1, "b": "x"})
    await session.aclose()
    await other.aclose()


async def test_those_who_follow_are_told(cache: Any, until: Any) -> None:
    """A reader with a local copy follows fills, steps, clears and heartbeats."""
    reader: Reader = cache.reader("name", local=True)
    async with reader:
        session = await filled(cache)
        await reader.wait_revision(5)
        await until(lambda: reader._local.fresh)
        assert await session.apply(
            Step(5, 6, cleared=False), parts(values(c=b"{}"), Slice({"d": b"1"}, {"d": 1}, ["a"]))
        )
        await reader.wait_revision(6)
        assert await reader.get_all() == {"b": "x", "c": {}}
        assert await session.apply(Step(6, 7, cleared=True), parts(values(e=b"null")))
        await reader.wait_revision(7)
        assert reader._local.shown == {"e": None}
        await session.look()
        assert await session.fill(7, parts(values(e=b"null")), await session.look())
        await until(lambda: reader._local.fresh)
        assert await reader.get("e") is None
        await session.aclose()


async def test_a_fill_that_fails_changes_nothing(cache: Any) -> None:
    """A fill whose slices raise an error changes nothing."""

    async def failing() -> AsyncIterator[Slice]:
        yield values(a=b"7")
        raise OSError("no more")

    session = await filled(cache)
    with pytest.raises(OSError, match="no more"):
        await session.fill(8, failing(), await session.look())
    assert await shown(cache) == (5, {"a": 1, "b": "x"})
    await session.aclose()
