"""Records: parsed, and applied to a copy. And the views that a commit of an owner takes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from msgspec import Raw

from lab_state import _batch
from lab_state._checkpoints import Checkpoints
from lab_state._clock import Pauses, SystemClock
from lab_state._codec import decode_snapshot, encode_record, encode_small_record
from lab_state._entries import DELETED, EXPIRED, ChangeSet, Expiring, Json, Staged, Stored, StoredOrGone, Value
from lab_state._following import apply_step, stored_of
from lab_state._state import State
from lab_state.shared._frames import BadMessageError
from lab_state.shared._layer import OwnerLayer
from lab_state.shared._records import Outcome, ParsedRecord, RecordApplier, parse_in_steps, parse_record, record_of
from lab_state.shared._results import RecordCalls, Result, ResultTable
from lab_state.shared._views import FrameViews

A, B = "a" * 32, "b" * 32


def state_of(**entries: Stored) -> State:
    """Return a state at revision 10, whose time is 0."""
    values = {key: to.value if isinstance(to, Expiring) else to for key, to in entries.items()}
    state = State()
    state.load({**values}, 10, {key: to.at for key, to in entries.items() if isinstance(to, Expiring)})
    return state


def entries_of(state: State) -> dict[str, Stored]:
    return dict(state.entries.items())


def record(changes: dict[str, StoredOrGone], end: int = 11, start: int = 10, **more: Any) -> ParsedRecord:
    return ParsedRecord(start, end, more.pop("cleared", False), changes, **more)


def watched(state: State) -> list[tuple[str | None, StoredOrGone, int]]:
    """Return the list to which each change of a state is added, as a watch gets it."""
    told: list[tuple[str | None, StoredOrGone, int]] = []

    def one(key: str | None, to: StoredOrGone, revision: int) -> None:
        told.append((key, to, revision))

    def many(keys: Sequence[str], values: Sequence[StoredOrGone], revision: int) -> None:
        for key, to in zip(keys, values, strict=True):
            one(key, to, revision)

    state.on_change, state.on_changes = one, many
    return told


# Values


@pytest.mark.parametrize(
    ("data", "value"),
    [
        (b"1", 1),
        (b"-1.5", -1.5),
        (b"true", True),
        (b"null", None),
        (b'"text"', "text"),
        (b'{"a":1}', Json(b'{"a":1}')),
        (b"[]", Json(b"[]")),
        (b" [1]", Json(b" [1]")),
        (b"not JSON", Json(b"not JSON")),
        (b'"\xff"', Json(b'"\xff"')),
    ],
)
def test_the_form_of_a_value(data: bytes, value: Value) -> None:
    """A scalar is decoded. An object, an array and invalid JSON stay as they are, and keep no buffer alive."""
    for given in (data, bytearray(data), memoryview(data), Raw(data)):
        stored = stored_of(given)
        assert stored == value
        assert type(stored) is type(value)


# Parsing


def test_a_record_is_parsed() -> None:
    """The contents are those from which the record was encoded."""
    changes: dict[str, StoredOrGone] = {"a": 1, "b": Expiring(Json(b"[2]"), 900), "c": DELETED, "d": EXPIRED}
    calls: RecordCalls = {A: (3, {4: Raw(b"true")}), B: None}
    taken = ChangeSet(41, 45, cleared=True, changes=changes, since=0.0, time=700, wall=800)
    found = parse_record(b"".join(encode_record(taken, calls)))
    assert found[:6] == (41, 45, True, {**changes, "d": DELETED}, 700, 800)
    assert found.calls is not None
    assert msgspec.json.encode(found.calls) == msgspec.json.encode(calls)
    assert record_of(taken, calls) == (41, 45, True, changes, 700, 800, calls, None)


def test_a_small_record_is_parsed() -> None:
    """A record without times and results has neither."""
    data = encode_small_record(ChangeSet(1, 2, cleared=False, changes={"a": "text"}, since=0.0))
    assert data is not None
    assert parse_record(memoryview(data)) == (1, 2, False, {"a": "text"}, 0, 0, None, None)


def test_a_large_record_is_parsed_in_steps() -> None:
    """A record with many keys is parsed in several steps, with the same result."""
    changes: dict[str, StoredOrGone] = {f"key {number}": number for number in range(1_200)}
    changes |= {f"gone {number}": DELETED for number in range(600)}
    data = b"".join(encode_record(ChangeSet(1, 2, cleared=False, changes=changes, since=0.0)))
    found: list[ParsedRecord] = []

    def parse() -> Iterator[None]:
        found.append((yield from parse_in_steps(data)))

    slices = 3 + 2  # of values, and of deleted keys
    assert len(list(parse())) == slices + 3 + 2
    assert found == [parse_record(data)]
    assert found[0].changes == changes


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"", "not JSON"),
        (b"[]", "not JSON"),
        (b'{"from":1,"to":2,"clear":false,"set":{},"delete":[],"other":1}', "other members"),
        (b'{"from":1,"to":2,"clear":false,"set":{}}', "other members"),
        (b'{"from":1,"to":2,"clear":false,"set":{"a":"\xff"},"delete":[]}', "not JSON"),
        (b'{"from":1,"to":2,"clear":false,"set":{},"delete":[],"calls":{"short":null}}', "other members"),
        (b'{"from":3,"to":2,"clear":false,"set":{},"delete":[]}', "impossible revisions"),
        (b'{"from":-1,"to":2,"clear":false,"set":{},"delete":[]}', "impossible revisions"),
        (b'{"from":1,"to":2,"clear":false,"set":{},"delete":[],"expires":{"a":1}}', "contradict"),
        (b'{"from":1,"to":2,"clear":false,"set":{"a":1},"delete":["a"]}', "contradict"),
        (b'{"from":1,"to":2,"clear":false,"set":{"":1},"delete":[]}', "invalid key"),
        (b'{"from":1,"to":2,"clear":false,"set":{},"delete":["$lab_state"]}', "invalid key"),
    ],
)
def test_what_is_not_a_record(data: bytes, problem: str) -> None:
    """Anything else raises an error without the content, and the connection is closed."""
    with pytest.raises(BadMessageError, match=problem):
        parse_record(data)
    with pytest.raises(BadMessageError, match=problem):
        list(parse_in_steps(data))


# Applying


def test_a_record_is_applied() -> None:
    """The copy has the values and the revision of the record, and no changes of its own."""
    copy = state_of(a=1, b=2, c=Expiring(3, 900))
    told = watched(copy)
    applier = RecordApplier(copy)
    assert applier.copy is copy
    changes: dict[str, StoredOrGone] = {"a": 5, "b": DELETED, "c": 6, "d": Expiring(7, 900), "never": DELETED}
    assert applier.apply(record(changes, end=14)) is Outcome.APPLIED
    assert entries_of(copy) == {"a": 5, "c": 6, "d": Expiring(7, 900)}
    assert (copy.revision, copy.taken, copy.changes, copy.cleared) == (14, 14, {}, False)
    assert (copy.stored, copy.deleted, copy.swept) == (3, 1, 0)
    assert copy.due_keys(1_000) == ["d"]
    assert told == [("a", 5, 14), ("b", DELETED, 14), ("c", 6, 14), ("d", Expiring(7, 900), 14)]
    assert changes["never"] is DELETED  # the record stays as it was


@pytest.mark.parametrize(
    ("start", "end", "outcome"),
    [
        (10, 11, "APPLIED"),
        (8, 12, "APPLIED"),
        (8, 10, "SKIPPED"),
        (10, 10, "SKIPPED"),
        (11, 12, "GAP"),
        (11, 11, "GAP"),
    ],
)
@pytest.mark.parametrize("in_steps", [False, True])
def test_the_revisions_of_a_record_decide(start: int, end: int, outcome: str, *, in_steps: bool) -> None:
    """A record that the copy has is skipped. One that starts above the copy is a gap. All others are applied."""
    copy = state_of(a=1)
    copy.results = ResultTable()
    applier, found = RecordApplier(copy), record({"a": 2}, end, start, calls={A: (0, {1: Raw(b"1")})})
    assert applier.outcome(found) is Outcome[outcome]
    if in_steps:
        assert list(applier.prepare(found)) == []
        assert entries_of(copy) == {"a": 1}
        assert applier.finish() is Outcome[outcome]
    else:
        assert applier.apply(found) is Outcome[outcome]
    applied = outcome == "APPLIED"
    assert (entries_of(copy), copy.revision) == (({"a": 2}, end) if applied else ({"a": 1}, 10))
    assert (A in copy.results) is applied


@pytest.mark.parametrize("in_steps", [False, True])
@pytest.mark.parametrize(("cleared", "changes"), [(False, {}), (False, {"never": DELETED}), (True, {})])
def test_a_record_without_an_effect_brings_its_revision(
    changes: dict[str, StoredOrGone], *, cleared: bool, in_steps: bool
) -> None:
    """A key that was stored and deleted within one commit is nowhere, and the revision goes on."""
    copy = state_of()
    told = watched(copy)
    applier, found = RecordApplier(copy), record(changes, end=13, cleared=cleared)
    if in_steps:
        assert list(applier.prepare(found)) == []
        applier.finish()
    else:
        applier.apply(found)
    assert (copy.revision, copy.taken, copy.stored, copy.cleared, told) == (13, 13, 0, False, [])


@pytest.mark.parametrize("time", [0, 899, 900])
def test_a_deletion_after_its_expiry_is_reported_as_an_expiry(time: int) -> None:
    """The time of the owner decides, so each process reports the same."""
    copy = state_of(a=Expiring(1, 900), b=2)
    told = watched(copy)
    RecordApplier(copy).apply(record({"a": DELETED, "b": EXPIRED}, time=time))
    expired = time == 900
    assert told == [("a", EXPIRED if expired else DELETED, 11), ("b", DELETED, 11)]
    assert (copy.deleted, copy.swept) == ((1, 1) if expired else (2, 0))


def test_a_record_with_a_clear_is_applied() -> None:
    """All keys go, and those of the record come. With a watch, each key is reported."""
    for is_watched in (False, True):
        copy = state_of(a=1, b=Expiring(2, 900))
        told = watched(copy) if is_watched else []
        RecordApplier(copy).apply(record({"c": 3, "a": DELETED, "b": DELETED}, cleared=True, time=1_000))
        assert (entries_of(copy), copy.cleared, copy.changes, bool(copy.expiries)) == ({"c": 3}, False, {}, False)
        assert (copy.stored, copy.deleted, copy.swept) == (1, 2, 0)
        assert told == ([("a", DELETED, 11), ("b", DELETED, 11), ("c", 3, 11)] if is_watched else [])


@pytest.mark.parametrize("in_steps", [False, True])
def test_a_record_that_could_not_be_shown_is_applied_again(*, in_steps: bool) -> None:
    """After an error in the middle of a step the copy keeps its revision, so the same record is not skipped later."""
    copy = state_of(a=1, b=2)
    applier, found = RecordApplier(copy), record({"a": 3, "b": DELETED, "c": 4}, 14)

    def full(*_: object) -> None:
        raise MemoryError

    def apply() -> Outcome:
        if in_steps:
            list(applier.prepare(found))
            return applier.finish()
        return applier.apply(found)

    copy.on_change = copy.on_changes = full
    with pytest.raises(MemoryError):
        apply()
    assert (copy.revision, copy.taken, copy.changes) == (10, 10, {})
    copy.on_change = copy.on_changes = None
    assert apply() is Outcome.APPLIED
    assert (entries_of(copy), copy.revision) == ({"a": 3, "c": 4}, 14)


def test_results_are_in_the_table_of_the_copy() -> None:
    """The results of a record have its revision. A copy without a table gets one with the first results."""
    copy = state_of()
    applier = RecordApplier(copy)
    applier.apply(record({"a": 1}, calls=None))
    assert copy.results is None
    applier.apply(record({"a": 2}, 14, calls={A: (0, {1: Raw(b"7")})}))
    assert copy.results is not None
    assert copy.results.find(A, 1) == Result(14, b"7")
    applier.apply(record({"a": 3}, 15, calls={A: None}))
    assert A not in copy.results


def test_the_order_and_views_follow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Records reach the index and the views of a copy, however many keys they have."""
    monkeypatch.setattr(_batch, "MANY", 3)
    monkeypatch.setattr(_batch, "STEP", 2)
    copy = state_of(a=1, b=2, c=3, d=4)
    applier = RecordApplier(copy)
    assert copy.names("") == ["a", "b", "c", "d"]
    view = copy.view()
    applier.apply(record({"b": DELETED, "e": 5}))
    for _ in applier.prepare(record({"b": 6, "c": DELETED, "f": 7, "a": 8}, 12)):
        assert copy.names("") == ["a", "c", "d", "e"]
    assert applier.finish() is Outcome.APPLIED
    assert copy.names("") == ["a", "b", "d", "e", "f"]
    assert list(view.values(["a", "b", "c", "d"])) == [1, 2, 3, 4]


def test_many_keys_are_applied_in_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reads see a prepared record in one moment, with its expiries, and the record itself is left as it was."""
    monkeypatch.setattr(_batch, "MANY", 3)
    monkeypatch.setattr(_batch, "STEP", 2)
    copy = state_of(a=1, b=Expiring(2, 500), c=Expiring(3, 900), d=Expiring(4, 900))
    told, before = watched(copy), entries_of(copy)
    changes: dict[str, StoredOrGone] = {"a": 5, "b": EXPIRED, "c": DELETED, "d": 6, "e": Expiring(7, 700), "x": DELETED}
    applier = RecordApplier(copy)
    for _ in applier.prepare(record(changes, 14, time=600, calls={A: (0, {})})):
        assert (entries_of(copy), copy.revision, told) == (before, 10, [])
    assert applier.finish() is Outcome.APPLIED
    assert isinstance(copy.entries, Staged)
    assert len(copy.entries) == copy.count() == 3
    assert ("b" in copy.entries, copy.has("b"), "c" in copy.entries) == (False, False, False)
    assert (copy.revision, copy.changes, copy.results is not None) == (14, {}, True)
    assert told == [
        ("a", 5, 14),
        ("b", EXPIRED, 14),
        ("c", DELETED, 14),
        ("d", 6, 14),
        ("e", Expiring(7, 700), 14),
    ]
    assert (copy.stored, copy.deleted, copy.swept) == (3, 1, 1)
    assert applier.apply(record({"e": DELETED}, 15, start=14, time=800)) is Outcome.APPLIED
    while copy.fold_staged(1):
        pass
    assert (entries_of(copy), bool(copy.expiries)) == ({"a": 5, "d": 6}, False)
    assert told[-1] == ("e", EXPIRED, 15)
    assert len(changes) == 6


def test_a_key_that_has_expired_can_be_deleted_in_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy may have reached the expiry of keys before the record of their sweep comes."""
    monkeypatch.setattr(_batch, "MANY", 3)
    seconds = [0.0]
    copy = State(lambda: seconds[0])
    copy.load({"a": 1, "b": 2, "c": 3}, 10, dict.fromkeys("abc", 500))
    seconds[0] = 2.0
    applier = RecordApplier(copy)
    list(applier.prepare(record(dict.fromkeys("abc", DELETED), time=600)))
    applier.finish()
    assert (len(copy.entries), copy.swept, copy.deleted) == (0, 3, 0)


def test_a_follower_without_sweeps_does_not_search_all_passed_seconds() -> None:
    """After each record, the search for expired keys begins at the first second that has a key."""
    seconds = [100.0]
    copy = State(lambda: seconds[0])
    applier = RecordApplier(copy)
    for number in range(1, 50):
        seconds[0] += 10
        changes: dict[str, StoredOrGone] = {
            f"k{number}": Expiring(number, copy.now() + 5_000),
            f"k{number - 1}": DELETED,
        }
        applier.apply(record(changes, end=number, start=number - 1, time=copy.now()))
        assert copy.expiries._next == copy.now() // 1000
    assert copy.count() == 1


def test_a_step_is_not_changed_by_what_it_counts() -> None:
    """The number of stored values does not depend on how many revisions a step has."""
    copy = state_of()
    apply_step(copy, {"a": 1, "b": 2}, 1_000, cleared=False)
    apply_step(copy, {"b": DELETED}, 2_000, cleared=False)
    assert (copy.revision, copy.stored, copy.deleted) == (2_000, 2, 1)


# Views


async def snapshot_of(views: FrameViews) -> bytes:
    data = b"".join([part async for part in views.take()])
    await views.fold()
    return data


async def test_a_frame_has_the_changes_of_its_commit_and_nothing_newer() -> None:
    """A frame with the whole state is the copy with the record under way. It has the results of that record, too."""
    copy = state_of(a=1, b=2, c=Expiring(3, 900))
    copy.results = ResultTable()
    copy.results.apply({A: (0, {1: Raw(b"1")})}, 10)
    layer = OwnerLayer(copy)
    layer.set("a", Json(b"[5]"))
    layer.delete_many(["b"])
    layer.set("d", 6)
    taken = layer.take()
    layer.set("e", 7)
    layer.set("a", 8)
    views = FrameViews(copy, taken, {A: (1, {2: Raw(b"2")})})
    found = decode_snapshot(await snapshot_of(views), "path")
    values = {key: bytes(to) for key, to in found.entries.items() if isinstance(to, Raw)}
    assert values == {"a": b"[5]", "c": b"3", "d": b"6"}
    assert (found.revision, found.expires) == (13, {"c": 900})
    assert found.results is not None
    assert (found.results.find(A, 1), found.results.find(A, 2)) == (None, Result(13, b"2"))
    assert copy.results.find(A, 1) == Result(10, b"1")
    assert entries_of(copy) == {"a": 1, "b": 2, "c": Expiring(3, 900)}
    assert isinstance(copy.entries, dict)


@pytest.mark.parametrize("calls", [None, {}, {A: (0, {1: Raw(b"true")})}])
@pytest.mark.parametrize("has_table", [False, True])
async def test_a_frame_after_a_clear(calls: RecordCalls | None, *, has_table: bool) -> None:
    """A clear in the commit leaves nothing of the copy. The table is there if the copy or the record has results."""
    copy = state_of(a=1)
    if has_table:
        copy.results = ResultTable()
        copy.results.apply({B: (3, {})}, 10)
    layer = OwnerLayer(copy)
    layer.clear()
    layer.set("b", 2)
    given: list[int] = []
    views = FrameViews(copy, layer.take(), calls, given=lambda: given.append(1))
    found = decode_snapshot(await snapshot_of(views), "path")
    assert (list(found.entries), found.revision) == (["b"], 12)
    acknowledged = {} if found.results is None else found.results.acknowledged
    assert acknowledged == {**({B: 3} if has_table else {}), **({A: 0} if calls else {})}
    assert given
    assert entries_of(copy) == {"a": 1}


@pytest.mark.parametrize("of_the_copy", [False, True])
def test_checkpoints_are_of_the_copy(*, of_the_copy: bool) -> None:
    """The checkpoints of an owner look at its copy. Without this argument, they look at the state that is committed."""
    copy = state_of(a=1)
    outcomes: Any = SimpleNamespace(state=OwnerLayer(copy) if of_the_copy else copy)
    session: Any = None
    pauses = Pauses(SystemClock(), 1.0, 1.0)
    state = copy if of_the_copy else None
    checkpoints = Checkpoints("name", session, outcomes, SystemClock(), pauses, list, state)
    checkpoints.due = True
    assert not checkpoints.is_waiting
    copy.freeze()
    assert checkpoints.is_waiting
