"""Every bit, length and block of what is kept in S3 damaged, and objects lost, doubled and swapped.

What is damaged was written to the store of this test run. The mass goes through the pure functions that opening is made
of; some of each kind through all of the opening, with the answers to its requests taken from a dict; and some through
the store and a whole manager. All must say the same.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Iterator
from functools import partial
from itertools import combinations
from typing import Any, NamedTuple

import msgspec
import pytest
from running import flusher_of
from s3_world import Bucket

from lab_state import Config, CorruptionError, Manager
from lab_state._codec import LoadedState, decode_snapshot, replay
from lab_state.storage.s3._format import FENCE, SEQ, Names, unframe
from lab_state.storage.s3._open import _stamp, open_state
from lab_state.storage.s3._outcomes import ObjectInfo

NAME = "lab"
REFUSED = -1
"""In place of a revision: the start must fail."""


class Object(NamedTuple):
    body: bytes
    metadata: dict[str, str]


World = dict[str, Object]
Outcome = tuple[int, Any]


class Answers:
    """A stand-in for `Requests` that answers from a dict as a store would."""

    def __init__(self, world: World) -> None:
        self.world = world

    async def head(self, key: str) -> ObjectInfo | None:
        there = self.world.get(key)
        return None if there is None else _found(there)

    async def get(self, key: str) -> tuple[ObjectInfo, bytes] | None:
        there = self.world.get(key)
        return None if there is None else (_found(there), there.body)

    async def sizes(self, prefix: str, after: str) -> dict[str, int]:
        return {key: len(self.world[key].body) for key in sorted(self.world) if key.startswith(prefix) and key > after}

    async def put(self, key: str, body: Any, metadata: dict[str, str], if_match: str | None) -> str:
        assert if_match is None  # opening replaces nothing
        assert key not in self.world
        self.world[key] = Object(body.content, metadata)
        return _found(self.world[key]).etag

    async def put_anyhow(self, key: str, metadata: dict[str, str], if_match: str | None) -> bool:
        return False

    async def check_deletes(self, key: str) -> None:
        """Do nothing: keys may be deleted."""

    def tries(self, *_: object) -> Any:
        return self

    async def pause(self, *_: object) -> None:
        """Do nothing: there is nothing to wait for."""


def _found(there: Object) -> ObjectInfo:
    return ObjectInfo(f'"{hashlib.md5(there.body).hexdigest()}"', there.metadata, len(there.body))


class Case(NamedTuple):
    """Objects as a crash would leave them.

    Attributes:
        names: Their keys.
        world: The objects.
        history: Every state that there ever was, by revision.
        records: The revision that each record leads to, by its number.
    """

    names: Names
    world: World
    history: dict[int, dict[str, Any]]
    records: dict[int, int]


@pytest.fixture(scope="module")
def case() -> Case:
    return asyncio.run(written())


async def written() -> Case:
    """Return a snapshot and its fence, and two lives that ended in a crash, with three and two records."""
    bucket = Bucket()
    history: dict[int, dict[str, Any]] = {0: {}}
    records: dict[int, int] = {}

    async def write(state: Manager) -> None:
        number = state.revision
        await state.set_many({f"key-{number}": {"n": [number, "ü"], "text": "0123456789abcdef" * 2}, "last": number})
        history[state.revision] = await state.get_all()
        await state.flush()

    def manager() -> Manager:
        return Manager(Config(name=NAME, flush_interval=None), bucket.storage())

    async with manager() as state:
        for _ in range(12):
            await write(state)
    for changes in (3, 2):
        await (state := manager()).start()
        session = flusher_of(state)._session
        for _ in range(changes):
            await write(state)
            records[session._seq] = state.revision  # type: ignore[attr-defined]
        await flusher_of(state).abort().aclose()
    names = Names.of(bucket.name, "state/modules", NAME)
    return Case(names, {key: Object(*bucket.get(key)) for key in bucket.keys("")}, history, records)


async def opened(names: Names, world: World) -> Outcome:
    """Return what a start would find: revision and state. A refused state must be unchanged, without a fence."""
    before = dict(world)
    try:
        loaded = (await open_state(Answers(world), names)).loaded  # type: ignore[arg-type]
    except CorruptionError:
        assert world == before
        return REFUSED, None
    try:
        snapshot, found, *_ = loaded.recovery
        begin = LoadedState({}, 0) if snapshot is None else decode_snapshot(snapshot, names.snapshot)
        entries, revision, *_ = replay(begin, found, names.snapshot)
    except CorruptionError:
        return REFUSED, None
    return revision, msgspec.json.decode(msgspec.json.encode(entries))


async def started(world: World) -> Outcome:
    """Return the same through a manager, on the store of this test run."""
    bucket = Bucket()
    names = Names.of(bucket.name, "state/modules", NAME)
    for key, there in world.items():
        bucket.put(key, there.body, there.metadata)
    state = Manager(Config(name=NAME, flush_interval=None), bucket.storage())
    try:
        await state.start()
    except CorruptionError:
        return REFUSED, None
    else:
        found = state.revision, await state.get_all()
        await flusher_of(state).abort().aclose()
        return found
    finally:
        for key, there in world.items():
            assert key == names.probe or Object(*bucket.get(key)) == there


Changed = dict[str, Object | None]
"""Objects in place of those of a whole world, or none."""


async def judge(case: Case, changed: Changed, right: set[int], *, managed: bool) -> None:
    """Check the outcome for a damaged world, and for the same world after the repair."""
    damaged = {**case.world, **changed}
    world = {key: there for key, there in damaged.items() if there is not None}
    before = dict(world)
    revision, state = await opened(case.names, world)
    assert revision in right, f"revision {revision}, not one of {right}: {changed}"
    assert state == case.history.get(revision)
    assert before.items() <= world.items()
    if managed:
        assert await started(before) == (revision, state)
    if revision == REFUSED:
        mended = {key: there for key, there in world.items() if key in case.world or key not in changed}
        mended.update((key, case.world[key]) for key in changed if key in case.world)
        assert await opened(case.names, mended) == (max(case.history), case.history[max(case.history)]), changed


def damages(data: bytes) -> Iterator[bytes]:
    """Yield each damage: every bit flipped, every length but 0, and zeros of 64 and 512 bytes at every offset."""
    for position in range(len(data)):
        for bit in range(8):
            damaged = bytearray(data)
            damaged[position] ^= 1 << bit
            yield bytes(damaged)
    yield from (data[:length] for length in range(1, len(data)))
    for size in (64, 512):
        for start in range(len(data)):
            yield data[:start] + bytes(min(size, len(data) - start)) + data[start + size :]


def count_of(data: bytes) -> int:
    """Return how many `damages` makes."""
    return 11 * len(data) - 1


OPENED = 211
"""Every so manieth case goes through all of the opening."""


async def sweep(case: Case, key: str, metadata: dict[str, str], read: Callable[[bytes], object]) -> int:
    """Check that every damage of one object is refused; return how many there are."""
    whole = case.world[key].body
    count = 0
    read(whole)
    for count, body in enumerate(damages(whole), 1):
        with pytest.raises(CorruptionError):
            read(body)
        if count % OPENED == 1:
            await judge(case, {key: Object(body, metadata)}, {REFUSED}, managed=count == 1)
    return count


@pytest.mark.parametrize("bare", [False, True])
async def test_every_bit_length_and_block_of_a_snapshot(case: Case, *, bare: bool) -> None:
    """A damaged snapshot is refused, with its metadata and without."""
    names = case.names
    whole = case.world[names.snapshot]
    metadata = {} if bare else whole.metadata

    def read(body: bytes) -> None:
        _stamp((_found(Object(body, metadata)), body), names.snapshot)
        decode_snapshot(body, names.snapshot)

    assert await sweep(case, names.snapshot, metadata, read) == count_of(whole.body) > 9_000


async def test_every_bit_length_and_block_of_a_record(case: Case) -> None:
    """A damaged record is refused, the last one too: an object store tears nothing."""
    names, bodies, count = case.names, [], 0
    for number in case.records:
        key = names.record(number)
        bodies.append(case.world[key].body)
        read = partial(unframe, NAME, number, path=key)
        count += await sweep(case, key, case.world[key].metadata, lambda body, read=read: read(body=body))  # type: ignore[misc]
    assert count == sum(map(count_of, bodies)) > 8_000


async def test_every_bit_of_the_metadata_of_a_snapshot(case: Case) -> None:
    """Damaged numbers in the metadata, missing ones, or those of another snapshot are refused."""
    key, whole = case.names.snapshot, case.world[case.names.snapshot]
    latest, count = max(case.history), 0
    for name in (SEQ, FENCE):
        good = whole.metadata[name]
        bad = {
            chr(ord(good[at]) ^ 1 << bit).join((good[:at], good[at + 1 :]))
            for at in range(len(good))
            for bit in range(7)
        }
        for value in sorted({*bad, "", good[:-1], good + "0", "9" * 20}):
            count += 1
            metadata = {**whole.metadata, name: value}
            await judge(case, {key: whole._replace(metadata=metadata)}, {REFUSED}, managed=count % 20 == 1)
        without = {other: value for other, value in whole.metadata.items() if other != name}
        await judge(case, {key: whole._replace(metadata=without)}, {latest} if name == SEQ else {REFUSED}, managed=True)
    await judge(case, {key: whole._replace(metadata={})}, {latest}, managed=True)
    assert count > 20


async def test_objects_lost_emptied_doubled_and_swapped(case: Case) -> None:
    """A record or a fence that is missing, empty, or under another number is refused.

    Only the last ones may be lost.
    """
    names, world = case.names, case.world
    numbers = [number for key in world if (number := names.number(key)) is not None and number > 12]
    latest, last = max(case.history), max(numbers)
    count = 0

    async def judged(changed: Changed, right: set[int]) -> None:
        nonlocal count
        count += 1
        await judge(case, changed, right, managed=count % 60 == 1)

    for number in numbers:
        key, there = names.record(number), world[names.record(number)]
        # A deleted last record looks like one that was never written.
        await judged({key: None}, {case.records[last - 1]} if number == last else {REFUSED})
        await judged({key: Object(b"", there.metadata)}, {REFUSED} if there.body else {latest})
        await judged({key: Object(b"0", there.metadata)}, {REFUSED})
        for other in (*numbers, last + 1, last + 2):
            elsewhere = names.record(other)
            if other != number and there.body:
                await judged({elsewhere: there}, {REFUSED})
    for one, two in combinations([number for number in numbers if world[names.record(number)].body], 2):
        first, second = names.record(one), names.record(two)
        await judged({first: world[second], second: world[first]}, {REFUSED})
    await judged({names.snapshot: None}, {REFUSED})
    await judged({names.snapshot: Object(b"", world[names.snapshot].metadata)}, {REFUSED})
    assert count > 60
