"""Files that each released format wrote must open for ever. `golden/v1` was written by format 1 and is never written again."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import pytest

from lab_state import FileStorage, Manager
from lab_state._codec import LoadedState, decode_snapshot, replay
from lab_state._journal import NO_BASE, Accepted, accept, base_of, scan
from lab_state._migrations import ANY
from lab_state._types import decode_value
from lab_state.testing import ManualClock

V1 = Path(__file__).parent / "golden" / "v1"

STATE: dict[str, Any] = {
    "some-key": "some-value",
    "n": 1,
    "pi": 3.5,
    "yes": True,
    "nothing": None,
    "users/é": {"name": "Zoë 😀", "tags": ["a", "b"], "big": 2**64},
    "gone later": [1, {"a": []}],
}

STATE_AFTER: dict[str, Any] = {
    "some-key": "some-value",
    "n": 3,
    "pi": 3.5,
    "yes": True,
    "nothing": 0.5,
    "users/é": {"name": "Zoë 😀", "tags": ["a", "b"], "big": 2**64},
    "new": {"line": "a\nb", "null": None},
}

WALLS: dict[str, Any] = {"n": 3, "stays": [1, {"a": "é"}]}

MIGRATED: dict[str, Any] = {"users/ann": {"first": "Ann", "last": "B", "v": 3}, "n": 2}

GO_MAP: dict[str, Any] = {
    "config": {"enabled": True, "hosts": ["a.example", "b.example"], "limits": {"max": 1e6, "min": 1e-7}},
    "count": 3,
    "html": "<b>&\u2028",
    "last_run": "2025-06-01T12:34:56.789Z",
    "nothing": None,
    "ratio": 0.25,
}


def read(name: str) -> bytes:
    return (V1 / name).read_bytes()


def name_in(journal: str | None) -> str:
    """Return the name of the state that a golden journal belongs to."""
    own = {"walls.journal", "followed.journal", "migrated.journal"}
    return journal.removesuffix(".journal") if journal in own else "state"


def content(loaded: LoadedState) -> tuple[dict[str, Any], int]:
    entries: dict[str, Any] = dict(loaded.entries)
    return {key: decode_value(stored, Any) for key, stored in entries.items()}, loaded.revision


def load(journal: str, snapshot: str | None) -> tuple[Accepted, int, LoadedState]:
    """Return what the two files stand for: the verdict, the number of bytes after the last record, the state."""
    data = read(journal)
    base = NO_BASE if snapshot is None else base_of(len(read(snapshot)), zlib.crc32(read(snapshot)))
    found = scan(data, name_in(journal), journal)
    accepted = accept(found, len(data), base, journal)
    whole = accepted.full if snapshot is None else read(snapshot)
    assert whole is not None
    loaded = replay(decode_snapshot(whole, journal), accepted.records, journal)
    return accepted, len(data) - found.end, loaded


@pytest.mark.parametrize(
    ("name", "values", "revision"), [("state.json", STATE, 42), ("empty.json", {}, 7), ("go-map.json", GO_MAP, 0)]
)
def test_a_snapshot_opens(name: str, values: dict[str, Any], revision: int) -> None:
    """A snapshot of format 1, and a map that the Go original wrote, hold what they held."""
    assert content(decode_snapshot(read(name), name)) == (values, revision)


def test_a_journal_opens() -> None:
    """A journal of format 1 has the changes that follow its snapshot, and a stale record that is skipped."""
    accepted, torn, loaded = load("state.journal", "state.json")
    assert (accepted.full, len(accepted.records), accepted.unclean, torn) == (None, 3, True, 0)
    assert content(loaded) == (STATE_AFTER, 45)


def test_a_torn_journal_opens() -> None:
    """A journal of format 1 with a torn tail has the changes before it."""
    accepted, torn, loaded = load("torn.journal", "state.json")
    assert (len(accepted.records), accepted.unclean) == (3, True)
    assert torn > 64
    assert content(loaded) == (STATE_AFTER, 45)


def test_a_journal_with_the_whole_state_opens() -> None:
    """A journal of format 1 that begins with the whole state needs no snapshot."""
    accepted, torn, loaded = load("full.journal", None)
    assert (len(accepted.records), accepted.unclean, torn) == (2, True, 0)
    assert content(loaded) == ({"z": 0}, 12)


def test_a_journal_with_wall_times_opens() -> None:
    """A later writer of format 1 has the wall clock in each header, snapshot and record. The clock went back before the last records."""
    accepted, torn, loaded = load("walls.journal", "walls.json")
    assert (len(accepted.records), accepted.unclean, torn) == (3, True, 0)
    assert content(loaded) == (WALLS, 5)
    assert (loaded.expires, loaded.wall) == ({}, 1_699_999_945_000)
    snapshot = decode_snapshot(read("walls.json"), "walls.json")
    assert (snapshot.expires, snapshot.time, snapshot.wall) == (
        {"stays": 2_700_000_000_000},
        1_700_000_005_000,
        1_700_000_005_000,
    )


def test_a_journal_with_an_end_opens() -> None:
    """A journal of format 1 that ends with an `E` frame has the changes before it. Bytes after that frame are a torn tail."""
    for name, unclean, rest in (("ended.journal", False, 14), ("ended-torn.journal", True, 131)):
        accepted, after, loaded = load(name, "state.json")
        assert (accepted.full, len(accepted.records), accepted.unclean, after) == (None, 3, unclean, rest)
        assert content(loaded) == (STATE_AFTER, 45)
    accepted, after, loaded = load("ended-full.journal", None)
    assert (len(accepted.records), accepted.unclean, after) == (2, True, 14)
    assert content(loaded) == ({"z": 0}, 12)


def test_a_journal_with_versions_opens() -> None:
    """A later writer of format 1 has the versions of the schema in its snapshots, and in each record that changes them."""
    accepted, torn, loaded = load("migrated.journal", "migrated.json")
    assert (len(accepted.records), accepted.unclean, torn) == (3, True, 0)
    assert content(loaded) == (MIGRATED, 7)
    assert (loaded.versions, loaded.expires) == ((3, 2), {"users/ann": 1_700_003_600_000})
    assert decode_snapshot(read("migrated.json"), "migrated.json").versions == (2, 1)


@pytest.mark.parametrize(
    ("snapshot", "journal", "values"),
    [
        ("migrated.json", "migrated.journal", MIGRATED),
        ("walls.json", "walls.journal", WALLS),
        ("followed.json", "followed.journal", {"n": 2}),
        ("state.json", "state.journal", STATE_AFTER),
        ("state.json", "torn.journal", STATE_AFTER),
        ("state.json", "full.journal", {"z": 0}),
        ("state.json", "ended.journal", STATE_AFTER),
        ("state.json", "ended-torn.journal", STATE_AFTER),
        ("state.json", "ended-full.journal", {"z": 0}),
        ("go-map.json", None, GO_MAP),
        ("empty.json", None, {}),
    ],
)
async def test_a_manager_opens_them(tmp_path: Path, snapshot: str, journal: str | None, values: dict[str, Any]) -> None:
    """A manager starts on files of format 1, and leaves what it found."""
    name = name_in(journal)
    (tmp_path / f"{name}.json").write_bytes(read(snapshot))
    if journal is not None:
        (tmp_path / f"{name}.journal").write_bytes(read(journal))
    clock = ManualClock()
    for _ in range(2):
        async with Manager(name, FileStorage(tmp_path), schema=ANY, clock=clock) as state:
            assert await state.get_all() == values
