"""The results of calls: the table that records make, and those that are not durable yet."""

from __future__ import annotations

import msgspec
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Raw

from lab_state._entries import Json
from lab_state.shared._results import (
    Applied,
    PendingResults,
    RecordCalls,
    Result,
    ResultTable,
    SnapshotCalls,
    needs_forgetting,
)

A, B = "a" * 32, "b" * 32
TRUE = Json(b"true")


def result(number: int) -> Json:
    return Json(b"%d" % number)


def encoded(calls: object) -> bytes:
    return msgspec.json.encode(calls)


def contents(table: ResultTable) -> bytes:
    return encoded(dict(sorted(table.snapshot().items())))


def table_of(*records: RecordCalls) -> ResultTable:
    table = ResultTable()
    for revision, calls in enumerate(records, 1):
        table.apply(calls, revision)
    return table


# The table


def test_a_record_brings_results() -> None:
    """A result has the revision of its record, and is found by client and number."""
    table = table_of({A: (0, {1: Raw(b"true"), 2: Raw(b"7")})})
    assert table.find(A, 1) == Result(1, TRUE)
    assert table.find(A, 2) == Result(1, Json(b"7"))
    assert table.find(A, 3) is None
    assert table.find(B, 1) is None
    assert A in table
    assert B not in table


def test_an_acknowledgement_drops_results() -> None:
    """Results up to the acknowledgement leave the table, and the acknowledgement never goes back."""
    table = table_of({A: (0, {1: Raw(b"1"), 2: Raw(b"2")})}, {A: (1, {3: Raw(b"3")})}, {A: (0, {4: Raw(b"4")})})
    assert [number for number in range(6) if table.find(A, number)] == [2, 3, 4]
    assert table.acknowledged == {A: 1}


def test_a_record_forgets_a_client() -> None:
    """`null` removes a client. To forget one that is not there changes nothing."""
    table = table_of({A: (0, {1: Raw(b"1")}), B: (2, {})}, {A: None})
    assert table.acknowledged == {B: 2}
    table.apply({A: None}, 3)
    assert table.acknowledged == {B: 2}


def test_the_table_keeps_no_record_in_memory() -> None:
    """A result is a copy: the buffer of the record, which may be large, is free again."""
    record = msgspec.json.decode(b'{"%s":[0,{"1":true}]}' % A.encode(), type=RecordCalls)
    table = table_of(record)
    found = table.find(A, 1)
    assert found is not None
    assert type(found.value) is bytes


def test_a_snapshot_is_of_one_revision() -> None:
    """The member of a snapshot does not change with later records, and loads as the same table."""
    table = table_of({A: (3, {4: Raw(b"1"), 5: Raw(b"2")})}, {B: (0, {1: Raw(b'"x"')})})
    member = table.snapshot()
    before = encoded(member)
    table.apply({A: (5, {6: Raw(b"3")}), B: None}, 9)
    assert encoded(member) == before
    again = ResultTable()
    again.apply({"c" * 32: (1, {})}, 1)
    again.load(msgspec.json.decode(before, type=SnapshotCalls))
    assert again.acknowledged == {A: 3, B: 0}
    assert (again.find(A, 5), again.find(B, 1)) == (Result(1, Json(b"2")), Result(2, Json(b'"x"')))
    assert encoded(again.snapshot()) == before


# Results that are not durable


def test_a_result_waits_for_its_record() -> None:
    """A result is pending until the record is durable, also while it is being written."""
    pending = PendingResults()
    assert not pending
    pending.add(A, 1, TRUE, 5)
    pending.add(A, 2, TRUE, 6)
    assert pending
    assert A in pending
    assert encoded(pending.take({A: 0})) == b'{"%s":[0,{"1":true,"2":true}]}' % A.encode()
    assert not pending
    assert pending.find(A, 1) == Applied(5, TRUE)
    pending.add(A, 3, TRUE, 7)
    pending.settle()
    assert [number for number in range(5) if pending.find(A, number)] == [3]
    assert pending.find(B, 3) is None


def test_acknowledged_results_are_left_out_of_a_record() -> None:
    """A call that was given up may be acknowledged before its record is made. Its result is not in the record."""
    pending = PendingResults()
    pending.add(A, 1, TRUE, 5)
    pending.add(A, 2, TRUE, 6)
    pending.add(B, 1, TRUE, 7)
    assert encoded(pending.take({A: 1})) == b'{"%s":[1,{"2":true}],"%s":[0,{"1":true}]}' % (A.encode(), B.encode())


def test_results_of_a_failed_commit_are_put_back() -> None:
    """They are in the next record, with those that came since. A second `put_back` changes nothing."""
    pending = PendingResults()
    for number in (1, 2):
        pending.add(A, number, result(number), number)
    pending.add(B, 1, TRUE, 3)
    pending.take({})
    pending.add(A, 3, result(3), 4)
    pending.put_back()
    pending.put_back()
    calls = pending.take({})
    assert encoded(calls) == b'{"%s":[0,{"1":1,"2":2,"3":3}],"%s":[0,{"1":true}]}' % (A.encode(), B.encode())


def test_a_client_that_was_forgotten_since_stays_so() -> None:
    """`null` replaces newer results, and wins over the results of a failed commit."""
    pending = PendingResults()
    pending.add(A, 1, TRUE, 1)
    pending.take({})
    pending.add(A, 2, TRUE, 2)
    pending.forget(A)
    pending.put_back()
    assert pending.take({A: 0}) == {A: None}


def test_a_forgotten_client_is_put_back() -> None:
    """The `null` of a failed commit is in the next record. A client that calls again is not forgotten."""
    pending = PendingResults()
    pending.forget(A)
    pending.forget(B)
    pending.take({})
    pending.add(B, 1, TRUE, 1)
    pending.put_back()
    calls = pending.take({})
    assert calls[A] is None
    assert encoded(calls[B]) == b'[0,{"1":true}]'
    pending.put_back()
    pending.add(A, 1, TRUE, 2)
    assert encoded(pending.take({})[A]) == b'[0,{"1":true}]'


def test_only_what_is_there_needs_forgetting() -> None:
    """A client that made no call has nothing that a record could forget."""
    table, pending = table_of({A: (0, {})}), PendingResults()
    pending.add(B, 1, TRUE, 1)
    assert needs_forgetting(A, table, pending)
    assert needs_forgetting(B, table, pending)
    pending.take({})
    assert needs_forgetting(B, table, pending)
    pending.settle()
    assert not needs_forgetting(B, table, pending)


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("call"), st.sampled_from([A, B])),
        st.tuples(st.just("acknowledge"), st.sampled_from([A, B])),
        st.tuples(st.sampled_from(["write", "sync", "fail"]), st.just("")),
    ),
    max_size=60,
)


@given(STEPS)
def test_each_result_is_found_until_it_is_acknowledged(steps: list[tuple[str, str]]) -> None:
    """In any order of calls, acknowledgements, commits and failures, each result is found, and replay has the same table."""
    table, pending, replayed = ResultTable(), PendingResults(), ResultTable()
    numbers, acks = {A: 0, B: 0}, {A: 0, B: 0}
    durable: dict[str, set[int]] = {A: set(), B: set()}
    under: RecordCalls | None = None
    revision = written = 0
    for step, client in steps:
        if step == "call":
            revision += 1
            numbers[client] += 1
            pending.add(client, numbers[client], result(revision), revision)
        elif step == "acknowledge":
            acks[client] = max([acks[client], *durable[client]])
        elif step == "write" and under is None:
            under, written = pending.take(acks), revision
        elif step == "sync" and under is not None:
            table.apply(under, written)
            replayed.apply(msgspec.json.decode(encoded(under), type=RecordCalls), written)
            for name, told in under.items():
                assert told is not None
                durable[name] |= set(told[1])
            pending.settle()
            under = None
        elif step == "fail" and under is not None:
            pending.put_back()
            under = None
        for name in (A, B):
            for number in range(acks[name] + 1, numbers[name] + 1):
                found, late = table.find(name, number), pending.find(name, number)
                assert (found is None) is not (late is None)
                assert (number in durable[name]) is (found is not None)
    assert contents(table) == contents(replayed)
