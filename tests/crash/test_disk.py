"""What the model of a disk lets a crash leave, and what not."""

from __future__ import annotations

import random

from disk import CHUNK, Create, Disk, Link, Operation, Rename, State, Sync, SyncDirectory, Truncate, Unlink, Write

DIRECTORY: State = {"d": None}


def left(*operations: Operation, start: State = DIRECTORY, limit: int = 10_000) -> list[State]:
    """Return every distinct state that a crash may leave after these operations, without the directory."""
    disk = Disk(start)
    for operation in operations:
        disk.apply(operation)
    found: list[State] = []
    for state in disk.states(limit, random.Random(1)):
        files: State = {path: data for path, data in state.items() if data is not None}
        if files not in found:
            found.append(files)
    return found


def contents(*operations: Operation, start: State) -> set[bytes | None]:
    return {state.get("d/f") for state in left(*operations, start=start)}


def test_an_unsynced_write() -> None:
    """An unsynced write is kept, lost, torn in half, zeroed, or shows the old content of its blocks."""
    start = {"d": None, "d/f": b"old"}
    assert contents(Write(1, 3, b"more"), start=start) == {
        b"oldmore",
        b"old",
        b"oldmo",
        b"old\0\0\0\0",
        b"oldyyyy",
    }
    assert contents(Write(1, 0, b"NEW"), start=start) == {b"NEW", b"old", b"Nld", b"\0\0\0", b"yyy"}


def test_chunks_are_independent() -> None:
    """The second chunk of a write may be kept without the first one. Each has 5 outcomes."""
    data = b"a" * CHUNK + b"b" * 10
    start = {"d": None, "d/f": b""}
    found = contents(Write(1, 0, data), start=start)
    assert data in found
    assert bytes(CHUNK) + b"b" * 10 in found
    assert b"a" * CHUNK + bytes(10) in found
    assert len(found) == 5 * 5 - 4  # below a second chunk, a lost one is a zeroed one


def test_a_sync_makes_sure() -> None:
    """After a sync there is one state. Later writes are uncertain again."""
    start = {"d": None, "d/f": b""}
    assert contents(Write(1, 0, b"abcd"), Sync(1, ok=True), start=start) == {b"abcd"}
    assert b"abcd" in contents(Write(1, 0, b"abcd"), Sync(1, ok=True), Write(1, 4, b"e"), start=start)
    assert b"" not in contents(Write(1, 0, b"abcd"), Sync(1, ok=True), Write(1, 4, b"e"), start=start)


def test_a_failed_sync_dooms() -> None:
    """Writes before a failed sync may be lost for ever. Later syncs only make later writes durable."""
    found = contents(
        Write(1, 0, b"abcd"), Sync(1, ok=False), Sync(1, ok=True), Write(1, 4, b"e"), Sync(1, ok=True),
        start={"d": None, "d/f": b""},
    )  # fmt: skip
    assert found == {b"abcde", b"\0\0\0\0e", b"ab\0\0e", b"yyyye"}


def test_a_truncation() -> None:
    """A truncation is kept or lost, and a sync makes it durable."""
    start = {"d": None, "d/f": b"abcd"}
    assert contents(Truncate(1, 1), start=start) == {b"a", b"abcd"}
    assert contents(Truncate(1, 1), Sync(1, ok=True), start=start) == {b"a"}


def test_a_sync_of_a_file_does_not_force_its_name() -> None:
    """The name of a file is durable only after the sync of its directory."""
    made = (Create("d/f", 1), Write(1, 0, b"x"), Sync(1, ok=True))
    assert left(*made) == [{"d/f": b"x"}, {}]
    assert left(*made, SyncDirectory("d", ok=True)) == [{"d/f": b"x"}]
    assert left(*made, SyncDirectory(".", ok=True)) == [{"d/f": b"x"}, {}]
    assert left(*made, SyncDirectory("d", ok=False), SyncDirectory("d", ok=True)) == [{"d/f": b"x"}, {}]


def test_a_link_is_a_second_name() -> None:
    """It is kept or lost like any other name, and stays with the file when the first name leads to another one."""
    start = {"d": None, "d/f": b"old"}
    assert left(Link("d/l", 1), start=start) == [{"d/f": b"old", "d/l": b"old"}, {"d/f": b"old"}]
    assert left(Link("d/l", 1), SyncDirectory("d", ok=True), start=start) == [{"d/f": b"old", "d/l": b"old"}]
    replaced = (Create("d/t", 2), Write(2, 0, b"new"), Sync(2, ok=True), Link("d/l", 1), Rename("d/t", "d/f", 2))
    assert left(*replaced, SyncDirectory("d", ok=True), start=start) == [{"d/f": b"new", "d/l": b"old"}]


def test_a_rename_is_atomic() -> None:
    """After a rename there is the old file or the new one.

    With the old one, the new one may exist under its first name.
    """
    start = {"d": None, "d/f": b"old"}
    replaced = (Create("d/t", 2), Write(2, 0, b"new"), Sync(2, ok=True), Rename("d/t", "d/f", 2))
    found = left(*replaced, start=start)
    assert {"d/f": b"new"} in found
    assert {"d/f": b"old"} in found
    assert {"d/f": b"old", "d/t": b"new"} in found
    assert len(found) == 3
    assert left(*replaced, SyncDirectory("d", ok=True), start=start) == [{"d/f": b"new"}]


def test_a_removed_name_may_stay() -> None:
    """A removed name may come back until its directory is synced."""
    start = {"d": None, "d/f": b"x"}
    assert left(Unlink("d/f"), start=start) == [{}, {"d/f": b"x"}]
    assert left(Unlink("d/f"), SyncDirectory("d", ok=True), start=start) == [{}]


def test_a_lost_directory_takes_all_with_it() -> None:
    """A file with a synced name is lost if the name of its directory is lost."""
    made = (
        Create("d", 0, is_directory=True), Create("d/f", 1), Write(1, 0, b"x"), Sync(1, ok=True),
        SyncDirectory("d", ok=True),
    )  # fmt: skip
    assert left(*made, start={}) == [{"d/f": b"x"}, {}]
    assert left(*made, SyncDirectory(".", ok=True), start={}) == [{"d/f": b"x"}]


def test_where_there_are_too_many_states() -> None:
    """If there are too many states, a sample is chosen, always the same for one seed.

    All kept and all lost are in it.
    """
    data = bytes(range(256)) * 16
    start = {"d": None, "d/f": b""}
    found = left(Write(1, 0, data), start=start, limit=100)
    assert 50 < len(found) <= 100
    assert {"d/f": data} in found
    assert {"d/f": b""} in found
    assert found == left(Write(1, 0, data), start=start, limit=100)
