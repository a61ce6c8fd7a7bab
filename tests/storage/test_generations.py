"""The names of the files of a history, their generations, holes, and the generation that has a moment."""

from __future__ import annotations

import pytest
from msgspec import Raw

from lab_state import _journal as journal
from lab_state._codec import encode_snapshot
from lab_state._entries import Stored
from lab_state._journal import ANY_BASE, NO_BASE
from lab_state.shared._results import SnapshotCalls
from lab_state.storage._generations import (
    HistoryFile,
    Moment,
    Span,
    StoredGeneration,
    find_revision,
    find_time,
    format_name,
    grouped,
    holes,
    journal_file,
    lives,
    moment_of_record,
    moment_of_snapshot,
    parse_name,
    revision_of_record,
    snapshot_file,
)

BASE, OTHER = "135-e394d24d", "1-00000000"
SALT = "0123456789abcdef"


def span(first: int, last: int, since: int = 0, until: int = 0) -> Span:
    return Span(Moment(first, since), Moment(last, until))


@pytest.mark.parametrize(
    ("file", "name"),
    [
        (snapshot_file(41, 1700000000000, BASE), f"00000000000000000041-1700000000000-{BASE}.json"),
        (snapshot_file(2**63 - 1, -5, BASE), f"09223372036854775807-0-{BASE}.json"),
        (journal_file(41, 1, BASE, SALT), f"00000000000000000041-1-{SALT}-{BASE}.journal"),
        (journal_file(0, 0, NO_BASE, SALT), f"00000000000000000000-0-{SALT}-none.journal"),
        (journal_file(7, 2, ANY_BASE, SALT), f"00000000000000000007-2-{SALT}-full.journal"),
        (journal_file(7, 2, ANY_BASE, "../evil"), "00000000000000000007-2-00000000d066af62-full.journal"),
    ],
)
def test_a_name_is_read_back(file: HistoryFile, name: str) -> None:
    """The name has no character with a meaning in a path, also if the salt has one."""
    assert format_name(file) == name
    assert parse_name(name) == file
    assert file.is_snapshot == name.endswith(".json")


def test_the_real_base_and_salt_fit() -> None:
    """A base and a salt as lab_state makes them are parts of a name as they are."""
    base, salt = journal.base_of(10**15 - 1, 0xFFFFFFFF), journal.new_salt()
    assert base in format_name(snapshot_file(1, 1, base))
    assert format_name(journal_file(1, 1, base, salt)).endswith(f"{salt}-{base}.journal")


@pytest.mark.parametrize(
    "name",
    [
        "notes.txt",
        "41-1-135-e394d24d.json",
        "00000000000000000041-01-135-e394d24d.json",
        "00000000000000000041-1-135-e394d24d.journal",
        f"00000000000000000041-1-{SALT}-135-e394d24d.json",
        f"00000000000000000041-1-{SALT}-full.json",
        f"00000000000000000041-1-{SALT}-full.journal.tmp",
        f"\u06600000000000000000041-1-{SALT}-full.journal",
        f"00000000000000000041-1-{SALT}-full.journal\n",
    ],
)
def test_a_foreign_name_is_no_name_of_ours(name: str) -> None:
    """Only names that `format_name` makes are read."""
    assert parse_name(name) is None


def test_groups() -> None:
    """A snapshot has the journals with its base. A journal that needs no snapshot stands alone. The order is that of revisions."""
    snapshot, old, new = snapshot_file(5, 50, BASE), journal_file(5, 51, BASE, SALT), journal_file(5, 60, BASE, SALT)
    none, full = journal_file(0, 1, NO_BASE, SALT), journal_file(9, 90, ANY_BASE, SALT)
    alone, orphan = snapshot_file(12, 120, OTHER), journal_file(20, 1, "2-00000000", SALT)
    found = grouped([full, orphan, new, alone, snapshot, none, old])
    assert found.generations == [
        StoredGeneration(None, (none,)),
        StoredGeneration(snapshot, (old, new)),
        StoredGeneration(None, (full,)),
        StoredGeneration(alone, ()),
    ]
    assert found.orphans == [orphan]
    assert [(one.first, one.wall, len(one.files)) for one in found.generations] == [
        (0, 1, 1),
        (5, 50, 3),
        (9, 90, 1),
        (12, 120, 1),
    ]


def snapshot(calls: SnapshotCalls | None = None) -> bytes:
    entries: dict[str, Stored] = {"a": 1}
    return b"".join(encode_snapshot(entries, 42, 0, copy_loaded=False, wall=1700, calls=calls))


def test_the_moment_of_a_snapshot() -> None:
    """It is in the reserved member, which may have values of users behind it. The last bytes are enough if they have all of it."""
    data = snapshot()
    assert moment_of_snapshot(data) == Moment(42, 1700)
    assert moment_of_snapshot(data[data.rfind(b'"$lab_state"') :]) == Moment(42, 1700)
    assert moment_of_snapshot(data[-40:]) is None
    assert moment_of_snapshot(data.replace(b'"wall":1700,', b"")) == Moment(42, 0)
    nested = Raw(b'{"$lab_state":{"format":1,"revision":7,"id":"x"}}')
    assert moment_of_snapshot(snapshot({"client": (3, {4: (7, nested)})})) == Moment(42, 1700)
    assert moment_of_snapshot(b'{"a":1}') is None


def test_the_moment_of_an_edited_snapshot() -> None:
    """Without a checksum the snapshot is an edit, and has the next revision, as when it is loaded."""
    data = snapshot()
    edited = data[: data.rfind(b',"crc32"')] + b"}}"
    assert moment_of_snapshot(edited) == moment_of_snapshot(edited + b"\n") == Moment(43, 1700)
    member, rest = edited[edited.rfind(b'"$lab_state"') : -1], edited[1 : edited.rfind(b',"$lab_state"')]
    assert moment_of_snapshot(b"{" + member + b"," + rest + b"}") == Moment(43, 1700)
    assert moment_of_snapshot(b'{"a":' + edited + b"}") is None


def test_the_moment_of_a_record() -> None:
    """It is the last revision. A record without a time is accepted, and bytes that are no record are not."""
    assert moment_of_record(b'{"from":41,"to":45,"clear":false,"set":{"a":{}},"delete":[],"wall":9}') == Moment(45, 9)
    assert moment_of_record(b'{"from":41,"to":45}') == Moment(45, 0)
    assert moment_of_record(b'{"from":41}') is None
    assert moment_of_record(b"\xff") is None


def test_the_revision_of_a_record() -> None:
    """It is the last one, in any order of the members."""
    assert revision_of_record(b'{"from":41,"to":45,"clear":false') == 45
    assert revision_of_record(b'{"to":45,"from":41}') == 45
    assert revision_of_record(b"[]") is None


def life_of(*firsts: tuple[int, int], newest: int | None = None) -> list[int]:
    """Return the number of the life of each generation. Each one is given as its first revision and its time."""
    moments = [Moment(*first) for first in firsts]
    return list(map(lives(moments, newest), moments))


def test_one_life() -> None:
    """The clock may be set forward or back. A killed process may leave two journals that begin with revision 0."""
    assert life_of() == []
    assert life_of((0, 50), (10, 90), (20, 30), (30, 40), newest=30) == [0, 0, 0, 0]
    assert life_of((0, 50), (0, 60), (10, 70), newest=20) == [0, 0, 0]
    assert life_of((5, 50), (10, 20)) == [0, 0]


def test_revisions_that_began_again() -> None:
    """The times show which generations are of the earlier life. The beginning of that life may be pruned."""
    assert life_of((0, 10), (10, 20), (0, 30), (5, 40), (8, 35), (9, 9)) == [0, 0, 1, 1, 1, 0]
    assert life_of((57, 10), (80, 20), (0, 30), (20, 40), newest=40) == [0, 0, 1, 1]
    assert life_of((0, 10), (4, 20), (0, 30), (4, 40), (0, 50)) == [0, 0, 1, 1, 2]


def test_holes_of_another_life() -> None:
    """A revision that is missing in the second life is a hole, also if the first life had it."""
    assert holes([span(0, 20), span(0, 5), span(7, 9)]) == [False, False, True]


def test_holes() -> None:
    """A hole is before a generation that begins after the revision that follows the last one. Generations may overlap."""
    assert holes([]) == []
    assert holes([span(5, 10), span(8, 20), span(21, 21), span(23, 30), span(24, 24), span(31, 40)]) == [
        False,
        False,
        False,
        True,
        False,
        False,
    ]


def test_the_generation_of_a_revision() -> None:
    """The newest one that has it; a revision that only an older one reaches is found there."""
    spans = [span(5, 10), span(8, 20), span(15, 15), span(21, 30)]
    assert [find_revision(spans, number) for number in (5, 7, 8, 14, 15, 16, 20, 21, 30)] == [
        0, 0, 1, 1, 2, 1, 1, 3, 3,
    ]  # fmt: skip


@pytest.mark.parametrize("revision", [4, 31])
def test_a_revision_outside_of_the_window(revision: int) -> None:
    """The message names both ends of the window, with their times."""
    spans = [span(5, 10, 0, 1000), span(11, 30, 1000, 1700000000000)]
    with pytest.raises(ValueError, match="is outside of the history") as raised:
        find_revision(spans, revision)
    assert "has the revisions 5 to 30 (2023-11-14T22:13:20.000+00:00)" in str(raised.value)


def test_a_revision_in_a_hole() -> None:
    """The message names the neighbours of the hole."""
    with pytest.raises(ValueError, match=r"hole .*: revision 10 .* last one before it, and revision 13 .* first one"):
        find_revision([span(5, 8), span(6, 10), span(13, 30)], 11)


def test_the_generation_of_a_time() -> None:
    """The newest one with a moment that is not after the time, also if the clock went back in it or before it."""
    spans = [span(0, 5, 0, 500), span(6, 9, 900, 700), span(10, 20, 600, 2000)]
    assert [find_time(spans, wall) for wall in (0, 499, 599, 600, 800, 5000)] == [0, 0, 0, 2, 2, 2]
    assert [find_time(spans[:2], wall) for wall in (699, 700, 800, 900)] == [0, 1, 1, 1]


def test_a_time_before_all() -> None:
    """The message names the time and the window."""
    with pytest.raises(ValueError, match=r"1970-01-01T00:00:00.050\+00:00 is outside of the history.* 1 .* to 2 "):
        find_time([span(1, 2, 100, 200)], 50)


def test_a_time_in_a_hole() -> None:
    """The last moment before the hole is found. A later time is in the hole, until the first moment after it."""
    spans = [span(1, 2, 100, 200), span(5, 6, 300, 400)]
    assert [find_time(spans, wall) for wall in (199, 200, 300)] == [0, 0, 1]
    with pytest.raises(ValueError, match=r"250\+00:00 is in a hole of the history: revision 2 .*, and revision 5 "):
        find_time(spans, 250)


def test_a_snapshot_that_no_journal_follows() -> None:
    """An older generation with later records has the moments after it, so it is found for all of them."""
    spans = [span(1, 9, 100, 900), span(5, 5, 500, 500), span(10, 20, 1000, 2000)]
    assert [find_time(spans, wall) for wall in (450, 550, 950, 1000)] == [0, 0, 0, 2]


def test_a_time_without_a_date() -> None:
    """A recorded time that no calendar has is shown as a number."""
    with pytest.raises(ValueError, match="the time 99999999999999999 ms"):
        find_revision([span(1, 2, 0, 99999999999999999)], 3)
