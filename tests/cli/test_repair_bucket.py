"""`repair` of a state in a bucket: what can be saved of its objects, and that the originals are kept."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from commanded import World
from histories import checkpoint
from s3_world import Bucket

from lab_state import CorruptionError, FencedError, Manager, read_state, restore_state
from lab_state.cli._repair import _repaired, _salvaged
from lab_state.cli._salvage import Salvaged, salvage_objects
from lab_state.cli._target import Target, parse_state
from lab_state.storage.s3._client import Requests
from lab_state.storage.s3._format import FENCE, SEQ, Names
from lab_state.storage.s3._open import NumberedObject
from lab_state.storage.s3._outcomes import ObjectInfo
from lab_state.storage.s3._pieces import _covered, _pieces

BASE = "state/modules/shop"
SNAPSHOT = f"{BASE}.json"
JOURNAL = f"{BASE}.journal/"
STRAY = f"{JOURNAL}{10**19 + 5}"

Objects = dict[str, tuple[bytes, dict[str, str]]]


async def crashed() -> Objects:
    """Return the objects of a state after a crash: `a` to `c` and `short` in the snapshot, and a record for each of `d` to `f`."""
    bucket = Bucket()
    state = Manager("shop", bucket.storage())
    await state.start()
    await state.set_many({"a": 1, "b": 1, "c": 1})
    await state.set("short", 1, ttl=1000)
    await state.flush()
    await checkpoint(state)
    for key in "def":
        await state.set(key, 1)
        await state.flush()
    objects = {key: bucket.get(key) for key in bucket.keys(BASE)}
    await state.stop()
    return objects


_made: Objects = {}


class Damaged:
    """A bucket with these objects."""

    def __init__(self, objects: Objects) -> None:
        self.bucket = Bucket()
        self.objects = objects
        for key, (data, metadata) in objects.items():
            self.bucket.put(key, data, metadata)

    @property
    def target(self) -> Target:
        return parse_state(f"s3://{self.bucket.name}/state/modules/shop")

    @property
    def records(self) -> list[str]:
        return sorted(key for key, (data, _) in self.objects.items() if data and key.startswith(JOURNAL))

    def edit(self, key: str, old: bytes, new: bytes, **changed: str) -> None:
        data, metadata = self.objects[key]
        assert old in data
        self.bucket.put(key, data.replace(old, new), {**metadata, **changed})

    async def repaired(self) -> tuple[Salvaged, dict[str, Any]]:
        """Repair the state. Check that the objects are kept, and that the state can be loaded. Return what was saved, and the values."""
        with pytest.raises(CorruptionError):
            await read_state("shop", self.bucket.storage())
        sizes = self.bucket.keys(BASE)
        dry = await _salvaged(self.target, self.bucket.storage())
        assert self.bucket.keys(BASE) == sizes
        objects = {key: self.bucket.get(key)[0] for key, size in sizes.items() if size}
        saved, revision, place = await _repaired(self.target, self.bucket.storage())
        assert saved.lost == dry.lost
        kept = str(place).removeprefix(f"s3://{self.bucket.name}/")
        assert kept.startswith(f"{BASE}.damaged-")
        copies = {key.removeprefix(kept): self.bucket.get(key)[0] for key in self.bucket.keys(kept)}
        assert copies == {key.rsplit("/", 1)[1]: data for key, data in objects.items()}
        async with Manager("shop", self.bucket.storage()) as state:
            assert state.revision == revision
            found = await state.get_all()
            await state.set("more", 1)
        return saved, found


@pytest.fixture
async def damaged() -> Damaged:
    if not _made:
        _made.update(await crashed())
    return Damaged(_made)


async def test_records_that_are_damaged_or_not_of_the_state(damaged: Damaged) -> None:
    """Records before the damage are kept. It is listed, and so are the records behind it, and an object that no start accepts."""
    _, second, _ = damaged.records
    damaged.edit(second, b'"e":1', b'"e":2')
    damaged.bucket.put(STRAY, b"stray")
    saved, found = await damaged.repaired()
    place = f"s3://{damaged.bucket.name}"
    assert saved.lost == [
        f"{place}/{second} is damaged; it was acknowledged",
        f"{place}/{STRAY} has a number that no writer reaches, so it is not part of the state",
        "change 5 of 'f': earlier changes are missing",
    ]
    assert found == {"a": 1, "b": 1, "c": 1, "short": 1, "d": 1}
    assert STRAY not in damaged.bucket.keys(JOURNAL)


async def test_a_snapshot_whose_bytes_and_metadata_are_wrong(damaged: Damaged) -> None:
    """Its values are kept, though one of them may be wrong, and so are expiry times and all records. Metadata of another snapshot do no harm."""
    damaged.edit(SNAPSHOT, b'"a":1', b'"a":2', **{SEQ: "100", FENCE: "100"})
    saved, found = await damaged.repaired()
    assert saved.lost == [
        "the snapshot: its checksum does not match its contents. The keys and values that can be read are kept, but one or more of them may be wrong"
    ]
    assert found == {"a": 2, "b": 1, "c": 1, "short": 1, "d": 1, "e": 1, "f": 1}
    assert await (await read_state("shop", damaged.bucket.storage())).expires_in("short") is not None


async def test_a_restore_beside_an_object_that_is_not_part_of_the_state(damaged: Damaged) -> None:
    """A restore in place deletes it, too, after it has copied it. Otherwise no start would succeed."""
    damaged.bucket.delete(SNAPSHOT)
    for key in damaged.records:
        damaged.bucket.delete(key)
    async with Manager("shop", damaged.bucket.storage(history=1000)) as state:
        await state.set("a", 2)
    damaged.bucket.put(STRAY, b"stray")
    revision = (await restore_state("shop", damaged.bucket.storage(), 0, into="shop")).revision
    assert (await read_state("shop", damaged.bucket.storage())).revision == revision
    assert [data for key in damaged.bucket.keys(BASE) if (data := damaged.bucket.get(key)[0]) == b"stray"] == [b"stray"]


async def test_an_object_that_changes_or_vanishes_meanwhile(damaged: Damaged, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the snapshot is replaced while the objects are read, they are read again. A record that the store does not return is listed."""
    gone = damaged.records[0]
    head, get, seen = Requests.head, Requests.get, list[str]()

    async def replaced(store: Requests, key: str) -> Any:
        seen.append(key)
        if len(seen) == 1:
            await asyncio.to_thread(damaged.edit, SNAPSHOT, b'"a":1', b'"a":2')
        return await head(store, key)

    async def lost(store: Requests, key: str) -> Any:
        return None if key == gone else await get(store, key)

    monkeypatch.setattr(Requests, "head", replaced)
    monkeypatch.setattr(Requests, "get", lost)
    saved = await _salvaged(damaged.target, damaged.bucket.storage())
    assert seen == [SNAPSHOT, SNAPSHOT]
    assert saved.lost[1] == f"s3://{damaged.bucket.name}/{gone} is missing, but the store lists it"


def record(start: int, key: str) -> bytes:
    members = {"from": start, "to": start + 1, "clear": False, "set": {key: 1}, "delete": [], "expires": {}}
    return json.dumps(members).encode()


def pieces(snapshot: bytes | None, covered: int | None, found: dict[int, NumberedObject | None]) -> Salvaged:
    """Return what can be saved of these objects."""
    got = None if snapshot is None else (ObjectInfo("etag", {}, len(snapshot)), snapshot)
    return salvage_objects(_pieces(Names.of("b", "", "shop"), got, covered, sorted(found), found))


def test_what_can_be_saved_of_objects() -> None:
    """Missing numbers are listed, but no number below the first one of a record. Records that follow another snapshot are not applied."""
    fence = NumberedObject(None, None)
    snapshot = b'{"a":"other"}'
    found = pieces(
        None, None, {1: fence, 9: NumberedObject(record(0, "x"), "none"), 11: NumberedObject(record(1, "y"), None)}
    )
    assert found.lost == ["s3://b/shop.journal/00000000000000000010 is missing"]
    assert found.state.entries.keys() == {"x", "y"}
    found = pieces(
        None, None, {1: fence, 7: NumberedObject(record(0, "x"), "none"), 10: NumberedObject(record(1, "y"), None)}
    )
    assert found.lost == ["the objects s3://b/shop.journal/00000000000000000008 to 9 are missing"]
    found = pieces(None, None, {1: fence, 9: NumberedObject(record(3, "x"), "own")})
    assert found.lost == ["the snapshot is missing", "change 4 of 'x': earlier changes are missing"]
    assert found.highest == 4
    found = pieces(snapshot, None, {1: fence, 2: NumberedObject(record(0, "x"), "12-01234567")})
    assert found.lost == ["change 1 of 'x': made after another snapshot"]
    assert found.state.entries.keys() == {"a"}
    found = pieces(snapshot, None, {1: fence, 2: NumberedObject(record(0, "x"), None)})
    assert found.lost[0].startswith("change 1: applied only because the revisions fit")
    assert found.state.entries.keys() == {"a", "x"}
    assert pieces(None, None, {}).lost == []
    assert _covered(ObjectInfo("etag", {SEQ: "damaged"}, 2), b"{}") is None


async def test_the_command_in_a_bucket(tmp_path: Path) -> None:
    """A dry run needs no `--depose`, and a repair does. The output names the damage, each loss, and the place of the objects."""
    world = World("running in a bucket", tmp_path)
    with pytest.raises(FencedError):
        async with world.filled():
            name = max(key for key, size in world.bucket.keys("states/shop.journal/").items() if size)
            data, metadata = world.bucket.get(name)
            world.bucket.put(name, data.replace(b"odd", b"ode"), metadata)
            dry = await world.run("repair", "--dry-run", "--json", world.state)
            assert (dry.code, dry.json["repaired"], dry.json["keys"], dry.json["kept"]) == (0, False, 3, None)
            refused = await world.run("repair", world.state)
            assert (refused.code, refused.out) == (3, "")
            assert "--depose" in refused.err
            done = await world.run("repair", "--depose", world.state)
            assert done.code == 0
            assert done.out.splitlines()[-1].startswith(f"the damaged objects are in {world.state}.damaged-")
            assert (await world.reading()).keys() == {"cart/ann", "stock/apple", "stock/pear"}
